//! Every metric of the router: its name, what it counts, its buckets. Nothing else writes a metric name.
//!
//! The names are text-generation-inference's, so that dashboards keep working; what it has no name for begins with
//! `quartet_`. Handles are made once and used
//! from everywhere: recording is an atomic operation, never a lookup. Series show up at zero from the start,
//! which lets `rate()` see the first event.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Label, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::types::{Phase, Startup};

/// How often [`Metrics::upkeep`] must be called: histograms keep single samples until then.
pub const UPKEEP_PERIOD: Duration = Duration::from_secs(5);

/// Which step a batch metric is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A call that computes prompts.
    Prefill,
    /// A call that computes one token each.
    Decode,
}

/// Why a request failed; the `err` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No permit was free.
    Overloaded,
    /// The request broke a rule.
    Validation,
    /// The chat template refused it.
    Template,
    /// A shard failed.
    Generation,
    /// The stream of tokens ended without its last one.
    Incomplete,
    /// The client left while it was queued.
    Dropped,
}

/// Why a new batch joined the running one; the `reason` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConcatReason {
    /// Enough requests were waiting.
    Backpressure,
    /// Some had waited for long enough.
    WaitExceeded,
    /// Prompts ride along with running requests.
    Chunking,
}

/// Token limits that shape the buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketLimits {
    /// Most prompt tokens of one request.
    pub max_input_tokens: usize,
    /// Most tokens of one request, prompt and answer.
    pub max_total_tokens: usize,
}

/// The times of one finished generation, as the response headers show them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTimes {
    /// From the first byte of the handler to the last token.
    pub total: Duration,
    /// Until the request was queued.
    pub validation: Duration,
    /// In the queue.
    pub queue: Duration,
    /// From its first batch to the last token.
    pub inference: Duration,
    /// `inference` divided by the generated tokens.
    pub time_per_token: Duration,
}

/// One call's series for prefill and decode.
struct PerMethod<T> {
    prefill: T,
    decode: T,
}

impl<T> PerMethod<T> {
    fn new(make: impl Fn(Vec<Label>) -> T) -> Self {
        let label = |method: &'static str| vec![Label::from_static_parts("method", method)];
        Self { prefill: make(label("prefill")), decode: make(label("decode")) }
    }

    fn of(&self, method: Method) -> &T {
        match method {
            Method::Prefill => &self.prefill,
            Method::Decode => &self.decode,
        }
    }
}

/// Handles of all metrics.
pub struct Metrics {
    handle: PrometheusHandle,
    /// Makes the series whose labels are known only once the router has started.
    recorder: Option<PrometheusRecorder>,
    request_count: Counter,
    request_success: Counter,
    failures: [(Failure, Counter); 6],
    request_duration: Histogram,
    validation_duration: Histogram,
    queue_duration: Histogram,
    inference_duration: Histogram,
    time_per_token_duration: Histogram,
    generated_tokens: Histogram,
    input_length: Histogram,
    max_new_tokens: Histogram,
    skipped_tokens: Histogram,
    queue_size: Gauge,
    batch_current_size: Gauge,
    batch_current_max_tokens: Gauge,
    batch_max_total_tokens: Gauge,
    batch_next_size: Histogram,
    inference_count: PerMethod<Counter>,
    inference_success: PerMethod<Counter>,
    inference_failure: PerMethod<Counter>,
    batch_inference_duration: PerMethod<Histogram>,
    batch_forward_duration: PerMethod<Histogram>,
    batch_decode_duration: PerMethod<Histogram>,
    batch_filter_duration: PerMethod<Histogram>,
    batch_concat_duration: Histogram,
    concats: [(ConcatReason, Counter); 3],
    recovery_count: Counter,
    recovery_duration: Histogram,
    requests_resumed: Counter,
    requests_in_flight: Gauge,
}

impl Metrics {
    /// Makes the recorder and all handles.
    ///
    /// # Errors
    /// Only for an empty bucket list, which these limits cannot produce.
    pub fn new(limits: BucketLimits) -> Result<Self, BuildError> {
        let recorder = builder(limits)?.build_recorder();
        let handle = recorder.handle();
        let mut metrics = metrics::with_local_recorder(&recorder, || {
            describe();
            Self::register(handle)
        });
        metrics.recorder = Some(recorder);
        Ok(metrics)
    }

