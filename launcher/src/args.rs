//! The command line and the environment: what was typed, nothing derived. The doc comments are the manual.
//!
//! Names, types, defaults and environment variables are text-generation-inference's. A value on the command line wins
//! over the environment, which wins over the default. What the values mean together is decided in [`crate::plan`].

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use crate::values::{
    DeviceKind, Dtype, KvCacheDtype, Quantize, Redacted, RopeScaling, UsageStats, spelled,
};

/// Serves a large language model: plans the memory, starts one shard per device and a router before them, supervises
/// them, and drains them when it is asked to stop.
///
/// Every option can be set by the environment variable shown beside it. A SIGTERM, SIGINT or SIGHUP finishes the running
/// requests and exits with 0; a second one ends everything now.
#[derive(Parser, Clone, Debug)]
#[command(name = "launcher", version, max_term_width = 110, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What else than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Which model.
    #[command(flatten, next_help_heading = "Model")]
    pub model: ModelArgs,
    /// On what it runs.
    #[command(flatten, next_help_heading = "Devices")]
    pub devices: DeviceArgs,
    /// How long and how many requests may be.
    #[command(flatten, next_help_heading = "Limits")]
    pub limits: LimitArgs,
    /// Where it is served.
    #[command(flatten, next_help_heading = "Serving")]
    pub serving: ServingArgs,
    /// What is done when a process dies.
    #[command(flatten, next_help_heading = "Recovery")]
    pub recovery: RecoveryArgs,
    /// Features that are switched on by an option.
    #[command(flatten, next_help_heading = "Features")]
    pub features: FeatureArgs,
    /// Where model files are.
    #[command(flatten, next_help_heading = "Model files")]
    pub hub: hub::HubArgs,
    /// Logs.
    #[command(flatten, next_help_heading = "Logs")]
    pub log: process::LogArgs,
    /// Variables that have no option in the manual.
    #[command(flatten)]
    pub hidden: HiddenArgs,
}

/// What else than serving the launcher does.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Download a model's files into the cache, or go on with a download that was interrupted, and exit.
    ///
    /// Nothing is asked of the network when the model is complete. Exits with 0 when it is.
    Download(Box<DownloadArgs>),
    /// Show what serving with the same options would do, and start nothing: devices, memory, tensor split, limits and the
    /// commands of all processes.
    ///
    /// Works without a network, on what is on this disk.
    Plan(Box<PlanArgs>),
    /// Show what this user's running launchers do: phase, processes, step counters, requests, restarts.
    ///
    /// Exits with 1 when none runs.
    Status(StatusArgs),
    /// Print the completions of a shell, such as `launcher completions bash > /etc/bash_completion.d/launcher`.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, to be read with `launcher man | man -l -`.
    Man,
}

/// How the state is shown.
#[derive(clap::Args, Clone, Debug)]
pub struct StatusArgs {
    /// As a JSON array, one object a launcher.
    #[arg(long)]
    pub json: bool,

    /// Where launchers are looked for.
    #[arg(long, env = "QUARTET_STATUS_DIR", hide = true)]
    pub status_dir: Option<PathBuf>,
}

/// What to download to where.
#[derive(clap::Args, Clone, Debug)]
pub struct DownloadArgs {
    /// The model, in place of `--model-id`.
    #[arg(value_name = "MODEL_ID")]
    pub model: Option<String>,

    /// The model: a repository on the Hugging Face Hub, such as `HuggingFaceTB/SmolLM2-135M-Instruct`, or one of its
    /// `.gguf` files, such as `organisation/name/file.gguf`.
    #[arg(long, env, required_unless_present = "model")]
    pub model_id: Option<String>,

    /// Commit, branch or `refs/pr/N` of the model on the Hub. Default: the repository's main branch.
    #[arg(long, env)]
    pub revision: Option<String>,

    /// Where model files are.
    #[command(flatten)]
    pub hub: hub::HubArgs,

    /// Logs.
    #[command(flatten)]
    pub log: process::LogArgs,
}

