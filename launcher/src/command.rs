//! The command lines and environments of the children, in the order text-generation-inference gives them.

use std::ffi::OsString;

use hub::RopeOverride;

use crate::args::{Args, Dtype, Redacted, UsageStats, spelled};
use crate::devices::{Device, Devices};

/// Who has it may open tunnels in its owner's name.
const NGROK_AUTHTOKEN: &str = "NGROK_AUTHTOKEN";

/// Arguments and environment of one child; the program is found elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invocation {
    /// Arguments after the program's name.
    pub args: Vec<String>,
    /// Variables set on top of the launcher's own environment.
    pub env: Vec<(&'static str, OsString)>,
    /// Variables of the launcher's environment that the child must not see.
    pub env_removed: Vec<&'static str>,
}

impl Invocation {
    fn flag(&mut self, name: &str) {
        self.args.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl ToString) {
        self.args.push(name.to_owned());
        self.args.push(value.to_string());
    }

    fn option_if_some(&mut self, name: &str, value: &Option<impl ToString>) {
        if let Some(value) = value {
            self.option(name, value.to_string());
        }
    }

    fn set(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.env.push((name, value.into()));
    }

    fn set_model_places(&mut self, hub: &hub::HubArgs) {
        if let Some(cache) = &hub.huggingface_hub_cache {
            self.set("HUGGINGFACE_HUB_CACHE", cache);
        }
        if let Some(directory) = &hub.weights_cache_override {
            self.set("WEIGHTS_CACHE_OVERRIDE", directory);
        }
    }

    fn set_if_some(&mut self, name: &'static str, value: &Option<impl ToString>) {
        if let Some(value) = value {
            self.set(name, value.to_string());
        }
    }
}

/// What all shards of one model are started with.
#[derive(Clone, Debug)]
pub struct ShardSpec {
    /// As typed: shards and launcher share the working directory.
    pub model_id: String,
    /// Number of ranks.
    pub num_shard: usize,
    /// What they run on.
    pub device: Device,
    /// `CUDA_VISIBLE_DEVICES` of each rank; empty on the CPU and where the devices are not known by name.
    pub device_ids: Vec<String>,
    args: Args,
    max_input_tokens: Option<usize>,
    rope: Option<RopeOverride>,
}

/// What a shard is told that is known only once the launcher runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRuntime {
    /// Socket path without `-RANK`.
    pub uds_prefix: String,
    /// Names this run of this launcher; the shard repeats it in its handshake.
    pub instance_id: String,
    /// Read end of a pipe whose write end only the launcher holds, as numbered in the child.
    pub lifeline_fd: Option<i32>,
    /// Level of the shards' logs, in capitals.
    pub logger_level: String,
}

impl ShardSpec {
    /// The spec for checked options.
    pub fn new(args: &Args, devices: &Devices, num_shard: usize, max_input_tokens: Option<usize>) -> Self {
        Self {
            model_id: args.model.model_id.clone(),
            num_shard,
            device: devices.device,
            device_ids: devices.visible.iter().take(num_shard).map(|device| device.id.clone()).collect(),
            args: args.clone(),
            max_input_tokens,
            rope: None,
        }
    }

    /// With a rotary scaling in place of the model's own.
    pub fn with_rope(self, rope: Option<RopeOverride>) -> Self {
        Self { rope, ..self }
    }

    /// The command of one rank.
    ///
    /// What Quartet adds travels in the environment, so that the arguments stay exactly upstream's.
    pub fn command(&self, rank: usize, runtime: &ShardRuntime) -> Invocation {
        // The level travels as an argument; a secret of the router's is none of the shards' business.
        let env_removed = vec!["LOG_LEVEL", NGROK_AUTHTOKEN];
        let mut command = Invocation { env_removed, ..Invocation::default() };
        self.add_arguments(&mut command, runtime);
        self.add_upstream_environment(&mut command, rank);
        command.set("QUARTET_DEVICE", self.device.name());
        if let Some(id) = self.device_ids.get(rank) {
            // A rank that sees no other device cannot take memory of one, whatever a library does.
            command.set("CUDA_VISIBLE_DEVICES", id);
            command.set("QUARTET_CUDA_ORDINAL", "0");
        }
        command.set("QUARTET_INSTANCE_ID", runtime.instance_id.as_str());
        command.set_if_some("QUARTET_LIFELINE_FD", &runtime.lifeline_fd);
        command.set_if_some("QUARTET_THREADS", &self.args.devices.threads);
        if self.args.devices.deterministic {
            command.set("QUARTET_DETERMINISTIC", "true");
        }
        command
    }

