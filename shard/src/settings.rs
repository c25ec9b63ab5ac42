//! What the arguments mean: a pure function, and every mistake at once.

use std::path::PathBuf;
use std::str::FromStr;

use backend::{DType, KvDType};
use hub::{HubOptions, ModelRef, RopeKind, RopeOverride};
use models::Quantize;

use process::{OtlpEndpoint, TraceSettings};

use crate::args::{Command, DownloadArgs, RefusedArgs, RopeArgs, ServeArgs};

/// What a shard is to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A GPU when there is one and this program has kernels for it, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU.
    Cuda,
}

/// What `serve` does.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// The model.
    pub model: ModelRef,
    /// Where models are.
    pub hub: HubOptions,
    /// Socket path without `-RANK`.
    pub uds_prefix: String,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Type of the weights; `None`: what suits the device.
    pub dtype: Option<DType>,
    /// Form of the weights; `None`: as the model's files have them.
    pub quantize: Option<Quantize>,
    /// Type of the KV cache; `None`: what suits the weights.
    pub kv_dtype: Option<KvDType>,
    /// Rotary scaling in place of the model's own.
    pub rope_scaling: Option<RopeOverride>,
    /// What to run on.
    pub device: DeviceKind,
    /// Number of this rank's GPU among those it sees.
    pub cuda_ordinal: usize,
    /// Batch sizes whose decode steps are recorded as CUDA graphs; `None`: the backend's choice.
    pub cuda_graphs: Option<Vec<usize>>,
    /// Results that do not depend on what is computed beside them.
    pub is_deterministic: bool,
    /// CPU threads of this rank.
    pub threads: usize,
    /// Repeated in the handshake; empty when started by hand.
    pub instance_id: String,
    /// Pipe whose end tells that the launcher is gone.
    pub lifeline_fd: Option<i32>,
    /// Share of the free memory for the KV cache.
    pub memory_fraction: f64,
    /// Whether prompts may be asked for their log-probabilities.
    pub request_logprobs: bool,
    /// Longest prompt, when the router does not say.
    pub max_input_tokens: Option<usize>,
    /// Longest prompt and answer, when the router does not say.
    pub max_total_tokens: Option<usize>,
}

impl ServeSettings {
    /// The socket of one rank.
    pub fn socket(&self, rank: usize) -> PathBuf {
        PathBuf::from(format!("{}-{rank}", self.uds_prefix))
    }

    /// Where the ranks meet at the start.
    pub fn rendezvous_socket(&self) -> PathBuf {
        PathBuf::from(format!("{}-rendezvous", self.uds_prefix))
    }
}

/// What `download-weights` does.
#[derive(Debug, Clone)]
pub struct DownloadSettings {
    /// The model.
    pub model: ModelRef,
    /// Where models are.
    pub hub: HubOptions,
}

