//! What was typed: the command line and environment of text-generation-inference's shard, and what Quartet adds.
//!
//! What it means is decided in `settings`. Values of the environment are text here, so that a wrong one is reported
//! together with all other mistakes.

use clap::{Args as ClapArgs, Parser, Subcommand};
use hub::HubArgs;

/// One rank of a model: it owns a device and answers calls over a Unix socket.
#[derive(Parser, Debug, Clone)]
#[command(name = "shard", version)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug, Clone)]
pub enum Command {
    /// Load a model and serve it over a Unix socket
    Serve(Box<ServeArgs>),
    /// Download the weights of a model, if they are not on this disk yet
    DownloadWeights(Box<DownloadArgs>),
    /// Print what serving with the same options would take of each rank's memory, as JSON; loads nothing
    Footprint(Box<FootprintArgs>),
    /// Print the GPU architectures this program has kernels for, one a line; none: it runs on the CPU only
    Architectures,
}

/// How to log.
#[derive(ClapArgs, Debug, Clone)]
pub struct ShardLogArgs {
    /// TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL
    #[arg(long, default_value = "INFO")]
    pub logger_level: String,

    /// Log JSON lines, as the launcher reads them
    #[arg(long)]
    pub json_output: bool,
}

/// Options of `serve`.
#[derive(ClapArgs, Debug, Clone)]
pub struct ServeArgs {
    /// Hub id, directory, or path of a .gguf file
    pub model_id: String,

    /// Path of the socket, without the rank that is appended as `-RANK`
    #[arg(long, default_value = "/tmp/text-generation-server")]
    pub uds_path: String,

    /// This is one of several ranks: RANK and WORLD_SIZE are set
    #[arg(long)]
    pub sharded: bool,

    /// Branch, tag or commit on the Hub
    #[arg(long)]
    pub revision: Option<String>,

    /// Type of the weights: float16, bfloat16 or float32; what suits the device when not given
    #[arg(long)]
    pub dtype: Option<String>,

    /// Form of the weights: fp8 (those of the model, or rounded while they are loaded) or compressed-tensors (those of the model);
    /// what the model's configuration says when not given
    #[arg(long)]
    pub quantize: Option<String>,

    /// Type of the KV cache: fp8_e4m3fn or fp8_e5m2 on a GPU; what suits the weights when not given
    #[arg(long)]
    pub kv_cache_dtype: Option<String>,

    /// Longest prompt, when the router does not say
    #[arg(long)]
    pub max_input_tokens: Option<usize>,

    /// Accepted; models never run code
    #[arg(long)]
    pub trust_remote_code: bool,

    /// OpenTelemetry collector (OTLP over gRPC) to send spans to, such as http://localhost:4317
    #[arg(long)]
    pub otlp_endpoint: Option<String>,

    /// Name of this service in traces
    #[arg(long, default_value = "text-generation-inference.server")]
    pub otlp_service_name: String,

    /// How to log.
    #[command(flatten)]
    pub log: ShardLogArgs,

    /// What Quartet adds.
    #[command(flatten)]
    pub quartet: QuartetArgs,

    /// Which rank this is.
    #[command(flatten)]
    pub group: GroupArgs,

    /// Limits.
    #[command(flatten)]
    pub limits: LimitArgs,

    /// Rotary scaling.
    #[command(flatten)]
    pub rope: RopeArgs,

    /// What is refused when it asks for something.
    #[command(flatten)]
    pub refused: RefusedArgs,

    /// Where models are.
    #[command(flatten)]
    pub hub: HubArgs,
}

/// Options of `footprint`.
#[derive(ClapArgs, Debug, Clone)]
pub struct FootprintArgs {
    /// Free bytes of each rank's device, separated by commas; one number is shared by all ranks
    #[arg(long, value_delimiter = ',')]
    pub free_bytes: Vec<usize>,

    /// Most prompt tokens of one step
    #[arg(long, default_value = "4096")]
    pub max_prefill_tokens: usize,

    /// The options of serving.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What Quartet's launcher tells its shards beyond text-generation-inference's options.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct QuartetArgs {
    /// cpu, cuda or auto
    #[arg(long, env = "QUARTET_DEVICE", hide_env = true)]
    pub device: Option<String>,

    /// Repeated in the handshake, so that a launcher knows its own shards
    #[arg(long, env = "QUARTET_INSTANCE_ID", hide_env = true)]
    pub instance_id: Option<String>,

