//! What the options mean together: a pure function from what was typed, the model and the devices to a plan, or to every
//! mistake at once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hub::{ModelConfig, RopeKind, RopeOverride};
use process::OtlpEndpoint;

use crate::args::{Args, Quantize, RopeScaling, spelled};
use crate::budget;
use crate::command::{RouterSpec, ShardSpec};
use crate::devices::{Device, Devices, num_shard};
use crate::error::LauncherError;

/// Everything that is decided before the first process starts.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// The shards' command, but for what is known only at run time.
    pub shard: ShardSpec,
    /// The router's command, likewise.
    pub router: RouterSpec,
    /// Where the router will listen.
    pub bind: SocketAddr,
    /// The socket prefix the user asked for.
    pub uds_prefix: Option<String>,
    /// Requests in flight at once.
    pub max_concurrent_requests: usize,
    /// CPU threads of each shard, where given.
    pub threads: Option<usize>,
    /// How long running requests may take to finish when the service is asked to stop.
    pub graceful_timeout: Duration,
    /// One log line each: options that were taken but change nothing, and choices the user did not make.
    pub notices: Vec<String>,
}

/// Decides everything, or tells every mistake.
///
/// `config` is `None` before the model is on this disk; the plan is made again when it is, because limits depend on it.
///
/// # Errors
/// All contradictions, all options that this build cannot honour, all values out of range.
pub fn plan(
    args: &Args,
    config: Option<&ModelConfig>,
    devices: &Devices,
) -> Result<LaunchPlan, Vec<LauncherError>> {
    let mut mistakes = contradictions(args);
    mistakes.extend(out_of_range(args));
    mistakes.extend(not_available(args).into_iter().map(LauncherError::ArgumentValidation));
    let num_shard = num_shard(args, devices).unwrap_or_else(|mistake| {
        mistakes.push(mistake);
        1
    });
    let rope = rope_scaling(args).unwrap_or_else(|mistake| {
        mistakes.push(LauncherError::ArgumentValidation(mistake));
        None
    });
    if num_shard > 1 && args.model.quantize == Some(Quantize::Exl2) {
        let mistake = "Sharding is currently not supported with `exl2` quantization; use --num-shard 1";
        mistakes.push(LauncherError::ArgumentValidation(mistake.to_owned()));
    }
    mistakes.extend(too_many_shards(num_shard, config).map(LauncherError::ArgumentValidation));
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    let rescaled = config.zip(rope).map(|(config, rope)| config.with_rope_scaling(&rope));
    let config = rescaled.as_ref().or(config);
    let max_input_tokens = args.limits.max_input_tokens.or(args.limits.max_input_length);
    let max_batch_prefill_tokens =
        args.limits.max_batch_prefill_tokens.unwrap_or_else(|| budget::max_batch_prefill_tokens(config));
    Ok(LaunchPlan {
        shard: ShardSpec::new(args, devices, num_shard, max_input_tokens).with_rope(rope),
        router: RouterSpec::new(args, max_input_tokens, max_batch_prefill_tokens),
        bind: SocketAddr::new(listening_ip(&args.serving.hostname), args.serving.port),
        uds_prefix: args.devices.shard_uds_path.clone(),
        max_concurrent_requests: args.limits.max_concurrent_requests,
        threads: args.devices.threads,
        graceful_timeout: Duration::from_secs(args.serving.graceful_termination_timeout),
        notices: notices(args, devices, num_shard, max_batch_prefill_tokens),
    })
}