/// Reads the options of `serve`. `num_cores`: of the machine.
///
/// # Errors
/// Every mistake, one line each.
pub fn serve_settings(args: &ServeArgs, num_cores: usize) -> Result<ServeSettings, Vec<String>> {
    let mut mistakes = Mistakes(refusals(&args.refused));
    let rank = mistakes.number("RANK", &args.group.rank).unwrap_or(0);
    let world_size = mistakes.number("WORLD_SIZE", &args.group.world_size).unwrap_or(1);
    if rank >= world_size {
        mistakes.add(format!("RANK is {rank}, expected less than WORLD_SIZE, which is {world_size}"));
    }
    if args.sharded && (args.group.rank.is_none() || args.group.world_size.is_none()) {
        mistakes.add("--sharded is given, expected RANK and WORLD_SIZE in the environment".to_string());
    }
    let dtype = args.dtype.as_deref().and_then(|name| {
        let dtype = DType::from_name(name);
        if dtype.is_none() {
            mistakes.add(format!("--dtype is {name}, expected float16, bfloat16 or float32"));
        }
        dtype
    });
    if let Some(Err(mistake)) = otlp_endpoint(args) {
        mistakes.add(mistake);
    }
    let quantize = quantize(args.quantize.as_deref(), &mut mistakes);
    let kv_dtype = kv_dtype(args.kv_cache_dtype.as_deref(), &mut mistakes);
    let rope_scaling = rope_scaling(&args.rope, &mut mistakes);
    let device = device(args.quartet.device.as_deref(), &mut mistakes);
    let cuda_graphs = cuda_graphs(args.limits.cuda_graphs.as_deref(), &mut mistakes);
    let threads = mistakes
        .number("--threads (QUARTET_THREADS)", &args.quartet.threads)
        .unwrap_or_else(|| (num_cores / world_size.max(1)).max(1));
    if threads == 0 {
        mistakes.add("--threads (QUARTET_THREADS) is 0, expected at least 1".to_string());
    }
    let cuda_ordinal =
        mistakes.number("--cuda-ordinal (QUARTET_CUDA_ORDINAL)", &args.quartet.cuda_ordinal).unwrap_or(rank);
    let lifeline_fd = mistakes.number("--lifeline-fd (QUARTET_LIFELINE_FD)", &args.quartet.lifeline_fd);
    if let Some(fd) = lifeline_fd.filter(|fd| *fd < 3) {
        mistakes.add(format!("--lifeline-fd (QUARTET_LIFELINE_FD) is {fd}, expected 3 or more"));
    }
    let memory_fraction =
        mistakes.number("CUDA_MEMORY_FRACTION", &args.limits.cuda_memory_fraction).unwrap_or(1.0);
    if !(memory_fraction > 0.0 && memory_fraction <= 1.0) {
        mistakes
            .add(format!("CUDA_MEMORY_FRACTION is {memory_fraction}, expected more than 0 and at most 1"));
    }
    let max_total_tokens = mistakes.number("MAX_TOTAL_TOKENS", &args.limits.max_total_tokens);
    if !mistakes.0.is_empty() {
        return Err(mistakes.0);
    }
    Ok(ServeSettings {
        model: ModelRef { model_id: args.model_id.clone(), revision: args.revision.clone() },
        hub: args.hub.options(),
        uds_prefix: args.uds_path.clone(),
        rank,
        world_size,
        dtype,
        quantize,
        kv_dtype,
        rope_scaling,
        device,
        cuda_ordinal,
        cuda_graphs,
        is_deterministic: args.quartet.deterministic,
        threads,
        instance_id: args.quartet.instance_id.clone().unwrap_or_default(),
        lifeline_fd,
        memory_fraction,
        request_logprobs: args.limits.request_logprobs.as_deref().is_some_and(is_true),
        max_input_tokens: args.max_input_tokens,
        max_total_tokens,
    })
}

/// Where a shard that serves sends its spans; nowhere when the address is a mistake, which [`serve_settings`] tells.
pub fn trace_settings(command: &Command) -> Option<TraceSettings> {
    let Command::Serve(args) = command else { return None };
    let endpoint = otlp_endpoint(args)?.ok()?;
    let instance = args.group.rank.as_ref().map(|rank| format!("rank-{rank}"));
    Some(TraceSettings { endpoint, service_name: args.otlp_service_name.clone(), instance })
}

/// An empty address counts as none.
fn otlp_endpoint(args: &ServeArgs) -> Option<Result<OtlpEndpoint, String>> {
    args.otlp_endpoint.as_deref().filter(|text| !text.is_empty()).map(OtlpEndpoint::parse)
}

/// Reads the options of `download-weights`.
///
/// # Errors
/// Every mistake, one line each.
pub fn download_settings(args: &DownloadArgs) -> Result<DownloadSettings, Vec<String>> {
    if args.extension != ".safetensors" {
        return Err(vec![format!("--extension is {}, expected .safetensors", args.extension)]);
    }
    Ok(DownloadSettings {
        model: ModelRef { model_id: args.model_id.clone(), revision: args.revision.clone() },
        hub: args.hub.options(),
    })
}