impl Args {
    /// Without options that are set to nothing: charts and compose files set `REVISION=` to mean "not set". An API key is
    /// not among them, because a server that should be closed must not stand open.
    #[must_use]
    pub fn without_empty_values(mut self) -> Self {
        let texts = [
            &mut self.model.revision,
            &mut self.model.tokenizer_config_path,
            &mut self.devices.shard_uds_path,
            &mut self.serving.ngrok_edge,
            &mut self.serving.otlp_endpoint,
            &mut self.features.lora_adapters,
        ];
        for text in texts {
            text.take_if(|text| text.trim().is_empty());
        }
        self.serving.ngrok_authtoken.take_if(|token| token.expose().is_empty());
        self.serving.cors_allow_origin.retain(|origin| !origin.is_empty());
        self
    }
}

/// How a plan is shown, and the options of serving.
#[derive(clap::Args, Clone, Debug)]
pub struct PlanArgs {
    /// As one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Which model.
    #[command(flatten, next_help_heading = "Model")]
    pub model: ModelArgs,
    /// On what it runs.
    #[command(flatten, next_help_heading = "Devices")]
    pub devices: DeviceArgs,
    /// How long and how many requests may be.
    #[command(flatten, next_help_heading = "Limits")]
    pub limits: LimitArgs,
    /// Where it is served.
    #[command(flatten, next_help_heading = "Serving")]
    pub serving: ServingArgs,
    /// What is done when a process dies.
    #[command(flatten, next_help_heading = "Recovery")]
    pub recovery: RecoveryArgs,
    /// Features that are switched on by an option.
    #[command(flatten, next_help_heading = "Features")]
    pub features: FeatureArgs,
    /// Where model files are.
    #[command(flatten, next_help_heading = "Model files")]
    pub hub: hub::HubArgs,
    /// Logs.
    #[command(flatten, next_help_heading = "Logs")]
    pub log: process::LogArgs,
    /// Variables that have no option in the manual.
    #[command(flatten)]
    pub hidden: HiddenArgs,
}

impl From<PlanArgs> for Args {
    fn from(plan: PlanArgs) -> Self {
        let PlanArgs { json: _, model, devices, limits, serving, recovery, features, hub, log, hidden } =
            plan;
        Self { command: None, model, devices, limits, serving, recovery, features, hub, log, hidden }
    }
}

/// Which model, in which precision.
#[derive(clap::Args, Clone, Debug)]
pub struct ModelArgs {
    /// The model: a repository on the Hugging Face Hub such as `HuggingFaceTB/SmolLM2-135M-Instruct`, a directory with
    /// `config.json` and weights, or the path of a `.gguf` file.
    #[arg(long, env, default_value = "bigscience/bloom-560m")]
    pub model_id: String,

    /// Commit, branch or `refs/pr/N` of the model on the Hub. Default: the repository's main branch.
    #[arg(long, env)]
    pub revision: Option<String>,

    /// Quantization of the weights. Default: what the model's `config.json` says. Available are `fp8`, which also rounds plain
    /// weights on a GPU, and `compressed-tensors` of 8-bit floats.
    #[arg(long, env, value_enum)]
    pub quantize: Option<Quantize>,

    /// Number of tokens to speculate per step. Not available yet, except 0.
    #[arg(long, env)]
    pub speculate: Option<usize>,

    /// Precision of weights and arithmetic. Default: the model's own.
    #[arg(long, env, value_enum)]
    pub dtype: Option<Dtype>,

    /// Precision of the KV cache. Default: the same as `--dtype`. The 8-bit types need a GPU.
    #[arg(long, env, value_enum)]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// Accepted for compatibility. Quartet never runs code that comes with a model.
    #[arg(long, env)]
    pub trust_remote_code: bool,

    /// How rotary positions are stretched beyond the trained context, in place of the scaling in the model's own
    /// `config.json`. Sequences may then be `--rope-factor` times as long.
    #[arg(long, env, value_enum)]
    pub rope_scaling: Option<RopeScaling>,

    /// Factor for `--rope-scaling`, from 1 up; 1 when only `--rope-scaling` is given. Alone it means linear scaling.
    #[arg(long, env)]
    pub rope_factor: Option<f32>,

    /// A `tokenizer_config.json` (with the chat template) to use in place of the model's.
    #[arg(long, env)]
    pub tokenizer_config_path: Option<String>,
}

