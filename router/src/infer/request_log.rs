//! The line that each request leaves in the log, in TGI's words: `Success`, inside a span that tells where the time went.

use tracing::Span;

use super::InferError;
use crate::metrics::RequestTimes;

/// A request was answered. `span`: the handler's, which has these fields.
pub(super) fn succeeded(span: &Span, times: &RequestTimes, seed: Option<u64>) {
    if !span.is_disabled() {
        span.record("total_time", format!("{:?}", times.total));
        span.record("validation_time", format!("{:?}", times.validation));
        span.record("queue_time", format!("{:?}", times.queue));
        span.record("inference_time", format!("{:?}", times.inference));
        span.record("time_per_token", format!("{:?}", times.time_per_token));
        span.record("seed", format!("{seed:?}"));
    }
    span.in_scope(|| tracing::info!("Success"));
}

/// A request got no answer. What the server is to blame for is an error; what the client is, or a full house, is not.
pub(super) fn failed(span: &Span, error: &InferError) {
    span.in_scope(|| match error {
        InferError::Generation(_) | InferError::Incomplete | InferError::IncompleteStream => {
            tracing::error!("{error}");
        }
        InferError::Overloaded { .. }
        | InferError::Recovering { .. }
        | InferError::Stopping
        | InferError::Validation(_)
        | InferError::Template(_)
        | InferError::Tool(_)
        | InferError::Suffix
        | InferError::BatchSize { .. } => tracing::info!("{error}"),
    });
}