/// The address that the router makes of `--hostname`: containers have their own name in HOSTNAME, which must not fail.
fn listening_ip(hostname: &str) -> IpAddr {
    let other = if hostname == "localhost" { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    hostname.parse().unwrap_or(IpAddr::V4(other))
}

/// The rotary scaling in place of the model's own; its factor in the short spelling of 32 bits.
fn rope_scaling(args: &Args) -> Result<Option<RopeOverride>, String> {
    let kind = args.model.rope_scaling.map(|scaling| match scaling {
        RopeScaling::Linear => RopeKind::Linear,
        RopeScaling::Dynamic => RopeKind::Dynamic,
    });
    let factor = args.model.rope_factor.map(|factor| factor.to_string().parse().unwrap_or(f64::NAN));
    RopeOverride::new(kind, factor)
}

/// Options that exclude each other. The texts begin as upstream's.
fn contradictions(args: &Args) -> Vec<LauncherError> {
    let limits = &args.limits;
    let mut found = Vec::new();
    if let (Some(tokens), Some(length)) = (limits.max_input_tokens, limits.max_input_length) {
        found.push(format!(
            "Both `max_input_tokens` ({tokens}) and `max_input_length` ({length}) are set. Please define only \
             `max_input_tokens` as `max_input_length` is deprecated"
        ));
    }
    if let (Some(input), Some(total)) =
        (limits.max_input_tokens.or(limits.max_input_length), limits.max_total_tokens)
        && input >= total
    {
        found.push(format!(
            "`max_input_tokens` must be < `max_total_tokens`. Given: {input} and {total}; lower --max-input-tokens or \
             raise --max-total-tokens"
        ));
    }
    if let (Some(total), Some(batch_total)) = (limits.max_total_tokens, limits.max_batch_total_tokens)
        && total > batch_total as usize
    {
        found.push(format!(
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch_total}; lower \
             --max-total-tokens or raise --max-batch-total-tokens"
        ));
    }
    if args.serving.ngrok {
        for (option, is_set) in [
            ("ngrok-authtoken", args.serving.ngrok_authtoken.is_some()),
            ("ngrok-edge", args.serving.ngrok_edge.is_some()),
        ] {
            if !is_set {
                found.push(format!("`{option}` must be set when using ngrok tunneling; add --{option}"));
            }
        }
    }
    found.extend(lora_adapters(args));
    found.into_iter().map(LauncherError::ArgumentValidation).collect()
}

/// Adapters whose spelling means nothing: `ID`, `ID@REVISION`, `NAME=PATH` and `NAME=PATH@REVISION` are understood.
fn lora_adapters(args: &Args) -> impl Iterator<Item = String> {
    let entries = args.features.lora_adapters.as_deref().unwrap_or_default().split(',').map(str::trim);
    entries
        .filter(|entry| entry.matches('@').count() > 1)
        .map(|entry| format!("--lora-adapters has `{entry}`: expected one `@` at most, as in ID@REVISION"))
}

/// Single values that no deployment can mean.
fn out_of_range(args: &Args) -> Vec<LauncherError> {
    let mut found = Vec::new();
    if args.limits.validation_workers == 0 {
        found.push("`validation_workers` must be > 0; set --validation-workers to 1 or more".to_owned());
    }
    if args.limits.max_batch_prefill_tokens == Some(0) {
        found.push("--max-batch-prefill-tokens 0: expected 1 or more".to_owned());
    }
    if args.limits.max_batch_size == Some(0) {
        found.push("--max-batch-size 0: expected 1 or more".to_owned());
    }
    if args.limits.max_concurrent_requests == 0 {
        found.push("--max-concurrent-requests 0: expected 1 or more".to_owned());
    }
    if args.limits.max_best_of == 0 {
        found.push("--max-best-of 0: expected 1 or more".to_owned());
    }
    if args.limits.max_client_batch_size == 0 {
        found.push("--max-client-batch-size 0: expected 1 or more".to_owned());
    }
    if args.limits.max_input_tokens.or(args.limits.max_input_length) == Some(0) {
        found.push("--max-input-tokens 0: expected 1 or more".to_owned());
    }
    let ratio = args.limits.waiting_served_ratio;
    if !(ratio >= 0.0 && ratio.is_finite()) {
        found.push(format!("--waiting-served-ratio {ratio}: expected a number from 0 up"));
    }
    if args.serving.api_key.as_ref().is_some_and(|key| key.expose().is_empty()) {
        found.push(
            "--api-key is empty: expected a key; leave it out for a server that is open to all".to_owned(),
        );
    }
    if args.devices.threads == Some(0) {
        found.push("--threads 0: expected 1 or more".to_owned());
    }
    let fraction = args.devices.cuda_memory_fraction;
    if !(fraction > 0.0 && fraction <= 1.0) {
        found.push(format!("--cuda-memory-fraction {fraction}: expected a number above 0 and up to 1"));
    }
    found.extend(
        args.serving.otlp_endpoint.as_deref().and_then(|endpoint| OtlpEndpoint::parse(endpoint).err()),
    );
    if args.serving.port == 0 {
        found.push("--port 0: expected a port from 1 to 65535".to_owned());
    }
    if args.model.model_id.is_empty() {
        found.push(
            "--model-id is empty: expected a Hub id, a directory or the path of a .gguf file".to_owned(),
        );
    }
    found.into_iter().map(LauncherError::ArgumentValidation).collect()
}

