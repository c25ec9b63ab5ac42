//! The command line and its environment twins: text-generation-inference's router flags by their names.
//!
//! What they mean together is decided in [`crate::config`].

use clap::{Parser, ValueEnum};

/// Quartet's router: HTTP, validation, the queue and the batches
#[derive(Clone, Debug, Parser)]
#[command(author, version, about, long_about = None)]
pub struct Args {
    /// Sequences in flight; further requests are answered with 429
    #[arg(default_value = "128", long, env)]
    pub max_concurrent_requests: usize,

    /// Largest `best_of`
    #[arg(default_value = "2", long, env)]
    pub max_best_of: usize,

    /// Most stop texts of a request
    #[arg(default_value = "4", long, env)]
    pub max_stop_sequences: usize,

    /// Largest `top_n_tokens`
    #[arg(default_value = "5", long, env)]
    pub max_top_n_tokens: u32,

    /// Most prompt tokens of a request; default: what the shards answer
    #[arg(long, env)]
    pub max_input_tokens: Option<usize>,

    /// Most tokens of a request, prompt and answer; default: what the shards answer
    #[arg(long, env)]
    pub max_total_tokens: Option<usize>,

    /// Without prefill chunking: prompts interrupt the running batch once this fraction of its size waits
    #[arg(default_value = "1.2", long, env)]
    pub waiting_served_ratio: f32,

    /// Most prompt tokens computed in one step
    #[arg(default_value = "4096", long, env)]
    pub max_batch_prefill_tokens: u32,

    /// Most tokens of all running requests, for shards that do not measure it; the number that shards measure wins
    #[arg(long, env)]
    pub max_batch_total_tokens: Option<u32>,

    /// Without prefill chunking: prompts interrupt the running batch after this many steps, however few wait
    #[arg(default_value = "20", long, env)]
    pub max_waiting_tokens: usize,

    /// Most requests in the running batch
    #[arg(long, env)]
    pub max_batch_size: Option<usize>,

    /// Address to listen on; anything that is no IP address, such as a pod's name, means 0.0.0.0
    #[arg(default_value = "0.0.0.0", long, env)]
    pub hostname: String,

    /// Port to listen on
    #[arg(default_value = "3000", long, short, env)]
    pub port: u16,

    /// Accepted; the metrics are at `/metrics` of the main port, as upstream's are
    #[arg(default_value = "9000", long, env)]
    pub prometheus_port: u16,

    /// Unix socket of the master shard
    #[arg(default_value = "/tmp/text-generation-server-0", long, env)]
    pub master_shard_uds_path: String,

    /// The model whose tokenizer and chat template to use: a directory, a .gguf file, or a Hub id in the local cache
    #[arg(default_value = "bigscience/bloom", long, env)]
    pub tokenizer_name: String,

    /// A `tokenizer_config.json` to use instead of the model's, for its chat template and special tokens
    #[arg(long, env)]
    pub tokenizer_config_path: Option<String>,

    /// The model's revision on the Hub
    #[arg(long, env)]
    pub revision: Option<String>,

    /// Accepted; no code that comes with a model is ever run
    #[arg(default_value = "false", long, env)]
    pub trust_remote_code: bool,

    /// Tokenizer threads
    #[arg(default_value = "2", long, env)]
    pub validation_workers: usize,

    /// Clients must send it as `authorization: Bearer KEY`
    #[arg(long, env, hide_env_values = true)]
    pub api_key: Option<String>,

    /// OpenTelemetry collector (OTLP over gRPC) to send spans to, such as http://localhost:4317
    #[arg(long, env)]
    pub otlp_endpoint: Option<String>,

    /// Name of this service in traces
    #[arg(default_value = "text-generation-inference.router", long, env)]
    pub otlp_service_name: String,

    /// Origins that browsers may come from; default: any
    #[arg(long, env)]
    pub cors_allow_origin: Option<Vec<String>>,

    /// Serve through an ngrok tunnel too
    #[arg(long, env)]
    pub ngrok: bool,

    /// Token of the ngrok account, for `--ngrok`
    #[arg(long, env, hide_env_values = true)]
    pub ngrok_authtoken: Option<String>,

    /// The ngrok edge whose visitors are served, for `--ngrok`
    #[arg(long, env)]
    pub ngrok_edge: Option<String>,

