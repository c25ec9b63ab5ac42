//! What the flags mean: pure functions that report every mistake at once.
//!
//! [`RouterConfig`] is what can be known before the shards are asked; [`Limits`] is what their answers make of it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use hub::{HubOptions, ModelRef};
use process::{OtlpEndpoint, TraceSettings};
use proto::ShardInfo;
use proto::v3::WarmupResponse;

use crate::args::Args;
use crate::server::{HeaderValue, ServerSettings};
use crate::tunnel::TunnelSettings;

/// Without a number from the shards (padding models) the running batch may have at least this many tokens.
const MIN_PADDING_BATCH_TOKENS: u32 = 16_000;

/// How the router runs.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// Where to listen.
    pub address: SocketAddr,
    /// The master shard's socket.
    pub master_shard_uds_path: PathBuf,
    /// The model whose tokenizer to use.
    pub model: ModelRef,
    /// Where models are.
    pub hub: HubOptions,
    /// Replaces the model's own tokenizer configuration.
    pub tokenizer_config_path: Option<PathBuf>,
    /// HTTP.
    pub server: ServerSettings,
    /// A tunnel that is served too.
    pub tunnel: Option<TunnelSettings>,
    /// Sequences in flight.
    pub max_concurrent_requests: usize,
    /// Largest `best_of`.
    pub max_best_of: usize,
    /// Most stop texts.
    pub max_stop_sequences: usize,
    /// Largest `top_n_tokens`.
    pub max_top_n_tokens: u32,
    /// Tokenizer threads.
    pub validation_workers: usize,
    /// TGI's knobs of the batching loop.
    pub batching: BatchingConfig,
    /// Leave the shards alone until the standard input ends.
    pub is_held: bool,
    /// What to tell the user at the start.
    pub notes: Vec<String>,
}

/// TGI's knobs of the batching loop, as given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchingConfig {
    /// Most prompt tokens of a request.
    pub max_input_tokens: Option<usize>,
    /// Most tokens of a request.
    pub max_total_tokens: Option<usize>,
    /// Most prompt tokens of a step.
    pub max_batch_prefill_tokens: u32,
    /// Most tokens of the running batch.
    pub max_batch_total_tokens: Option<u32>,
    /// Most requests of the running batch.
    pub max_batch_size: Option<usize>,
    /// See [`crate::scheduler::BatcherSettings`].
    pub waiting_served_ratio: f32,
    /// See [`crate::scheduler::BatcherSettings`].
    pub max_waiting_tokens: usize,
}

/// The limits that hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most prompt tokens of a request.
    pub max_input_tokens: usize,
    /// Most tokens of a request.
    pub max_total_tokens: usize,
    /// Token slots of the running batch.
    pub max_batch_total_tokens: u32,
}

impl RouterConfig {
    /// What the flags mean.
    ///
    /// # Errors
    /// Every mistake, one line each.
    pub fn from_args(args: Args) -> Result<Self, Vec<String>> {
        let mut mistakes = check_values(&args);
        let mut header = |flag: &str, text: &str| match HeaderValue::from_str(text) {
            Ok(value) => value,
            Err(_) => {
                mistakes.push(format!("{flag}: `{text}` cannot be sent in an HTTP header"));
                HeaderValue::from_static("")
            }
        };
        let origins = args.cors_allow_origin.iter().flatten();
        let server = ServerSettings {
            api_key: args.api_key.clone(),
            cors_allow_origin: origins.map(|origin| header("--cors-allow-origin", origin)).collect(),
            payload_limit: args.payload_limit,
            max_client_batch_size: args.max_client_batch_size,
            liveness_timeout: Duration::from_secs(args.liveness_timeout),
            compute_type: header("--compute-type", &args.compute_type),
        };
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let mut notes = notes(&args);
        let address = SocketAddr::new(parse_hostname(&args.hostname, &mut notes), args.port);
        Ok(Self {
            address,
            tunnel: tunnel(&args, address),
            master_shard_uds_path: args.master_shard_uds_path.into(),
            model: ModelRef { model_id: args.tokenizer_name, revision: given(args.revision) },
            hub: args.hub.options(),
            tokenizer_config_path: given(args.tokenizer_config_path).map(PathBuf::from),
            server,
            max_concurrent_requests: args.max_concurrent_requests,
            max_best_of: args.max_best_of,
            max_stop_sequences: args.max_stop_sequences,
            max_top_n_tokens: args.max_top_n_tokens,
            validation_workers: args.validation_workers,
            batching: BatchingConfig {
                max_input_tokens: args.max_input_tokens,
                max_total_tokens: args.max_total_tokens,
                max_batch_prefill_tokens: args.max_batch_prefill_tokens,
                max_batch_total_tokens: args.max_batch_total_tokens,
                max_batch_size: args.max_batch_size,
                waiting_served_ratio: args.waiting_served_ratio,
                max_waiting_tokens: args.max_waiting_tokens,
            },
            is_held: args.hold_until_input_ends,
            notes,
        })
    }
}

