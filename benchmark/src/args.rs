//! The command line and the environment: TGI's 17 options and ours. Their doc comments are the manual.

use std::path::PathBuf;

use clap::Parser;
use serde::Serialize;

/// Measures prefill and decode of running shards, batch size by batch size.
///
/// It attaches to the socket of a running shard (beside a router or alone) and clears the shard's cache first: do not
/// point it at shards that serve traffic.
#[derive(Parser, Clone, Debug)]
#[command(name = "benchmark", version)]
pub struct Args {
    /// Whose tokenizer makes the prompt: a model id on the Hub, a local directory with tokenizer.json, or a .gguf file.
    #[arg(short, long, env)]
    pub tokenizer_name: String,

    /// The revision of the model on the Hub.
    #[arg(long, env, default_value = "main")]
    pub revision: String,

    /// Requests in a batch. Repeat the flag for several: `-b 1 -b 8`. Default: 1, 2, 4, 8, 16 and 32.
    #[arg(short, long, value_parser = parse_batch_size)]
    pub batch_size: Vec<u32>,

    /// Prompt length in tokens.
    #[arg(short, long, env, default_value_t = 10)]
    pub sequence_length: u32,

    /// Tokens to generate a request; the first comes out of the prefill.
    #[arg(short, long, env, default_value_t = 8)]
    pub decode_length: u32,

    /// How often each batch size is measured.
    #[arg(short, long, env, default_value_t = 10)]
    pub runs: usize,

    /// How often each batch size is run before it is measured.
    #[arg(short, long, env, default_value_t = 1)]
    pub warmups: usize,

    /// The Unix socket of rank 0; the others are asked for there.
    #[arg(short, long, env, default_value = "/tmp/text-generation-server-0")]
    pub master_shard_uds_path: PathBuf,

    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Limits for a shard that has no router.
    #[command(flatten)]
    pub warmup: WarmupArgs,

    /// Print plain progress lines instead of the terminal interface, and end when the runs are done.
    /// This is also what happens when standard output is no terminal.
    #[arg(long)]
    pub no_tui: bool,

    /// Write machine, shards, parameters, every run and the summary to this file.
    #[arg(long, value_name = "FILE")]
    pub output_json: Option<PathBuf>,

    /// Where the Hub and its cache are.
    #[command(flatten)]
    pub hub: hub::HubArgs,

    /// What to log: a level or a filter.
    #[arg(long, env, hide = true, default_value = "info")]
    pub log_level: String,
}

impl Args {
    /// How this program logs.
    pub fn log_settings(&self) -> process::LogSettings {
        let log = process::LogArgs { log_level: Some(self.log_level.clone()), ..Default::default() };
        log.settings(process::Program::Benchmark)
    }
}

/// Sampling parameters, the same for every request; what is absent is off.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the field names are the API's parameter names; the comments are help texts")]
pub struct SamplingArgs {
    /// Divides the logits before sampling.
    #[arg(long, env)]
    pub temperature: Option<f32>,
    /// Sample among the k most likely tokens.
    #[arg(long, env)]
    pub top_k: Option<u32>,
    /// Sample among the fewest tokens whose probabilities sum to this.
    #[arg(long, env)]
    pub top_p: Option<f32>,
    /// Sample among the tokens closest to the expected surprise, up to this mass.
    #[arg(long, env)]
    pub typical_p: Option<f32>,
    /// Above 1: make tokens that were there already less likely.
    #[arg(long, env)]
    pub repetition_penalty: Option<f32>,
    /// Above 0: make frequent tokens less likely.
    #[arg(long, env)]
    pub frequency_penalty: Option<f32>,
    /// Embed a watermark.
    #[arg(long, env)]
    pub watermark: bool,
    /// Sample instead of taking the most likely token.
    #[arg(long, env)]
    pub do_sample: bool,
    /// Report the n most likely tokens with each.
    #[arg(long, env)]
    pub top_n_tokens: Option<u32>,
}

/// Limits that a router sends to a shard when it warms it up. The benchmark sends them only to a shard that nobody
/// warmed up; behind a router they have no effect.
#[derive(clap::Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WarmupArgs {
    /// For a shard without router: tokens of the largest prefill. Default: the largest batch's prompts.
    #[arg(long, env)]
    pub max_batch_prefill_tokens: Option<u32>,
    /// For a shard without router: longest prompt. Default: what the model allows.
    #[arg(long, env)]
    pub max_input_tokens: Option<u32>,
    /// For a shard without router: longest prompt and answer. Default: what the model allows.
    #[arg(long, env)]
    pub max_total_tokens: Option<u32>,
}

fn parse_batch_size(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) | Err(_) => {
            Err("expected one whole number above 0; for several batch sizes repeat the flag: -b 1 -b 8"
                .to_string())
        }
        Ok(batch_size) => Ok(batch_size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["benchmark"], arguments].concat())
    }

    #[test]
    fn tgis_command_lines_parse() {
        let args = parse(&[
            "-t",
            "m",
            "-b",
            "1",
            "--batch-size",
            "32",
            "-s",
            "512",
            "-d",
            "64",
            "-r",
            "3",
            "-w",
            "0",
        ]);
        let args = args.unwrap();
        assert_eq!(args.batch_size, [1, 32]);
        assert_eq!((args.sequence_length, args.decode_length, args.runs, args.warmups), (512, 64, 3, 0));
        let args =
            parse(&["--tokenizer-name=m", "-m", "/x-0", "--top-k=5", "--do-sample", "--watermark"]).unwrap();
        assert_eq!(args.master_shard_uds_path, PathBuf::from("/x-0"));
        assert_eq!(args.sampling.top_k, Some(5));
        assert!(args.sampling.do_sample && args.sampling.watermark && !args.no_tui);
    }

    #[test]
    fn the_defaults_are_tgis() {
        let args = parse(&["-t", "m"]).unwrap();
        assert_eq!((args.sequence_length, args.decode_length, args.runs, args.warmups), (10, 8, 10, 1));
        assert_eq!(args.revision, "main");
        assert_eq!(args.master_shard_uds_path, PathBuf::from("/tmp/text-generation-server-0"));
        assert_eq!(args.sampling, SamplingArgs::default());
    }

    #[test]
    fn mistakes_are_named() {
        let message = |arguments: &[&str]| parse(arguments).unwrap_err().to_string();
        assert!(message(&[]).contains("--tokenizer-name"));
        assert!(message(&["-t", "m", "-b", "1,2"]).contains("repeat the flag"));
        assert!(message(&["-t", "m", "-b", "0"]).contains("above 0"));
        assert!(message(&["-t", "m", "--no-such"]).contains("--no-such"));
    }

    #[test]
    fn the_command_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