    fn register(handle: PrometheusHandle) -> Self {
        let failure = |kind: Failure, label: &'static str| {
            (kind, metrics::counter!("tgi_request_failure", "err" => label))
        };
        let concat = |reason: ConcatReason, label: &'static str| {
            (reason, metrics::counter!("tgi_batch_concat", "reason" => label))
        };
        Self {
            handle,
            recorder: None,
            request_count: metrics::counter!("tgi_request_count"),
            request_success: metrics::counter!("tgi_request_success"),
            failures: [
                failure(Failure::Overloaded, "overloaded"),
                failure(Failure::Validation, "validation"),
                failure(Failure::Template, "template"),
                failure(Failure::Generation, "generation"),
                failure(Failure::Incomplete, "incomplete"),
                failure(Failure::Dropped, "dropped"),
            ],
            request_duration: metrics::histogram!("tgi_request_duration"),
            validation_duration: metrics::histogram!("tgi_request_validation_duration"),
            queue_duration: metrics::histogram!("tgi_request_queue_duration"),
            inference_duration: metrics::histogram!("tgi_request_inference_duration"),
            time_per_token_duration: metrics::histogram!("tgi_request_mean_time_per_token_duration"),
            generated_tokens: metrics::histogram!("tgi_request_generated_tokens"),
            input_length: metrics::histogram!("tgi_request_input_length"),
            max_new_tokens: metrics::histogram!("tgi_request_max_new_tokens"),
            skipped_tokens: metrics::histogram!("tgi_request_skipped_tokens"),
            queue_size: metrics::gauge!("tgi_queue_size"),
            batch_current_size: metrics::gauge!("tgi_batch_current_size"),
            batch_current_max_tokens: metrics::gauge!("tgi_batch_current_max_tokens"),
            batch_max_total_tokens: metrics::gauge!("tgi_batch_max_total_tokens"),
            batch_next_size: metrics::histogram!("tgi_batch_next_size"),
            inference_count: PerMethod::new(|l| metrics::counter!("tgi_batch_inference_count", l)),
            inference_success: PerMethod::new(|l| metrics::counter!("tgi_batch_inference_success", l)),
            inference_failure: PerMethod::new(|l| metrics::counter!("tgi_batch_inference_failure", l)),
            batch_inference_duration: PerMethod::new(|l| {
                metrics::histogram!("tgi_batch_inference_duration", l)
            }),
            batch_forward_duration: PerMethod::new(|l| metrics::histogram!("tgi_batch_forward_duration", l)),
            batch_decode_duration: PerMethod::new(|l| metrics::histogram!("tgi_batch_decode_duration", l)),
            batch_filter_duration: PerMethod::new(|l| metrics::histogram!("tgi_batch_filter_duration", l)),
            batch_concat_duration: metrics::histogram!("tgi_batch_concat_duration", "method" => "decode"),
            concats: [
                concat(ConcatReason::Backpressure, "backpressure"),
                concat(ConcatReason::WaitExceeded, "wait_exceeded"),
                concat(ConcatReason::Chunking, "chunking"),
            ],
            recovery_count: metrics::counter!("quartet_recovery_count"),
            recovery_duration: metrics::histogram!("quartet_recovery_duration"),
            requests_resumed: metrics::counter!("quartet_request_resumed"),
            requests_in_flight: metrics::gauge!("quartet_requests_in_flight"),
        }
    }

    /// The Prometheus text.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Moves collected samples into their buckets. See [`UPKEEP_PERIOD`].
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// A request arrived at a handler.
    pub fn request_arrived(&self) {
        self.request_count.increment(1);
    }

    /// A request failed.
    pub fn request_failed(&self, kind: Failure) {
        self.requests_failed(kind, 1);
    }

    /// `count` requests failed for the same reason.
    pub fn requests_failed(&self, kind: Failure, count: u64) {
        if let Some((_, counter)) = self.failures.iter().find(|(known, _)| *known == kind) {
            counter.increment(count);
        }
    }

    /// A request passed validation with this many tokens to read and, at most, to write.
    pub fn request_validated(&self, input_length: usize, max_new_tokens: u32) {
        self.input_length.record(input_length as f64);
        self.max_new_tokens.record(f64::from(max_new_tokens));
    }

    /// A generation ended well.
    pub fn request_succeeded(&self, times: &RequestTimes, generated_tokens: u32) {
        self.request_success.increment(1);
        self.request_duration.record(times.total);
        self.validation_duration.record(times.validation);
        self.queue_duration.record(times.queue);
        self.inference_duration.record(times.inference);
        self.time_per_token_duration.record(times.time_per_token);
        self.generated_tokens.record(f64::from(generated_tokens));
    }

    /// One request got `tokens` tokens in one step.
    pub fn tokens_delivered(&self, tokens: usize) {
        self.skipped_tokens.record(tokens.saturating_sub(1) as f64);
    }

    /// Requests that wait now.
    pub fn set_queue_size(&self, size: usize) {
        self.queue_size.set(size as f64);
    }

    /// Size and token capacity of the running batch, both 0 when idle.
    pub fn set_current_batch(&self, size: u32, max_tokens: u32) {
        self.batch_current_size.set(f64::from(size));
        self.batch_current_max_tokens.set(f64::from(max_tokens));
    }

    /// Tokens the KV cache holds.
    pub fn set_max_batch_total_tokens(&self, tokens: u32) {
        self.batch_max_total_tokens.set(f64::from(tokens));
    }

    /// A batch of `size` requests left the queue.
    pub fn batch_formed(&self, size: usize) {
        self.batch_next_size.record(size as f64);
    }

    /// A new batch joined the running one.
    pub fn batch_joined(&self, reason: ConcatReason) {
        if let Some((_, counter)) = self.concats.iter().find(|(known, _)| *known == reason) {
            counter.increment(1);
        }
    }

    /// A step was sent to the shards.
    pub fn step_sent(&self, method: Method) {
        self.inference_count.of(method).increment(1);
    }

    /// A step came back.
    pub fn step_succeeded(&self, method: Method, router_time: Duration, timings: &proto::StepTimings) {
        self.inference_success.of(method).increment(1);
        self.batch_inference_duration.of(method).record(router_time);
        self.batch_forward_duration.of(method).record(timings.forward);
        self.batch_decode_duration.of(method).record(timings.decode);
        if let Some(concat) = timings.concat {
            self.batch_concat_duration.record(concat);
        }
    }

    /// A step failed.
    pub fn step_failed(&self, method: Method) {
        self.inference_failure.of(method).increment(1);
    }

    /// The tokens of a step were handed out and the batch was filtered.
    pub fn step_delivered(&self, method: Method, time: Duration) {
        self.batch_filter_duration.of(method).record(time);
    }

    /// Requests that were let in and are not answered to their end.
    pub fn set_requests_in_flight(&self, count: usize) {
        self.requests_in_flight.set(count as f64);
    }

    /// Where the time of the start went.
    pub fn set_startup(&self, startup: &Startup) {
        let Some(recorder) = &self.recorder else { return };
        metrics::with_local_recorder(recorder, || {
            let set = |process: &'static str, rank: String, phase: &Phase| {
                let labels = [
                    Label::new("process", process),
                    Label::new("rank", rank),
                    Label::new("phase", phase.phase.clone()),
                ];
                metrics::gauge!("quartet_startup_phase_seconds", labels.to_vec()).set(phase.ms / 1e3);
            };
            metrics::gauge!("quartet_startup_seconds").set(startup.total_ms / 1e3);
            startup.phases.iter().for_each(|phase| set("all", String::new(), phase));
            startup.router_preparation.iter().for_each(|phase| set("router", String::new(), phase));
            for rank in &startup.ranks {
                rank.phases.iter().for_each(|phase| set("shard", rank.rank.to_string(), phase));
            }
        });
    }

    /// The shards died while they computed `count` requests, which go on when there are new ones.
    pub fn requests_interrupted(&self, count: usize) {
        self.requests_resumed.increment(count as u64);
    }

    /// There are new shards, `pause` after the old ones were found lost.
    pub fn shards_recovered(&self, pause: Duration) {
        self.recovery_count.increment(1);
        self.recovery_duration.record(pause);
    }
}