/// Mistakes found so far.
struct Mistakes(Vec<String>);

impl Mistakes {
    fn add(&mut self, mistake: String) {
        self.0.push(mistake);
    }

    /// The number in `value`; an empty variable counts as unset.
    fn number<T: FromStr>(&mut self, name: &str, value: &Option<String>) -> Option<T> {
        let text = value.as_deref().filter(|text| !text.is_empty())?;
        let number = text.parse().ok();
        if number.is_none() {
            self.add(format!("{name} is {text:?}, expected a number"));
        }
        number
    }
}

/// The form of the weights that is asked for.
fn quantize(name: Option<&str>, mistakes: &mut Mistakes) -> Option<Quantize> {
    let name = name.filter(|name| !name.is_empty())?;
    let quantize = Quantize::from_name(name);
    if quantize.is_none() {
        mistakes.add(format!(
            "--quantize {name} is not supported, expected fp8 or compressed-tensors: leave it out to run the weights as they are \
             stored"
        ));
    }
    quantize
}

/// The type of the KV cache that is asked for.
fn kv_dtype(name: Option<&str>, mistakes: &mut Mistakes) -> Option<KvDType> {
    let name = name.filter(|name| !name.is_empty() && *name != "auto")?;
    let dtype = KvDType::from_fp8_name(name);
    if dtype.is_none() {
        mistakes.add(format!(
            "--kv-cache-dtype is {name}, expected fp8_e4m3fn or fp8_e5m2: leave it out to take the type that suits the weights"
        ));
    }
    dtype
}

/// The rotary scaling that is asked for; an empty variable counts as unset.
fn rope_scaling(args: &RopeArgs, mistakes: &mut Mistakes) -> Option<RopeOverride> {
    let name = args.rope_scaling.as_deref().filter(|name| !name.is_empty());
    let kind = name.and_then(RopeKind::from_name);
    if let (Some(name), None) = (name, kind) {
        mistakes.add(format!("--rope-scaling (ROPE_SCALING) is {name:?}, expected linear or dynamic"));
    }
    let factor = mistakes.number("--rope-factor (ROPE_FACTOR)", &args.rope_factor);
    RopeOverride::new(kind, factor).unwrap_or_else(|mistake| {
        mistakes.add(mistake);
        None
    })
}

fn device(name: Option<&str>, mistakes: &mut Mistakes) -> DeviceKind {
    match name {
        None | Some("" | "auto") => DeviceKind::Auto,
        Some("cpu") => DeviceKind::Cpu,
        Some("cuda") => DeviceKind::Cuda,
        Some(other) => {
            mistakes.add(format!("--device is {other}, expected cpu, cuda or auto"));
            DeviceKind::Auto
        }
    }
}

/// Batch sizes, comma-separated; zeros mean "none". An empty variable counts as unset.
fn cuda_graphs(list: Option<&str>, mistakes: &mut Mistakes) -> Option<Vec<usize>> {
    let list = list.filter(|list| !list.is_empty())?;
    let mut sizes = Vec::new();
    for item in list.split(',') {
        match item.trim().parse() {
            Ok(0) => {}
            Ok(size) => sizes.push(size),
            Err(_) => mistakes.add(format!(
                "CUDA_GRAPHS has {item:?}, expected batch sizes separated by commas, such as 1,2,4"
            )),
        }
    }
    Some(sizes)
}

/// What was asked for and cannot be done, one line each.
fn refusals(args: &RefusedArgs) -> Vec<String> {
    let given = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let mut refusals = Vec::new();
    let mut refuse = |name: &str, value: Option<String>, remedy: &str| {
        if let Some(value) = value {
            refusals.push(format!("{name} {value} is not supported: {remedy}"));
        }
    };
    refuse("--speculate", args.speculate.filter(|&n| n > 0).map(|n| n.to_string()), "leave it out");
    refuse("LORA_ADAPTERS", given(&args.lora_adapters), "unset it and merge the adapter into the weights");
    refusals
}