    fn add_arguments(&self, command: &mut Invocation, runtime: &ShardRuntime) {
        let model = &self.args.model;
        command.flag("serve");
        command.flag(&self.model_id);
        command.option("--uds-path", &runtime.uds_prefix);
        command.option("--logger-level", &runtime.logger_level);
        command.flag("--json-output");
        if model.trust_remote_code {
            command.flag("--trust-remote-code");
        }
        if self.num_shard > 1 {
            command.flag("--sharded");
        }
        command.option_if_some("--quantize", &model.quantize.map(spelled));
        command.option_if_some("--dtype", &model.dtype.map(|dtype: Dtype| spelled(dtype)));
        command.option_if_some("--kv-cache-dtype", &model.kv_cache_dtype.map(spelled));
        command.option_if_some("--revision", &model.revision);
        command.option_if_some("--otlp-endpoint", &self.args.serving.otlp_endpoint);
        command.option("--otlp-service-name", &self.args.serving.otlp_service_name);
        command.option_if_some("--max-input-tokens", &self.max_input_tokens);
    }

    fn add_upstream_environment(&self, command: &mut Invocation, rank: usize) {
        let (devices, limits, features, hub) =
            (&self.args.devices, &self.args.limits, &self.args.features, &self.args.hub);
        command.set("RANK", rank.to_string());
        command.set("WORLD_SIZE", self.num_shard.to_string());
        command.set("MASTER_ADDR", devices.master_addr.as_str());
        command.set("MASTER_PORT", devices.master_port.to_string());
        command.set("TORCH_NCCL_AVOID_RECORD_STREAMS", "1");
        command.set("CUDA_MEMORY_FRACTION", devices.cuda_memory_fraction.to_string());
        command.set("SAFETENSORS_FAST_GPU", "1");
        command.set("HF_HUB_DISABLE_PROGRESS_BARS", "1");
        command.set(
            "HF_HUB_ENABLE_HF_TRANSFER",
            self.args.hidden.hf_hub_enable_hf_transfer.as_deref().unwrap_or("1"),
        );
        command.set_if_some("HF_TOKEN", &hub.hf_api_token.as_ref().map(hub::Secret::reveal));
        if let Some(rope) = self.rope {
            command.set("ROPE_SCALING", rope.kind.name());
            command.set("ROPE_FACTOR", rope.factor.to_string());
        }
        command.set_if_some("MAX_TOTAL_TOKENS", &limits.max_total_tokens);
        command.set_if_some("MAX_BATCH_SIZE", &limits.max_batch_size);
        if features.enable_prefill_logprobs {
            command.set("REQUEST_LOGPROBS", "1");
        }
        command.set_model_places(hub);
        if let Some(sizes) = &devices.cuda_graphs {
            // A zero among others says nothing; alone it says "none".
            let sizes: Vec<_> = sizes.iter().filter(|&&size| size > 0).map(usize::to_string).collect();
            command.set("CUDA_GRAPHS", if sizes.is_empty() { "0".to_owned() } else { sizes.join(",") });
        }
        if devices.disable_custom_kernels {
            command.set("DISABLE_CUSTOM_KERNELS", "True");
        }
        // The only attention there is, and no prefix cache yet: children must not believe anything else.
        command.set("ATTENTION", "paged");
        command.set("PREFIX_CACHING", "0");
    }
}

/// What the router is started with.
#[derive(Clone, Debug)]
pub struct RouterSpec {
    args: Args,
    max_input_tokens: Option<usize>,
    max_batch_prefill_tokens: u32,
}