/// Options that would have to change something and cannot: refused, never ignored.
fn not_available(args: &Args) -> Vec<String> {
    let (model, features) = (&args.model, &args.features);
    let mut found = Vec::new();
    let mut refuse =
        |option: String, remedy: &str| found.push(format!("{option} is not available yet; {remedy}"));
    if let Some(quantize) =
        model.quantize.filter(|quantize| !matches!(quantize, Quantize::Fp8 | Quantize::CompressedTensors))
    {
        refuse(
            format!("--quantize {}", spelled(quantize)),
            "leave it out, or serve a GGUF file for smaller weights",
        );
    }
    if let Some(tokens) = model.speculate.filter(|&tokens| tokens > 0) {
        refuse(format!("--speculate {tokens}"), "leave it out or set it to 0");
    }
    if features.lora_adapters.as_deref().is_some_and(|adapters| !adapters.trim().is_empty()) {
        refuse("--lora-adapters".to_owned(), "leave it out, or serve a model that has the adapter merged in");
    }
    for (option, value) in
        [("--watermark-gamma", features.watermark_gamma), ("--watermark-delta", features.watermark_delta)]
    {
        if let Some(value) = value {
            refuse(format!("{option} {value}"), "leave it out");
        }
    }
    found
}

/// A rank without an attention head would have nothing to compute.
fn too_many_shards(num_shard: usize, config: Option<&ModelConfig>) -> Option<String> {
    let heads = config?.num_attention_heads().ok().flatten()?;
    (num_shard > heads).then(|| {
        format!(
            "--num-shard {num_shard}: the model has {heads} attention heads; expected at most {heads} shards"
        )
    })
}

/// Lines for the log about what was taken or chosen silently.
fn notices(args: &Args, devices: &Devices, num_shard: usize, prefill_tokens: u32) -> Vec<String> {
    let (model, hidden) = (&args.model, &args.hidden);
    let mut lines: Vec<String> = devices.why.clone().into_iter().collect();
    let mut say = |applies: bool, line: &str| lines.extend(applies.then(|| line.to_owned()));
    say(
        model.trust_remote_code,
        "--trust-remote-code changes nothing: no code that comes with a model is ever run",
    );
    say(
        args.devices.disable_custom_kernels,
        "--disable-custom-kernels changes nothing: there are no other kernels to fall back to",
    );
    say(
        !args.serving.ngrok && (args.serving.ngrok_authtoken.is_some() || args.serving.ngrok_edge.is_some()),
        "--ngrok-authtoken and --ngrok-edge change nothing without --ngrok",
    );
    if devices.device == Device::Cpu {
        say(args.devices.cuda_graphs.is_some(), "--cuda-graphs changes nothing on the CPU");
    }
    say(
        hidden.attention.as_deref().is_some_and(|attention| attention != "paged")
            || hidden.flash_decoding.is_some(),
        "ATTENTION (once FLASH_DECODING) changes nothing: attention is always paged",
    );
    say(
        [&hidden.prefix_caching, &hidden.use_prefix_caching]
            .iter()
            .any(|value| matches!(value.as_deref(), Some("1" | "true" | "True"))),
        "PREFIX_CACHING (once USE_PREFIX_CACHING) changes nothing yet: every prompt is computed in full",
    );
    say(
        args.devices.master_port != 29500 || args.devices.master_addr != "localhost",
        "--master-addr and --master-port change nothing on one machine: shards meet at a Unix socket",
    );
    say(
        hidden.disable_usage_stats || hidden.disable_crash_reports,
        "--disable-usage-stats and --disable-crash-reports change nothing: nothing is ever sent home",
    );
    say(
        args.limits.max_input_length.is_some(),
        "--max-input-length is the old name of --max-input-tokens, which should be used instead",
    );
    if num_shard > 1 {
        lines.push(format!("Sharding model on {num_shard} processes"));
    }
    if args.limits.max_batch_prefill_tokens.is_none() {
        lines.push(format!("Default `max_batch_prefill_tokens` to {prefill_tokens}"));
    }
    lines
}
