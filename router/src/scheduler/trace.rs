//! The spans of the scheduler, for a collector only: where a request waits, where it runs, and each step with the requests
//! that it computes. Where none are exported they cost a look at a flag.

use process::TRACES_TARGET;
use tracing::{Level, Span};

use super::running::Entries;
use crate::metrics::Method;

/// Where a request is, as spans below the one it came with: `queued`, then `infer`, and again when its shards are lost.
#[derive(Debug)]
pub struct RequestTrace {
    request: Span,
    stage: Span,
}

impl RequestTrace {
    /// A request that is queued now, below the span that is current.
    pub(super) fn begin() -> Self {
        let mut trace = Self { request: Span::current(), stage: Span::none() };
        trace.queue();
        trace
    }

    /// It waits, for the first time or again.
    pub(super) fn queue(&mut self) {
        self.stage = tracing::info_span!(target: TRACES_TARGET, parent: &self.request, "queued");
    }

    /// It has left the queue.
    pub(super) fn run(&mut self) {
        self.stage = tracing::info_span!(target: TRACES_TARGET, parent: &self.request, "infer");
    }
}

/// The span of one step over `entries`. It belongs to the trace of the oldest of them and is linked with the others', because a
/// span has one parent and a step serves many.
pub(super) fn step_span(method: Method, entries: &Entries) -> Span {
    if !tracing::enabled!(target: TRACES_TARGET, Level::INFO) {
        return Span::none();
    }
    let Some((oldest, entry)) = entries.iter().min_by_key(|(id, _)| **id) else { return Span::none() };
    let parent = &entry.trace.stage;
    let size = entries.len();
    let span = match method {
        Method::Prefill => tracing::info_span!(
            target: TRACES_TARGET, parent: parent, "prefill", otel.kind = "client", batch_size = size
        ),
        Method::Decode => tracing::info_span!(
            target: TRACES_TARGET, parent: parent, "decode", otel.kind = "client", batch_size = size
        ),
    };
    for (_, other) in entries.iter().filter(|(id, _)| *id != oldest) {
        span.follows_from(&other.trace.stage);
    }
    span
}