fn check_values(args: &Args) -> Vec<String> {
    let mut mistakes = Vec::new();
    for (flag, is_zero) in [
        ("--max-concurrent-requests", args.max_concurrent_requests == 0),
        ("--max-best-of", args.max_best_of == 0),
        ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens == 0),
        ("--max-client-batch-size", args.max_client_batch_size == 0),
        ("--validation-workers", args.validation_workers == 0),
        ("--max-batch-size", args.max_batch_size == Some(0)),
        ("--max-input-tokens", args.max_input_tokens == Some(0)),
    ] {
        if is_zero {
            mistakes.push(format!("{flag} is 0, expected 1 or more"));
        }
    }
    if !(args.waiting_served_ratio >= 0.0 && args.waiting_served_ratio.is_finite()) {
        mistakes.push(format!("--waiting-served-ratio is {}, expected 0 or more", args.waiting_served_ratio));
    }
    if let (Some(input), Some(total)) = (args.max_input_tokens, args.max_total_tokens)
        && input >= total
    {
        mistakes
            .push(format!("--max-input-tokens is {input}, expected less than --max-total-tokens, {total}"));
    }
    mistakes.extend(otlp_endpoint(args).and_then(Result::err));
    mistakes.extend(missing_for_ngrok(args));
    mistakes
}

/// Where spans are sent; nowhere when the address is a mistake, which [`RouterConfig::from_args`] tells.
pub fn trace_settings(args: &Args) -> Option<TraceSettings> {
    let endpoint = otlp_endpoint(args)?.ok()?;
    Some(TraceSettings { endpoint, service_name: args.otlp_service_name.clone(), instance: None })
}

/// An empty variable counts as unset.
fn otlp_endpoint(args: &Args) -> Option<Result<OtlpEndpoint, String>> {
    args.otlp_endpoint.as_deref().filter(|text| !text.trim().is_empty()).map(OtlpEndpoint::parse)
}

/// What `--ngrok` needs and is not given, as upstream's launcher says it.
fn missing_for_ngrok(args: &Args) -> impl Iterator<Item = String> {
    [("ngrok-authtoken", given(args.ngrok_authtoken.clone())), ("ngrok-edge", given(args.ngrok_edge.clone()))]
        .into_iter()
        .filter(|(_, value)| args.ngrok && value.is_none())
        .map(|(flag, _)| format!("`{flag}` must be set when using ngrok tunneling; add --{flag}"))
}

/// The tunnel that is asked for.
fn tunnel(args: &Args, address: SocketAddr) -> Option<TunnelSettings> {
    let (authtoken, edge) = (given(args.ngrok_authtoken.clone())?, given(args.ngrok_edge.clone())?);
    args.ngrok.then(|| TunnelSettings {
        authtoken,
        edge,
        server_addr: given(args.ngrok_server_addr.clone()),
        root_cas: given(args.ngrok_root_cas.clone()).map(PathBuf::from),
        forwards_to: format!("http://{address}"),
    })
}

/// What `--prometheus-port` is when nobody asks for another; launchers always pass it on.
const DEFAULT_PROMETHEUS_PORT: u16 = 9000;
/// What `--max-image-fetch-size` is when nobody asks for another.
const DEFAULT_MAX_IMAGE_FETCH_SIZE: usize = 1 << 30;