    /// CPU threads of this rank; cores divided by ranks when not given
    #[arg(long, env = "QUARTET_THREADS", hide_env = true)]
    pub threads: Option<String>,

    /// Number of this rank's GPU among those it sees; its rank when not given
    #[arg(long, env = "QUARTET_CUDA_ORDINAL", hide_env = true)]
    pub cuda_ordinal: Option<String>,

    /// The same bits for a request whatever else is computed beside it, at the cost of speed; on CUDA
    #[arg(long, env = "QUARTET_DETERMINISTIC", hide_env = true)]
    pub deterministic: bool,

    /// Number of an open pipe whose end tells that the launcher is gone
    #[arg(long, env = "QUARTET_LIFELINE_FD", hide_env = true)]
    pub lifeline_fd: Option<String>,
}

/// Which rank this is. Environment only.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct GroupArgs {
    /// This rank.
    #[arg(long, env = "RANK", hide = true)]
    pub rank: Option<String>,

    /// Number of ranks.
    #[arg(long, env = "WORLD_SIZE", hide = true)]
    pub world_size: Option<String>,

    /// Accepted: ranks meet over a Unix socket.
    #[arg(long, env = "MASTER_ADDR", hide = true)]
    pub master_addr: Option<String>,

    /// Accepted: ranks meet over a Unix socket.
    #[arg(long, env = "MASTER_PORT", hide = true)]
    pub master_port: Option<String>,
}

/// Limits. Environment only.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct LimitArgs {
    /// Longest prompt and answer, when the router does not say.
    #[arg(long, env = "MAX_TOTAL_TOKENS", hide = true)]
    pub max_total_tokens: Option<String>,

    /// Accepted: any number of requests is run.
    #[arg(long, env = "MAX_BATCH_SIZE", hide = true)]
    pub max_batch_size: Option<String>,

    /// Share of the free memory for the KV cache.
    #[arg(long, env = "CUDA_MEMORY_FRACTION", hide = true)]
    pub cuda_memory_fraction: Option<String>,

    /// Batch sizes whose decode steps are recorded as CUDA graphs.
    #[arg(long, env = "CUDA_GRAPHS", hide = true)]
    pub cuda_graphs: Option<String>,

    /// `1` or `true`: prompts may be asked for their log-probabilities.
    #[arg(long, env = "REQUEST_LOGPROBS", hide = true)]
    pub request_logprobs: Option<String>,
}

/// Rotary scaling in place of the model's own. Environment only.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct RopeArgs {
    /// `linear` or `dynamic`.
    #[arg(long, env = "ROPE_SCALING", hide = true)]
    pub rope_scaling: Option<String>,

    /// How many times the context.
    #[arg(long, env = "ROPE_FACTOR", hide = true)]
    pub rope_factor: Option<String>,
}

/// What is not supported: refused rather than ignored.
#[derive(ClapArgs, Debug, Clone, Default)]
pub struct RefusedArgs {
    /// Number of speculated tokens
    #[arg(long)]
    pub speculate: Option<usize>,

    /// Adapters to load.
    #[arg(long, env = "LORA_ADAPTERS", hide = true)]
    pub lora_adapters: Option<String>,
}

/// Options of `download-weights`.
#[derive(ClapArgs, Debug, Clone)]
pub struct DownloadArgs {
    /// Hub id, directory, or path of a .gguf file
    pub model_id: String,

    /// Branch, tag or commit on the Hub
    #[arg(long)]
    pub revision: Option<String>,

    /// Kind of weight files
    #[arg(long, default_value = ".safetensors")]
    pub extension: String,

    /// Accepted: only complete models are downloaded, there is nothing to merge
    #[arg(long)]
    pub merge_lora: bool,

    /// Accepted; models never run code
    #[arg(long)]
    pub trust_remote_code: bool,

    /// How to log.
    #[command(flatten)]
    pub log: ShardLogArgs,

    /// Where models are.
    #[command(flatten)]
    pub hub: HubArgs,
}

impl Args {
    /// The logging options, whatever the command.
    pub fn log(&self) -> ShardLogArgs {
        match &self.command {
            Command::Serve(serve) => serve.log.clone(),
            Command::DownloadWeights(download) => download.log.clone(),
            // Their standard output is read by programs.
            Command::Footprint(_) | Command::Architectures => {
                ShardLogArgs { logger_level: "OFF".to_owned(), json_output: false }
            }
        }
    }
}