/// On how many devices of which kind, and how they are used.
#[derive(clap::Args, Clone, Debug)]
pub struct DeviceArgs {
    /// What to run on. `auto` takes CUDA when this build has CUDA kernels and the machine has a driver and a device, else
    /// the CPU, and says which in one log line.
    #[arg(long, env = "QUARTET_DEVICE", value_enum, default_value = "auto")]
    pub device: DeviceKind,

    /// CPU threads of each shard. Default: the machine's cores divided by the number of shards.
    #[arg(long, env = "QUARTET_THREADS")]
    pub threads: Option<usize>,

    /// A request gets the same tokens whatever is computed beside it, bit for bit: on CUDA, at the cost of speed. On the CPU
    /// results alone and in a batch agree to rounding, and this is refused.
    #[arg(long, env = "QUARTET_DETERMINISTIC")]
    pub deterministic: bool,

    /// Whether the model is split over several devices: `true` (all visible ones, unless `--num-shard` says how many) or
    /// `false`. Default: what `--num-shard` says.
    #[arg(long, env)]
    pub sharded: Option<bool>,

    /// Number of shards the model is split into: one process and one device (or group of threads) each. Default: as many as
    /// CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES names; 1 without them and on the CPU.
    #[arg(long, env)]
    pub num_shard: Option<usize>,

    /// Share of each device's memory to use, above 0 and up to 1. On the CPU it scales the KV cache, which takes half of the free memory at 1.0
    #[arg(long, env, default_value = "1.0")]
    pub cuda_memory_fraction: f32,

    /// Batch sizes, comma-separated, for which a CUDA graph is captured; `0` captures none. Of no effect on the CPU.
    /// Default: sizes up to 256, each captured when it first comes up again.
    #[arg(long, env, value_delimiter = ',')]
    pub cuda_graphs: Option<Vec<usize>>,

    /// Accepted for compatibility: every kernel of Quartet is its own.
    #[arg(long, env)]
    pub disable_custom_kernels: bool,

    /// Path before the names of the shards' Unix sockets, which are `PREFIX-0`, `PREFIX-1` and so on. Default:
    /// `/tmp/text-generation-server`, or a fresh private directory when another launcher uses that.
    #[arg(long, env)]
    pub shard_uds_path: Option<String>,

    /// Address at which shards meet. On one machine they meet at a Unix socket and this is not used.
    #[arg(long, env, default_value = "localhost")]
    pub master_addr: String,

    /// Port at which shards meet. On one machine they meet at a Unix socket and this is not used.
    #[arg(long, env, default_value = "29500")]
    pub master_port: usize,
}

/// What a request may ask for and how requests are batched.
#[derive(clap::Args, Clone, Debug)]
pub struct LimitArgs {
    /// Requests in flight at once; more are answered with 429.
    #[arg(long, env, default_value = "128")]
    pub max_concurrent_requests: usize,

    /// Largest `best_of` of a request.
    #[arg(long, env, default_value = "2")]
    pub max_best_of: usize,

    /// Most stop sequences of a request.
    #[arg(long, env, default_value = "4")]
    pub max_stop_sequences: usize,

    /// Largest `top_n_tokens` of a request.
    #[arg(long, env, default_value = "5")]
    pub max_top_n_tokens: u32,

    /// Longest prompt in tokens. Default: one less than `--max-total-tokens`.
    #[arg(long, env)]
    pub max_input_tokens: Option<usize>,

    /// Old name of `--max-input-tokens`; setting both is an error.
    #[arg(long, env)]
    pub max_input_length: Option<usize>,

    /// Most tokens of one request, prompt and answer together. Default: what the model and the memory allow, measured
    /// by the shards when they warm up.
    #[arg(long, env)]
    pub max_total_tokens: Option<usize>,

    /// When a prefill pauses the running requests: waiting requests must be at least this share of the running ones.
    #[arg(long, env, default_value = "0.3")]
    pub waiting_served_ratio: f32,

    /// Most prompt tokens computed in one step. Default: 4096, or the model's context when that is shorter.
    #[arg(long, env)]
    pub max_batch_prefill_tokens: Option<u32>,

    /// Most tokens of all running requests together, for shards that do not measure what fits in memory. Quartet's do: their
    /// number wins, as with TGI, and a line of the log says so; `--cuda-memory-fraction` changes it.
    #[arg(long, env)]
    pub max_batch_total_tokens: Option<u32>,