/// What the flags that change nothing here get instead of silence, one line each.
fn notes(args: &Args) -> Vec<String> {
    let mut notes = Vec::new();
    if args.prometheus_port != DEFAULT_PROMETHEUS_PORT {
        notes.push(format!(
            "--prometheus-port {} is accepted, but nothing listens there: /metrics is on the main port, {}",
            args.prometheus_port, args.port
        ));
    }
    if args.max_image_fetch_size != DEFAULT_MAX_IMAGE_FETCH_SIZE {
        notes.push(
            "--max-image-fetch-size is accepted, but no image is ever fetched: models are text only"
                .to_string(),
        );
    }
    if args.disable_grammar_support {
        notes.push(
            "--disable-grammar-support is accepted; requests with a grammar are refused without it too"
                .to_string(),
        );
    }
    if args.trust_remote_code {
        notes.push("--trust-remote-code is accepted, but no code that comes with a model is run".to_string());
    }
    if !args.ngrok && (args.ngrok_authtoken.is_some() || args.ngrok_edge.is_some()) {
        notes.push("--ngrok-authtoken and --ngrok-edge change nothing without --ngrok".to_string());
    }
    if args.usage_stats != crate::args::UsageStats::Off {
        notes.push(
            "--usage-stats is accepted, but no usage statistics are sent, whatever it says".to_string(),
        );
    }
    notes
}

/// The environment of every container has HOSTNAME, which is its name: that must not fail.
fn parse_hostname(hostname: &str, notes: &mut Vec<String>) -> IpAddr {
    match hostname.parse() {
        Ok(ip) => ip,
        Err(_) if hostname == "localhost" => Ipv4Addr::LOCALHOST.into(),
        Err(_) => {
            notes.push(format!("--hostname is `{hostname}`, which is no IP address: listening on 0.0.0.0"));
            Ipv4Addr::UNSPECIFIED.into()
        }
    }
}

impl BatchingConfig {
    /// What is to be said about `--max-batch-total-tokens` when the shards have measured the number themselves.
    pub fn overruled(&self, warmup: &WarmupResponse) -> Option<String> {
        let (given, measured) = (self.max_batch_total_tokens?, warmup.max_supported_total_tokens?);
        Some(format!(
            "--max-batch-total-tokens {given} is not used: the shards have measured room for {measured} tokens; \
             --cuda-memory-fraction changes that"
        ))
    }
}

/// A text that is set to nothing counts as not set.
fn given(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.trim().is_empty())
}

impl Limits {
    /// Compares the flags with what the shards answered.
    ///
    /// # Errors
    /// Every contradiction, one line each.
    pub fn settle(
        flags: &BatchingConfig,
        shards: &ShardInfo,
        warmup: &WarmupResponse,
    ) -> Result<Self, Vec<String>> {
        let mut mistakes = Vec::new();
        let shard_max_input = warmup.max_input_tokens as usize;
        let shard_max_total = warmup.max_total_tokens as usize;
        for (flag, given, answer) in [
            ("--max-input-tokens", flags.max_input_tokens, shard_max_input),
            ("--max-total-tokens", flags.max_total_tokens, shard_max_total),
        ] {
            if let Some(given) = given.filter(|given| *given != answer) {
                mistakes.push(format!("{flag} is {given}, but the shards answered {answer}"));
            }
        }
        let max_batch_total_tokens = warmup.max_supported_total_tokens.unwrap_or_else(|| {
            flags.max_batch_total_tokens.unwrap_or(
                MIN_PADDING_BATCH_TOKENS.max(warmup.max_total_tokens).max(flags.max_batch_prefill_tokens),
            )
        });
        let (max_input_tokens, max_total_tokens) =
            fit_into_cache((shard_max_input, shard_max_total), flags, shards, max_batch_total_tokens);
        if max_total_tokens < shard_max_total && flags.max_total_tokens.is_some() {
            mistakes.push(format!(
                "not enough memory: the KV cache has room for requests of {max_total_tokens} tokens, \
                 --max-total-tokens is {shard_max_total}"
            ));
        }
        if max_input_tokens == 0 || max_input_tokens >= max_total_tokens {
            mistakes.push(format!(
                "max_input_tokens is {max_input_tokens} and max_total_tokens is {max_total_tokens}: \
                 expected 0 < input < total; set --max-input-tokens or --max-total-tokens"
            ));
        }
        let prefill = flags.max_batch_prefill_tokens;
        if !shards.support_chunking && (prefill as usize) < max_input_tokens {
            mistakes.push(format!(
                "--max-batch-prefill-tokens is {prefill}, expected at least max_input_tokens, \
                 {max_input_tokens}, because the shards cannot compute prompts in pieces"
            ));
        }
        if prefill > max_batch_total_tokens {
            mistakes.push(format!(
                "--max-batch-prefill-tokens is {prefill}, expected at most the {max_batch_total_tokens} \
                 tokens the batch has room for"
            ));
        }
        if mistakes.is_empty() {
            Ok(Self { max_input_tokens, max_total_tokens, max_batch_total_tokens })
        } else {
            Err(mistakes)
        }
    }
}

