//! The `x-…` headers that tell where a request's time and tokens went.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::infer::Generated;

const COMPUTE_TYPE: HeaderName = HeaderName::from_static("x-compute-type");
const COMPUTE_TIME: HeaderName = HeaderName::from_static("x-compute-time");
const COMPUTE_CHARACTERS: HeaderName = HeaderName::from_static("x-compute-characters");
const TOTAL_TIME: HeaderName = HeaderName::from_static("x-total-time");
const VALIDATION_TIME: HeaderName = HeaderName::from_static("x-validation-time");
const QUEUE_TIME: HeaderName = HeaderName::from_static("x-queue-time");
const INFERENCE_TIME: HeaderName = HeaderName::from_static("x-inference-time");
const TIME_PER_TOKEN: HeaderName = HeaderName::from_static("x-time-per-token");
const PROMPT_TOKENS: HeaderName = HeaderName::from_static("x-prompt-tokens");
const GENERATED_TOKENS: HeaderName = HeaderName::from_static("x-generated-tokens");
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Headers of a whole answer; several sequences are summed up.
///
/// `x-compute-time` is in seconds, the others are whole milliseconds, as TGI's are.
pub(super) fn answered(compute_type: &HeaderValue, characters: usize, generated: &[&Generated]) -> HeaderMap {
    let mut headers = common(compute_type, characters);
    let millis = |time: fn(&Generated) -> std::time::Duration| {
        number(generated.iter().map(|generated| time(generated).as_millis()).sum())
    };
    headers.insert(TOTAL_TIME, millis(|g| g.times.total));
    headers.insert(VALIDATION_TIME, millis(|g| g.times.validation));
    headers.insert(QUEUE_TIME, millis(|g| g.times.queue));
    headers.insert(INFERENCE_TIME, millis(|g| g.times.inference));
    headers.insert(TIME_PER_TOKEN, millis(|g| g.times.time_per_token));
    let count = |tokens: fn(&Generated) -> u32| number(generated.iter().map(|g| u128::from(tokens(g))).sum());
    headers.insert(PROMPT_TOKENS, count(|g| g.input_length));
    headers.insert(GENERATED_TOKENS, count(|g| g.generated_text.generated_tokens));
    headers
}

/// As [`answered`], with the compute time that completions do not have.
pub(super) fn answered_in_time(
    compute_type: &HeaderValue,
    characters: usize,
    generated: &Generated,
) -> HeaderMap {
    let mut headers = answered(compute_type, characters, &[generated]);
    if let Ok(seconds) = HeaderValue::from_str(&generated.times.total.as_secs_f64().to_string()) {
        headers.insert(COMPUTE_TIME, seconds);
    }
    headers
}

/// Headers of a stream: nothing is known yet, and proxies must not hold tokens back.
pub(super) fn streaming(compute_type: &HeaderValue, characters: usize) -> HeaderMap {
    let mut headers = common(compute_type, characters);
    headers.insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    headers
}

fn common(compute_type: &HeaderValue, characters: usize) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(12);
    headers.insert(COMPUTE_TYPE, compute_type.clone());
    headers.insert(COMPUTE_CHARACTERS, HeaderValue::from(characters));
    headers
}

fn number(value: u128) -> HeaderValue {
    HeaderValue::from(u64::try_from(value).unwrap_or(u64::MAX))
}