impl RouterSpec {
    /// The spec for checked options.
    pub fn new(args: &Args, max_input_tokens: Option<usize>, max_batch_prefill_tokens: u32) -> Self {
        Self { args: args.clone(), max_input_tokens, max_batch_prefill_tokens }
    }

    /// The most prompt tokens of one step.
    pub fn max_batch_prefill_tokens(&self) -> u32 {
        self.max_batch_prefill_tokens
    }

    /// The router's command; the shards' sockets are `UDS_PREFIX-RANK`.
    pub fn command(&self, uds_prefix: &str) -> Invocation {
        let mut command = Invocation::default();
        self.add_required(&mut command, uds_prefix);
        self.add_optional(&mut command);
        let hub = &self.args.hub;
        command.set_if_some("HF_TOKEN", &hub.hf_api_token.as_ref().map(hub::Secret::reveal));
        // Upstream's router fetches its own copy of the tokenizer; ours reads the files that the shards read.
        command.set_model_places(hub);
        command.set_if_some("COMPUTE_TYPE", &self.args.hidden.compute_type);
        // What the supervisor mends by itself must not make somebody else restart all of it.
        let liveness_timeout = self.args.recovery.stall_timeout.saturating_mul(2);
        command.set("QUARTET_LIVENESS_TIMEOUT", liveness_timeout.to_string());
        command
    }

    fn add_required(&self, command: &mut Invocation, uds_prefix: &str) {
        let (limits, serving) = (&self.args.limits, &self.args.serving);
        command.option("--max-client-batch-size", limits.max_client_batch_size);
        command.option("--max-concurrent-requests", limits.max_concurrent_requests);
        command.option("--max-best-of", limits.max_best_of);
        command.option("--max-stop-sequences", limits.max_stop_sequences);
        command.option("--max-top-n-tokens", limits.max_top_n_tokens);
        command.option("--max-batch-prefill-tokens", self.max_batch_prefill_tokens);
        command.option("--waiting-served-ratio", limits.waiting_served_ratio);
        command.option("--max-waiting-tokens", limits.max_waiting_tokens);
        command.option("--validation-workers", limits.validation_workers);
        command.option("--hostname", &serving.hostname);
        command.option("--port", serving.port);
        command.option("--prometheus-port", serving.prometheus_port);
        command.option("--master-shard-uds-path", format!("{uds_prefix}-0"));
        command.option("--tokenizer-name", &self.args.model.model_id);
        command.option("--payload-limit", limits.payload_limit);
    }

    fn add_optional(&self, command: &mut Invocation) {
        let (model, limits, serving) = (&self.args.model, &self.args.limits, &self.args.serving);
        command.option_if_some("--max-input-tokens", &self.max_input_tokens);
        command.option_if_some("--max-total-tokens", &limits.max_total_tokens);
        command.option("--usage-stats", spelled::<UsageStats>(serving.usage_stats));
        if self.args.features.disable_grammar_support {
            command.flag("--disable-grammar-support");
        }
        command.option_if_some("--tokenizer-config-path", &model.tokenizer_config_path);
        command.option_if_some("--max-batch-total-tokens", &limits.max_batch_total_tokens);
        command.option_if_some("--max-batch-size", &limits.max_batch_size);
        command.option_if_some("--revision", &model.revision);
        if model.trust_remote_code {
            command.flag("--trust-remote-code");
        }
        if self.args.log.json_output {
            command.flag("--json-output");
        }
        command.option_if_some("--otlp-endpoint", &serving.otlp_endpoint);
        command.option("--otlp-service-name", &serving.otlp_service_name);
        for origin in &serving.cors_allow_origin {
            command.option("--cors-allow-origin", origin);
        }
        command.option_if_some("--api-key", &serving.api_key.as_ref().map(Redacted::expose));
        if serving.ngrok {
            command.flag("--ngrok");
            command.option_if_some("--ngrok-edge", &serving.ngrok_edge);
            // Upstream gives it as an argument, which everybody on the machine can read.
            command.set_if_some(NGROK_AUTHTOKEN, &serving.ngrok_authtoken.as_ref().map(Redacted::expose));
        } else {
            command.env_removed.extend([NGROK_AUTHTOKEN, "NGROK_EDGE"]);
        }
    }
}