/// The largest (input, total) of a request that an empty cache can hold.
///
/// TGI takes the shards' total as it is; with a cache of just that size, whose block 0 is reserved, its queue then
/// blocks for ever behind a request of full length.
fn fit_into_cache(
    (max_input, max_total): (usize, usize),
    flags: &BatchingConfig,
    shards: &ShardInfo,
    max_batch_total_tokens: u32,
) -> (usize, usize) {
    let speculate = shards.speculate as usize;
    let room = if shards.requires_padding {
        (max_batch_total_tokens as usize).saturating_sub(speculate)
    } else {
        let block_size = shards.block_size.max(1);
        let slots = (max_batch_total_tokens / block_size).saturating_sub(1) * block_size;
        // The last generated token is never fed back and needs no slot.
        (slots as usize + 1).saturating_sub(speculate)
    };
    let max_total = max_total.min(room);
    let max_input =
        if flags.max_input_tokens.is_some() { max_input } else { max_input.min(max_total.saturating_sub(1)) };
    (max_input, max_total)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn flags_that_change_nothing_are_answered_and_their_defaults_are_not() {
        let about = |arguments: &[&str], flag: &str| {
            let config = config(arguments).unwrap();
            config.notes.iter().filter(|note| note.starts_with(flag)).count()
        };
        assert_eq!(about(&["--prometheus-port", "9001"], "--prometheus-port 9001"), 1);
        assert_eq!(about(&["--prometheus-port", "9000"], "--prometheus-port"), 0);
        assert_eq!(about(&["--max-image-fetch-size", "5"], "--max-image-fetch-size"), 1);
        assert_eq!(about(&[], "--max-image-fetch-size"), 0);
        assert_eq!(about(&["--disable-grammar-support"], "--disable-grammar-support"), 1);
        assert_eq!(about(&[], "--disable-grammar-support"), 0);
        assert_eq!(about(&["--usage-stats", "no-stack"], "--usage-stats"), 1);
        assert_eq!(about(&["--usage-stats", "off"], "--usage-stats"), 0);
    }

    #[test]
    fn texts_that_are_empty_count_as_not_set() {
        let config = config(&["--revision", "", "--tokenizer-config-path", " "]).unwrap();
        assert_eq!((config.model.revision, config.tokenizer_config_path), (None, None));
    }

    #[test]
    fn a_token_budget_that_the_shards_overrule_is_said() {
        let given = BatchingConfig { max_batch_total_tokens: Some(5000), ..flags() };
        let said = given.overruled(&warmup(Some(2048), 9, 10)).unwrap();
        assert!(said.contains("--max-batch-total-tokens 5000") && said.contains("2048"), "{said}");
        assert_eq!(given.overruled(&warmup(None, 9, 10)), None);
        assert_eq!(flags().overruled(&warmup(Some(2048), 9, 10)), None);
        let shards = ShardInfo { requires_padding: true, block_size: 1, ..Default::default() };
        let limits = Limits::settle(&given, &shards, &warmup(None, 1000, 2000)).unwrap();
        assert_eq!(limits.max_batch_total_tokens, 5000);
    }

    fn config(arguments: &[&str]) -> Result<RouterConfig, Vec<String>> {
        RouterConfig::from_args(Args::parse_from([&["router"], arguments].concat()))
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let mistakes = config(&[
            "--validation-workers",
            "0",
            "--max-batch-size",
            "0",
            "--max-input-tokens",
            "9",
            "--max-total-tokens",
            "9",
            "--ngrok",
            "--ngrok-authtoken",
            "hunter2",
            "--otlp-endpoint",
            "ftp://x",
            "--cors-allow-origin",
            "a\nb",
        ])
        .unwrap_err();
        assert_eq!(
            mistakes,
            [
                "--validation-workers is 0, expected 1 or more",
                "--max-batch-size is 0, expected 1 or more",
                "--max-input-tokens is 9, expected less than --max-total-tokens, 9",
                "--otlp-endpoint is `ftp://x`, expected the address of an OTLP collector for gRPC, such as \
                 http://localhost:4317",
                "`ngrok-edge` must be set when using ngrok tunneling; add --ngrok-edge",
                "--cors-allow-origin: `a\nb` cannot be sent in an HTTP header",
            ]
        );
    }

    #[test]
    fn a_hostname_that_is_no_address_listens_everywhere() {
        let config = config(&["--hostname", "pod-7", "--port", "80", "--usage-stats", "off"]).unwrap();
        assert_eq!(config.address.to_string(), "0.0.0.0:80");
        assert_eq!(config.notes.len(), 1);
        let local = super::tests::config(&["--hostname", "localhost", "--trust-remote-code"]).unwrap();
        assert_eq!((local.address.to_string().as_str(), local.notes.len()), ("127.0.0.1:3000", 2));
        assert_eq!(super::tests::config(&["--hostname", "::1"]).unwrap().address.to_string(), "[::1]:3000");
    }

    fn flags() -> BatchingConfig {
        config(&[]).unwrap().batching
    }

    fn shards() -> ShardInfo {
        ShardInfo { block_size: 16, support_chunking: true, ..Default::default() }
    }

    fn warmup(supported: Option<u32>, input: u32, total: u32) -> WarmupResponse {
        WarmupResponse {
            max_supported_total_tokens: supported,
            max_input_tokens: input,
            max_total_tokens: total,
        }
    }

    #[test]
    fn the_shards_answers_are_the_limits() {
        let limits = Limits::settle(&flags(), &shards(), &warmup(Some(65_536), 2047, 2048)).unwrap();
        assert_eq!((limits.max_input_tokens, limits.max_total_tokens), (2047, 2048));
        assert_eq!(limits.max_batch_total_tokens, 65_536);
    }

    #[test]
    fn a_small_cache_lowers_the_limits_to_what_fits() {
        let prefill = BatchingConfig { max_batch_prefill_tokens: 64, ..flags() };
        let limits = Limits::settle(&prefill, &shards(), &warmup(Some(2048), 2047, 2048)).unwrap();
        assert_eq!((limits.max_input_tokens, limits.max_total_tokens), (2032, 2033));
        let strict = BatchingConfig { max_total_tokens: Some(2048), ..prefill };
        let mistakes = Limits::settle(&strict, &shards(), &warmup(Some(2048), 2047, 2048)).unwrap_err();
        assert!(mistakes[0].starts_with("not enough memory: the KV cache has room for requests of 2033"));
    }

    #[test]
    fn contradictions_are_reported_at_once() {
        let flags = BatchingConfig {
            max_input_tokens: Some(100),
            max_total_tokens: Some(200),
            max_batch_prefill_tokens: 50,
            ..flags()
        };
        let shards = ShardInfo { support_chunking: false, ..shards() };
        let mistakes = Limits::settle(&flags, &shards, &warmup(Some(48), 90, 190)).unwrap_err();
        assert_eq!(mistakes[0], "--max-input-tokens is 100, but the shards answered 90");
        assert_eq!(mistakes[1], "--max-total-tokens is 200, but the shards answered 190");
        assert_eq!(mistakes.len(), 6, "{mistakes:#?}");
    }

    #[test]
    fn padding_models_get_a_default_budget() {
        let shards = ShardInfo { requires_padding: true, block_size: 1, ..Default::default() };
        let limits = Limits::settle(&flags(), &shards, &warmup(None, 1000, 2000)).unwrap();
        assert_eq!(limits.max_batch_total_tokens, 16_000);
    }
}