    /// Decode steps after which waiting requests are taken in even if `--waiting-served-ratio` is not reached.
    #[arg(long, env, default_value = "20")]
    pub max_waiting_tokens: usize,

    /// Most requests in one batch. Default: no limit.
    #[arg(long, env)]
    pub max_batch_size: Option<usize>,

    /// Most prompts in one `/v1/completions` request.
    #[arg(long, env, default_value = "4")]
    pub max_client_batch_size: usize,

    /// Largest request body in bytes.
    #[arg(long, env, default_value = "2000000")]
    pub payload_limit: usize,

    /// Threads of the router that validate and tokenize requests; at least 1.
    #[arg(long, env, default_value = "2")]
    pub validation_workers: usize,
}

/// Where and to whom the model is served.
#[derive(clap::Args, Clone, Debug)]
pub struct ServingArgs {
    /// IP address to listen on. Anything that is no IP address means 0.0.0.0.
    #[arg(long, env, default_value = "0.0.0.0")]
    pub hostname: String,

    /// TCP port to listen on.
    // Upstream declares `-p` for `--prometheus-port` too; there as here it sets `--port`.
    #[arg(long, short, env, default_value = "3000")]
    pub port: u16,

    /// Accepted for compatibility: metrics are served at `/metrics` on `--port`.
    #[arg(long, env, default_value = "9000")]
    pub prometheus_port: u16,

    /// Origin that browsers may send requests from; repeat the option for several. Default: any.
    #[arg(long, env)]
    pub cors_allow_origin: Vec<String>,

    /// Key that requests must carry as `Authorization: Bearer KEY`.
    #[arg(long, env, hide_env_values = true)]
    pub api_key: Option<Redacted>,

    /// Seconds the running requests get to finish after a SIGTERM before the router is killed.
    #[arg(long, short, env, default_value = "90")]
    pub graceful_termination_timeout: u64,

    /// Serve through an ngrok tunnel too, beside `--port`; needs the next two.
    #[arg(long, env)]
    pub ngrok: bool,

    /// Token of the ngrok account, for `--ngrok`. Better set in the environment, where other users cannot read it.
    #[arg(long, env, hide_env_values = true)]
    pub ngrok_authtoken: Option<Redacted>,

    /// The ngrok edge whose visitors are served, such as `edghts_…`, for `--ngrok`.
    #[arg(long, env)]
    pub ngrok_edge: Option<String>,

    /// OpenTelemetry collector (OTLP over gRPC) that spans are sent to, such as http://localhost:4317
    #[arg(long, env)]
    pub otlp_endpoint: Option<String>,

    /// Name of this service in traces.
    #[arg(long, env, default_value = "text-generation-inference.router")]
    pub otlp_service_name: String,

    /// Accepted for compatibility: Quartet sends no usage statistics, whatever this says.
    #[arg(long, env, value_enum, default_value = "on")]
    pub usage_stats: UsageStats,

    /// Log a report of this machine and build, then go on starting.
    #[arg(long, short)]
    pub env: bool,
}

/// How often and how soon processes that die are replaced. Requests wait meanwhile, and go on where they were.
#[derive(clap::Args, Clone, Debug)]
pub struct RecoveryArgs {
    /// Deaths of shards or router, within `--restart-window`, that are answered by a restart; one more ends the service
    /// with exit code 16. With 0 the first death ends it with exit code 1, as upstream's launcher does.
    #[arg(long, env = "QUARTET_MAX_RESTARTS", default_value = "5")]
    pub max_restarts: usize,

    /// Seconds for which a death counts towards `--max-restarts`.
    #[arg(long, env = "QUARTET_RESTART_WINDOW", default_value = "600")]
    pub restart_window: u64,

    /// Seconds after which a shard that works on a step without finishing it, or does not answer, counts as dead and is
    /// killed; 0: never. Must be longer than the slowest step.
    #[arg(long, env = "QUARTET_STALL_TIMEOUT", default_value = "60")]
    pub stall_timeout: u64,
}

/// Features that are switched on or off.
#[derive(clap::Args, Clone, Debug)]
pub struct FeatureArgs {
    /// Refuse requests with a grammar.
    #[arg(long, env)]
    pub disable_grammar_support: bool,

