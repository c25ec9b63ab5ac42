//! From what was typed to what it means; every mistake is reported at once.

use std::path::PathBuf;

use proto::v3::{GrammarType, NextTokenChooserParameters};

use crate::args::{Args, SamplingArgs, WarmupArgs};

/// TGI's batch sizes when none is given.
const DEFAULT_BATCH_SIZES: [u32; 6] = [1, 2, 4, 8, 16, 32];

/// A benchmark that makes sense.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The value of `--tokenizer-name`, which stands for the model.
    pub model: String,
    /// Revision on the Hub.
    pub revision: String,
    /// In the order given; not empty.
    pub batch_sizes: Vec<u32>,
    /// Prompt tokens a request.
    pub sequence_length: u32,
    /// Generated tokens a request, the one of the prefill included.
    pub decode_length: u32,
    /// Measured runs a batch size.
    pub runs: usize,
    /// Runs before those.
    pub warmups: usize,
    /// Socket of rank 0.
    pub master_shard_uds_path: PathBuf,
    /// How tokens are chosen.
    pub sampling: SamplingArgs,
    /// What a shard without router is told.
    pub warmup: WarmupArgs,
    /// Plain lines instead of the terminal interface.
    pub no_tui: bool,
    /// Where the report goes.
    pub output_json: Option<PathBuf>,
    /// Where the tokenizer may come from.
    pub hub: hub::HubOptions,
}

impl Settings {
    /// Checks `args`.
    ///
    /// # Errors
    /// All mistakes, one line each.
    pub fn from_args(args: Args) -> Result<Self, Vec<String>> {
        let batch_sizes =
            if args.batch_size.is_empty() { DEFAULT_BATCH_SIZES.to_vec() } else { args.batch_size.clone() };
        let settings = Settings {
            model: args.tokenizer_name,
            revision: args.revision,
            batch_sizes,
            sequence_length: args.sequence_length,
            decode_length: args.decode_length,
            runs: args.runs,
            warmups: args.warmups,
            master_shard_uds_path: args.master_shard_uds_path,
            sampling: args.sampling,
            warmup: args.warmup,
            no_tui: args.no_tui,
            output_json: args.output_json,
            hub: args.hub.options(),
        };
        let mut mistakes = settings.length_mistakes();
        mistakes.extend(sampling_mistakes(&settings.sampling));
        if mistakes.is_empty() { Ok(settings) } else { Err(mistakes) }
    }

    /// Decode calls of one run.
    pub fn decode_steps(&self) -> u32 {
        self.decode_length - 1
    }

    /// Requests of the largest batch.
    pub fn largest_batch(&self) -> u32 {
        self.batch_sizes.iter().copied().max().unwrap_or_default()
    }

    fn length_mistakes(&self) -> Vec<String> {
        let counts = [
            ("--sequence-length", u64::from(self.sequence_length)),
            ("--decode-length", u64::from(self.decode_length)),
            ("--runs", self.runs as u64),
        ];
        let mut mistakes: Vec<String> = counts
            .into_iter()
            .filter(|(_, count)| *count == 0)
            .map(|(flag, _)| format!("{flag} is 0, expected at least 1"))
            .collect();
        let tokens = (u64::from(self.sequence_length) + u64::from(self.decode_length))
            * u64::from(self.largest_batch());
        if tokens > u64::from(u32::MAX) {
            mistakes.push(format!(
                "--batch-size {} with --sequence-length {} and --decode-length {} makes {tokens} tokens, expected at most {}",
                self.largest_batch(),
                self.sequence_length,
                self.decode_length,
                u32::MAX
            ));
        }
        mistakes
    }
}

fn sampling_mistakes(sampling: &SamplingArgs) -> Vec<String> {
    let is_positive = |value: f32| value > 0.0 && value.is_finite();
    let is_mass = |value: f32| value > 0.0 && value <= 1.0;
    let mistake = |flag: &str, value: Option<f32>, is_valid: &dyn Fn(f32) -> bool, expected: &str| {
        value.filter(|&value| !is_valid(value)).map(|value| format!("{flag} is {value}, expected {expected}"))
    };
    let above_zero = "a number above 0";
    let mass = "a number above 0, at most 1";
    [
        mistake("--temperature", sampling.temperature, &is_positive, above_zero),
        mistake("--top-p", sampling.top_p, &is_mass, mass),
        mistake("--typical-p", sampling.typical_p, &is_mass, mass),
        mistake("--repetition-penalty", sampling.repetition_penalty, &is_positive, above_zero),
        mistake(
            "--frequency-penalty",
            sampling.frequency_penalty,
            &|value| (-2.0..=2.0).contains(&value),
            "a number from -2 to 2",
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What goes over the wire; an absent parameter has the value that switches it off.
pub(crate) fn chooser_parameters(sampling: &SamplingArgs) -> NextTokenChooserParameters {
    NextTokenChooserParameters {
        temperature: sampling.temperature.unwrap_or(1.0),
        top_k: sampling.top_k.unwrap_or(0),
        top_p: sampling.top_p.unwrap_or(1.0),
        typical_p: sampling.typical_p.unwrap_or(1.0),
        do_sample: sampling.do_sample,
        seed: 0,
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        watermark: sampling.watermark,
        grammar: String::new(),
        grammar_type: GrammarType::None as i32,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;

    use super::*;

    /// The settings of a command line, for tests of this crate.
    pub(crate) fn settings(arguments: &[&str]) -> Settings {
        from_arguments(arguments).unwrap()
    }

    fn from_arguments(arguments: &[&str]) -> Result<Settings, Vec<String>> {
        Settings::from_args(Args::parse_from([&["benchmark", "-t", "some/model"], arguments].concat()))
    }

    #[test]
    fn batch_sizes_default_to_tgis() {
        assert_eq!(settings(&[]).batch_sizes, [1, 2, 4, 8, 16, 32]);
        assert_eq!(settings(&["-b", "8", "-b", "2"]).batch_sizes, [8, 2]);
        assert_eq!(settings(&["-b", "8", "-b", "2"]).largest_batch(), 8);
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let mistakes =
            from_arguments(&["-s", "0", "-d", "0", "-r", "0", "--temperature", "0", "--top-p", "1.5"]);
        assert_eq!(
            mistakes.unwrap_err(),
            [
                "--sequence-length is 0, expected at least 1",
                "--decode-length is 0, expected at least 1",
                "--runs is 0, expected at least 1",
                "--temperature is 0, expected a number above 0",
                "--top-p is 1.5, expected a number above 0, at most 1",
            ]
        );
        assert!(from_arguments(&["--temperature", "nan"]).is_err());
        assert!(from_arguments(&["-s", "4000000000", "-b", "2"]).unwrap_err()[0].contains("tokens"));
    }

    #[test]
    fn absent_parameters_are_off() {
        let parameters = chooser_parameters(&SamplingArgs::default());
        assert_eq!((parameters.temperature, parameters.top_k, parameters.top_p), (1.0, 0, 1.0));
        assert_eq!((parameters.repetition_penalty, parameters.frequency_penalty), (1.0, 0.0));
        assert!(!parameters.do_sample);
    }
}