    /// HOST:PORT of ngrok's ingress, where it is not the public one
    #[arg(long, env, hide = true)]
    pub ngrok_server_addr: Option<String>,

    /// PEM file of the authority that certifies ngrok's ingress, or `host` for those of the machine; default: ngrok's own
    #[arg(long, env, hide = true)]
    pub ngrok_root_cas: Option<String>,

    /// Refuse requests with a grammar
    #[arg(long, env, default_value_t = false)]
    pub disable_grammar_support: bool,

    /// Most prompts of one completions request
    #[arg(default_value = "4", long, env)]
    pub max_client_batch_size: usize,

    /// Accepted; Quartet sends no usage statistics
    #[arg(default_value = "on", long, env, value_enum)]
    pub usage_stats: UsageStats,

    /// Most bytes of a request body
    #[arg(default_value = "2000000", long, env)]
    pub payload_limit: usize,

    /// Most bytes of an image in a request
    #[arg(default_value = "1073741824", long, env)]
    pub max_image_fetch_size: usize,

    /// Wait for the end of the standard input before going to the shards, so that the tokenizer is read while they start
    #[arg(long, env = "QUARTET_HOLD_UNTIL_INPUT_ENDS", hide = true)]
    pub hold_until_input_ends: bool,

    /// Seconds that shards with work may stand still before `/live` answers 503; 0: for ever. The launcher sets twice its
    /// --stall-timeout, so that it acts first
    #[arg(default_value = "120", long, env = "QUARTET_LIVENESS_TIMEOUT")]
    pub liveness_timeout: u64,

    /// Value of the `x-compute-type` header
    #[arg(default_value = "gpu+optimized", long, env, hide = true)]
    pub compute_type: String,

    /// Where models are.
    #[command(flatten)]
    pub hub: hub::HubArgs,

    /// How to log.
    #[command(flatten)]
    pub log: process::LogArgs,
}

/// Upstream's levels of usage statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UsageStats {
    /// Send them.
    On,
    /// Send them without error texts.
    NoStack,
    /// Send none.
    Off,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_upstream_flag_is_known_with_its_default() {
        let args = Args::parse_from(["router"]);
        assert_eq!((args.max_concurrent_requests, args.max_best_of, args.port), (128, 2, 3000));
        assert_eq!((args.payload_limit, args.waiting_served_ratio), (2_000_000, 1.2));
        let command = Args::command();
        for flag in [
            "max-concurrent-requests",
            "max-best-of",
            "max-stop-sequences",
            "max-top-n-tokens",
            "max-input-tokens",
            "max-total-tokens",
            "waiting-served-ratio",
            "max-batch-prefill-tokens",
            "max-batch-total-tokens",
            "max-waiting-tokens",
            "max-batch-size",
            "hostname",
            "port",
            "prometheus-port",
            "master-shard-uds-path",
            "tokenizer-name",
            "tokenizer-config-path",
            "revision",
            "trust-remote-code",
            "validation-workers",
            "api-key",
            "json-output",
            "otlp-endpoint",
            "otlp-service-name",
            "cors-allow-origin",
            "ngrok",
            "ngrok-authtoken",
            "ngrok-edge",
            "disable-grammar-support",
            "max-client-batch-size",
            "usage-stats",
            "payload-limit",
            "max-image-fetch-size",
        ] {
            let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag));
            let environment = argument.unwrap_or_else(|| panic!("--{flag}")).get_env().unwrap();
            assert_eq!(environment.to_str().unwrap(), flag.to_uppercase().replace('-', "_"));
        }
    }

    #[test]
    fn the_launchers_command_line_parses() {
        let args = Args::parse_from([
            "router",
            "--max-client-batch-size",
            "4",
            "--hostname",
            "0.0.0.0",
            "--port",
            "3000",
            "--prometheus-port",
            "9000",
            "--master-shard-uds-path",
            "/tmp/x-0",
            "--tokenizer-name",
            "m",
            "--payload-limit",
            "2000000",
            "--usage-stats",
            "no-stack",
            "--disable-grammar-support",
            "--json-output",
            "--otlp-service-name",
            "s",
            "--cors-allow-origin",
            "http://a",
            "--cors-allow-origin",
            "http://b",
            "--api-key",
            "k",
        ]);
        assert_eq!(args.usage_stats, UsageStats::NoStack);
        assert_eq!(args.cors_allow_origin.unwrap().len(), 2);
    }
}