    /// Compute log-probabilities of prompt tokens for requests that ask for them.
    #[arg(long, env)]
    pub enable_prefill_logprobs: bool,

    /// LoRA adapters, comma-separated: Hub ids or `name=path`. Not available yet.
    #[arg(long, env)]
    pub lora_adapters: Option<String>,

    /// Share of the vocabulary that a watermark favours. Not available yet.
    #[arg(long, env)]
    pub watermark_gamma: Option<f32>,

    /// Strength of a watermark. Not available yet.
    #[arg(long, env)]
    pub watermark_delta: Option<f32>,
}

/// Environment variables that children get in another form, and options for tests.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct HiddenArgs {
    /// Directory that is searched first for the programs `shard` and `router`.
    #[arg(long, env = "QUARTET_BIN_DIR", hide = true)]
    pub bin_dir: Option<PathBuf>,

    /// Where programs are searched that are not beside the launcher.
    #[arg(long, env = "PATH", hide = true)]
    pub search_path: Option<OsString>,

    /// Directory of the sockets at which launchers are asked for their state.
    #[arg(long, env = "QUARTET_STATUS_DIR", hide = true)]
    pub status_dir: Option<PathBuf>,

    /// Visible CUDA devices; counted only when the device is CUDA.
    #[arg(long, env = "CUDA_VISIBLE_DEVICES", hide = true)]
    pub cuda_visible_devices: Option<String>,

    /// Visible CUDA devices, as container runtimes spell it.
    #[arg(long, env = "NVIDIA_VISIBLE_DEVICES", hide = true)]
    pub nvidia_visible_devices: Option<String>,

    /// How CUDA numbers the devices: `PCI_BUS_ID`, or the fastest first.
    #[arg(long, env = "CUDA_DEVICE_ORDER", hide = true)]
    pub cuda_device_order: Option<String>,

    /// JSON file that describes the machine, in place of a look at it: for plans of other machines, and for tests.
    #[arg(long, env = "QUARTET_MACHINE", hide = true)]
    pub machine: Option<PathBuf>,

    /// Upstream's choice of attention kernels.
    #[arg(long, env = "ATTENTION", hide = true)]
    pub attention: Option<String>,

    /// Upstream's switch of the prefix cache.
    #[arg(long, env = "PREFIX_CACHING", hide = true)]
    pub prefix_caching: Option<String>,

    /// Name of `PREFIX_CACHING` in 2.2.1.
    #[arg(long, env = "USE_PREFIX_CACHING", hide = true)]
    pub use_prefix_caching: Option<String>,

    /// Name of `ATTENTION` in 2.2.0.
    #[arg(long, env = "FLASH_DECODING", hide = true)]
    pub flash_decoding: Option<String>,

    /// `--usage-stats off` in 2.2.0.
    #[arg(long, env, hide = true)]
    pub disable_usage_stats: bool,

    /// `--usage-stats no-stack` in 2.2.0.
    #[arg(long, env, hide = true)]
    pub disable_crash_reports: bool,

    /// Text that the router reports as the kind of machine.
    #[arg(long, env = "COMPUTE_TYPE", hide = true)]
    pub compute_type: Option<String>,

    /// Inherited setting of the Hub's transfer library.
    #[arg(long, env = "HF_HUB_ENABLE_HF_TRANSFER", hide = true)]
    pub hf_hub_enable_hf_transfer: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_is_consistent() {
        Args::command().debug_assert();
    }

    /// The options of text-generation-inference at its last version, with their environment variables.
    #[test]
    fn all_upstream_options_exist_with_their_variables() {
        let names = "model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype \
            trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens \
            max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens \
            max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr \
            master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction \
            rope-scaling rope-factor json-output otlp-endpoint otlp-service-name cors-allow-origin api-key \
            watermark-gamma watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path \
            disable-grammar-support env max-client-batch-size lora-adapters usage-stats payload-limit \
            enable-prefill-logprobs graceful-termination-timeout";
        let command = Args::command();
        let mut count = 0;
        for name in names.split_whitespace() {
            let option = command.get_arguments().find(|arg| arg.get_long() == Some(name));
            let option = option.unwrap_or_else(|| panic!("--{name} is missing"));
            let variable = option.get_env().map(|env| env.to_string_lossy().into_owned());
            let expected = (name != "env").then(|| name.replace('-', "_").to_uppercase());
            assert_eq!(variable, expected, "--{name}");
            count += 1;
        }
        assert_eq!(count, 54);
    }

    #[test]
    fn spellings_that_upstream_gave_up_are_still_understood() {
        let args = Args::parse_from([
            "launcher",
            "--disable-usage-stats",
            "--disable-crash-reports",
            "--max-input-length",
            "7",
        ]);
        assert!(args.hidden.disable_usage_stats && args.hidden.disable_crash_reports);
        assert_eq!(args.limits.max_input_length, Some(7));
    }

    #[test]
    fn values_that_are_empty_count_as_not_given_except_a_key() {
        let words =
            ["launcher", "--revision", "", "--otlp-endpoint", " ", "--ngrok-authtoken", "", "--api-key", ""];
        let args = Args::parse_from(words).without_empty_values();
        assert_eq!((args.model.revision, args.serving.otlp_endpoint), (None, None));
        assert_eq!(args.serving.ngrok_authtoken, None);
        assert!(args.serving.api_key.is_some());
    }

    #[test]
    fn a_plan_takes_every_option_of_serving() {
        let names = |command: &clap::Command| {
            let mut names: Vec<_> = command.get_arguments().map(|arg| arg.get_id().to_string()).collect();
            names.retain(|name| name != "json");
            names.sort();
            names
        };
        let command = Args::command();
        assert_eq!(names(command.find_subcommand("plan").unwrap()), names(&command));
        let parsed = Args::parse_from(["launcher", "plan", "--num-shard", "3", "--json"]);
        let Some(Command::Plan(plan)) = parsed.command else { panic!("a plan") };
        assert!(plan.json);
        assert_eq!(Args::from(*plan).devices.num_shard, Some(3));
        let mixed = Args::try_parse_from(["launcher", "--port", "1", "plan"]);
        assert_eq!(mixed.unwrap_err().exit_code(), 2);
    }

    #[test]
    fn download_takes_the_model_either_way_and_needs_one() {
        let parse = |args: &[&str]| {
            let args = Args::try_parse_from([&["launcher", "download"], args].concat())?;
            let Some(Command::Download(args)) = args.command else { panic!("no download") };
            Ok::<_, clap::Error>((args.model, args.model_id, args.revision))
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(parse(&["org/a", "--revision", "b"]).unwrap(), (text("org/a"), None, text("b")));
        assert_eq!(parse(&["--model-id", "org/a"]).unwrap(), (None, text("org/a"), None));
        assert_eq!(parse(&[]).unwrap_err().exit_code(), 2);
        // What belongs to serving is no option of a download.
        assert!(parse(&["org/a", "--port", "80"]).is_err());
        assert!(Args::try_parse_from(["launcher", "--port", "80", "download", "org/a"]).is_err());
    }

    #[test]
    fn short_p_sets_the_port() {
        assert_eq!(Args::parse_from(["launcher", "-p", "8080"]).serving.port, 8080);
    }

    #[test]
    fn unknown_options_and_bad_values_are_usage_errors() {
        for bad in
            [&["launcher", "--max-tokens", "3"][..], &["launcher", "--port", "70000"], &["launcher", "x"]]
        {
            let error = Args::try_parse_from(bad).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let args = Args::parse_from(["launcher", "--api-key", "hunter2", "--ngrok-authtoken", "hunter3"]);
        let shown = format!("{args:#?}");
        assert!(!shown.contains("hunter"));
        assert_eq!(args.serving.api_key.unwrap().expose(), "hunter2");
    }

    #[test]
    fn values_are_spelled_as_upstream() {
        assert_eq!(spelled(Quantize::BitsandbytesNf4), "bitsandbytes-nf4");
        assert_eq!(spelled(UsageStats::NoStack), "no-stack");
        assert_eq!(spelled(Dtype::BFloat16), "bfloat16");
        let args = Args::parse_from(["launcher", "--cuda-graphs", "1,2,0", "--sharded", "false"]);
        assert_eq!(args.devices.cuda_graphs, Some(vec![1, 2, 0]));
        assert_eq!(args.devices.sharded, Some(false));
    }
}