/// The values upstream takes for "on".
fn is_true(value: &str) -> bool {
    value == "1" || value.eq_ignore_ascii_case("true")
}

#[cfg(test)]
mod tests {
    use backend::Fp8Format;
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn parse(arguments: &[&str]) -> Result<ServeSettings, Vec<String>> {
        let arguments = ["shard", "serve"].iter().chain(arguments);
        match Args::try_parse_from(arguments).unwrap().command {
            Command::Serve(args) => serve_settings(&args, 8),
            _ => unreachable!(),
        }
    }

    #[test]
    fn a_bare_command_is_enough() {
        let settings = parse(&["org/model"]).unwrap();
        assert_eq!((settings.rank, settings.world_size, settings.threads), (0, 1, 8));
        assert_eq!(settings.socket(0), PathBuf::from("/tmp/text-generation-server-0"));
        assert_eq!((settings.memory_fraction, settings.dtype), (1.0, None));
    }

    #[test]
    fn takes_what_upstreams_launcher_passes() {
        let settings = parse(&[
            "org/model",
            "--uds-path",
            "/run/q/s",
            "--logger-level",
            "INFO",
            "--json-output",
            "--trust-remote-code",
            "--sharded",
            "--dtype",
            "bfloat16",
            "--revision",
            "main",
            "--otlp-service-name",
            "x",
            "--max-input-tokens",
            "100",
            "--rank",
            "1",
            "--world-size",
            "3",
            "--master-addr",
            "localhost",
            "--master-port",
            "29500",
            "--max-total-tokens",
            "200",
            "--request-logprobs",
            "1",
            "--cuda-graphs",
            "1,2",
            "--cuda-memory-fraction",
            "0.5",
            "--max-batch-size",
            "",
            "--lora-adapters",
            "",
            "--speculate",
            "0",
            "--instance-id",
            "abc",
            "--lifeline-fd",
            "7",
            "--cuda-ordinal",
            "0",
        ])
        .unwrap();
        assert_eq!((settings.cuda_ordinal, parse(&["m"]).unwrap().cuda_ordinal), (0, 0));
        let by_rank = parse(&["m", "--rank", "2", "--world-size", "3"]).unwrap();
        assert_eq!(by_rank.cuda_ordinal, 2, "a rank started by hand sees all devices");
        assert_eq!((settings.rank, settings.world_size, settings.threads), (1, 3, 2));
        assert_eq!(settings.dtype, Some(DType::BF16));
        assert_eq!((settings.max_input_tokens, settings.max_total_tokens), (Some(100), Some(200)));
        assert!(settings.request_logprobs && settings.memory_fraction == 0.5);
        assert_eq!((settings.lifeline_fd, settings.instance_id.as_str()), (Some(7), "abc"));
        assert_eq!(settings.rendezvous_socket(), PathBuf::from("/run/q/s-rendezvous"));
    }

    #[test]
    fn every_mistake_is_told_at_once() {
        let mistakes = parse(&[
            "m",
            "--rank",
            "2",
            "--world-size",
            "two",
            "--dtype",
            "int8",
            "--device",
            "tpu",
            "--cuda-graphs",
            "1,two",
            "--threads",
            "0",
            "--lifeline-fd",
            "1",
            "--cuda-memory-fraction",
            "1.5",
            "--quantize",
            "gptq",
            "--speculate",
            "2",
        ])
        .unwrap_err();
        let expected = [
            "--speculate 2",
            "WORLD_SIZE is \"two\"",
            "RANK is 2",
            "--dtype is int8",
            "--quantize gptq is not supported, expected fp8",
            "--device is tpu",
            "CUDA_GRAPHS has \"two\"",
            "--threads (QUARTET_THREADS) is 0",
            "--lifeline-fd (QUARTET_LIFELINE_FD) is 1",
            "CUDA_MEMORY_FRACTION is 1.5",
        ];
        assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
        for (mistake, start) in mistakes.iter().zip(expected) {
            assert!(mistake.starts_with(start), "{mistake}");
        }
    }