/// Bucket rules. What has none is rendered as a summary (`tgi_request_skipped_tokens`).
fn builder(limits: BucketLimits) -> Result<PrometheusBuilder, BuildError> {
    // 0.15 ms to 146 s: from one decode step of a small model to the longest generation.
    let durations: Vec<f64> = (1..=35).map(|k| 0.0001 * 1.5_f64.powi(k)).collect();
    let hundredths = |limit: usize| -> Vec<f64> {
        (1..=100).map(|k| limit.max(1) as f64 / 100.0 * f64::from(k)).collect()
    };
    let total = hundredths(limits.max_total_tokens);
    let batch_sizes: Vec<f64> = (1..=1024).map(f64::from).collect();
    let full = |name: &str| Matcher::Full(name.to_string());
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".to_string()), &durations)?
        .set_buckets_for_metric(full("tgi_request_input_length"), &hundredths(limits.max_input_tokens))?
        .set_buckets_for_metric(full("tgi_request_generated_tokens"), &total)?
        .set_buckets_for_metric(full("tgi_request_max_new_tokens"), &total)?
        .set_buckets_for_metric(full("tgi_batch_next_size"), &batch_sizes)
}

fn describe() {
    describe_counter!("tgi_request_count", "Requests that arrived at a handler");
    describe_counter!("tgi_request_success", "Generations that ended well");
    describe_counter!("tgi_request_failure", "Requests that failed, by kind");
    describe_histogram!("tgi_request_duration", "Seconds from arrival to the last token");
    describe_histogram!("tgi_request_validation_duration", "Seconds from arrival to the queue");
    describe_histogram!("tgi_request_queue_duration", "Seconds in the queue");
    describe_histogram!("tgi_request_inference_duration", "Seconds from the first batch to the last token");
    describe_histogram!(
        "tgi_request_mean_time_per_token_duration",
        "Seconds of inference per generated token"
    );
    describe_histogram!("tgi_request_generated_tokens", "Generated tokens of a request");
    describe_histogram!("tgi_request_input_length", "Prompt tokens of a request");
    describe_histogram!("tgi_request_max_new_tokens", "Most tokens a request may generate");
    describe_histogram!("tgi_request_skipped_tokens", "Tokens of a request in one step, beyond the first");
    describe_counter!("quartet_recovery_count", "Times that new shards took over from ones that died");
    describe_histogram!("quartet_recovery_duration", "Seconds from the loss of the shards to the next step");
    describe_counter!("quartet_request_resumed", "Running requests that went on after a loss of the shards");
    describe_gauge!(
        "quartet_requests_in_flight",
        "Requests that were let in and are not answered to their end"
    );
    describe_gauge!("quartet_startup_seconds", "Seconds from the launcher's start to the first connection");
    describe_gauge!(
        "quartet_startup_phase_seconds",
        "Seconds of each phase of the start: those of process `all` follow one another, the others go on meanwhile"
    );
    describe_gauge!("tgi_queue_size", "Requests in the queue");
    describe_gauge!("tgi_batch_current_size", "Requests in the running batch");
    describe_gauge!("tgi_batch_current_max_tokens", "Token slots held by the running batch");
    describe_gauge!("tgi_batch_max_total_tokens", "Token slots of the KV cache");
    describe_histogram!("tgi_batch_next_size", "Requests that left the queue together");
    describe_counter!("tgi_batch_inference_count", "Steps sent to the shards");
    describe_counter!("tgi_batch_inference_success", "Steps that came back");
    describe_counter!("tgi_batch_inference_failure", "Steps that failed");
    describe_histogram!("tgi_batch_inference_duration", "Seconds of a step as the router sees it");
    describe_histogram!("tgi_batch_forward_duration", "Seconds of a step's forward pass and sampling");
    describe_histogram!("tgi_batch_decode_duration", "Seconds of a step's token and text work on the host");
    describe_histogram!("tgi_batch_filter_duration", "Seconds to hand out tokens and filter the batch");
    describe_histogram!("tgi_batch_concat_duration", "Seconds to join batches");
    describe_counter!("tgi_batch_concat", "Batches that joined the running one, by reason");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(BucketLimits { max_input_tokens: 200, max_total_tokens: 400 }).unwrap()
    }

    #[test]
    fn names_carry_no_unit_or_total_suffix() {
        let metrics = metrics();
        metrics.request_arrived();
        metrics.requests_failed(Failure::Dropped, 2);
        metrics.tokens_delivered(1);
        let text = metrics.render();
        assert!(text.contains("\ntgi_request_count 1\n"), "{text}");
        assert!(text.contains("tgi_request_failure{err=\"dropped\"} 2"));
        assert!(text.contains("tgi_request_skipped_tokens{quantile=\"0.5\"}"), "a summary");
        assert!(!text.contains("_total "));
    }

    #[test]
    fn bucket_rules_follow_the_limits() {
        let metrics = metrics();
        metrics.request_validated(3, 5);
        metrics.request_succeeded(&RequestTimes::default(), 5);
        metrics.batch_formed(1);
        let text = metrics.render();
        assert!(text.contains("tgi_request_input_length_bucket{le=\"2\"} 0"), "{text}");
        assert!(text.contains("tgi_request_input_length_bucket{le=\"4\"} 1"));
        assert!(text.contains("tgi_request_generated_tokens_bucket{le=\"400\"} 1"));
        assert!(text.contains("tgi_batch_next_size_bucket{le=\"1024\"} 1"));
        let buckets = text.lines().filter(|line| line.starts_with("tgi_request_duration_bucket")).count();
        assert_eq!(buckets, 36, "35 and +Inf");
        metrics.upkeep();
    }
}