    #[test]
    fn rotary_scaling_is_read_as_upstreams_launcher_passes_it() {
        let rope = |words: &[&str]| parse(&[&["m"], words].concat()).map(|settings| settings.rope_scaling);
        let expected = |kind, factor| Ok(Some(RopeOverride { kind, factor }));
        assert_eq!(rope(&[]), Ok(None));
        assert_eq!(rope(&["--rope-scaling", "", "--rope-factor", ""]), Ok(None));
        assert_eq!(
            rope(&["--rope-scaling", "dynamic", "--rope-factor", "2.5"]),
            expected(RopeKind::Dynamic, 2.5)
        );
        assert_eq!(rope(&["--rope-scaling", "dynamic"]), expected(RopeKind::Dynamic, 1.0));
        assert_eq!(rope(&["--rope-factor", "2"]), expected(RopeKind::Linear, 2.0));
        assert_eq!(
            rope(&["--rope-scaling", "yarn", "--rope-factor", "two"]).unwrap_err(),
            [
                "--rope-scaling (ROPE_SCALING) is \"yarn\", expected linear or dynamic",
                "--rope-factor (ROPE_FACTOR) is \"two\", expected a number",
            ]
        );
        assert_eq!(
            rope(&["--rope-factor", "0.5"]).unwrap_err(),
            ["--rope-factor (ROPE_FACTOR) is 0.5, expected a number from 1 up"]
        );
    }

    #[test]
    fn what_cannot_be_done_is_refused_in_one_line_each() {
        let mistakes =
            parse(&["m", "--sharded", "--kv-cache-dtype", "int8", "--lora-adapters", "a=b"]).unwrap_err();
        assert_eq!(mistakes.len(), 3, "{mistakes:#?}");
        assert!(mistakes.iter().all(|mistake| !mistake.contains('\n')));
    }

    #[test]
    fn spans_go_where_they_are_asked_to() {
        let command = |words: &[&str]| {
            let words = [&["shard", "serve", "m", "--otlp-service-name", "s", "--rank", "1"], words].concat();
            Args::try_parse_from(words).unwrap().command
        };
        assert_eq!(trace_settings(&command(&[])), None);
        assert_eq!(trace_settings(&command(&["--otlp-endpoint", ""])), None);
        let settings = trace_settings(&command(&["--otlp-endpoint", "http://collector:4317"])).unwrap();
        assert_eq!(settings.service_name, "s");
        assert_eq!(settings.instance.as_deref(), Some("rank-1"));
        let mistakes = parse(&["m", "--otlp-endpoint", "ftp://x"]).unwrap_err();
        assert!(mistakes[0].starts_with("--otlp-endpoint is `ftp://x`, expected"), "{mistakes:?}");
    }

    #[test]
    fn precisions_are_read_as_upstreams_launcher_passes_them() {
        let settings = parse(&["m", "--quantize", "fp8", "--kv-cache-dtype", "fp8_e5m2"]).unwrap();
        assert_eq!(settings.quantize, Some(Quantize::Fp8));
        assert_eq!(settings.kv_dtype, Some(KvDType::Fp8(Fp8Format::E5M2)));
        let settings = parse(&["m", "--quantize", "compressed-tensors", "--kv-cache-dtype", "auto"]).unwrap();
        assert_eq!((settings.quantize, settings.kv_dtype), (Some(Quantize::CompressedTensors), None));
        let settings = parse(&["m", "--quantize", "", "--kv-cache-dtype", ""]).unwrap();
        assert_eq!((settings.quantize, settings.kv_dtype), (None, None));
    }

    #[test]
    fn only_safetensors_are_downloaded() {
        let arguments = ["shard", "download-weights", "m", "--extension", ".bin", "--merge-lora"];
        let Command::DownloadWeights(args) = Args::try_parse_from(arguments).unwrap().command else {
            panic!("the command is download-weights")
        };
        assert_eq!(download_settings(&args).unwrap_err(), ["--extension is .bin, expected .safetensors"]);
    }
}
