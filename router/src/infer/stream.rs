//! The tokens of one request as they come.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tracing::Span;

use super::{InferError, Permit, request_log};
use crate::metrics::{Failure, Metrics, RequestTimes};
use crate::scheduler::{End, Event, Scheduled};

/// Yields events until the last token or an error. Holds the request's permit.
///
/// Dropping it before its end is how a client leaves: the scheduler notices with the next step and frees the blocks.
pub struct GenerateStream {
    scheduled: Scheduled,
    input_length: u32,
    arrived: Instant,
    is_finished: bool,
    metrics: Arc<Metrics>,
    /// The request's: a streamed answer outlives its handler.
    span: Span,
    tells_of_success: bool,
    _permit: Permit,
}

impl GenerateStream {
    pub(crate) fn new(
        scheduled: Scheduled,
        input_length: u32,
        arrived: Instant,
        permit: Permit,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (is_finished, span, tells_of_success) = (false, Span::current(), false);
        Self {
            scheduled,
            input_length,
            arrived,
            is_finished,
            metrics,
            span,
            tells_of_success,
            _permit: permit,
        }
    }

    /// With a line in the log at its end. Without, whoever collects the tokens writes it.
    pub(crate) fn that_tells_of_its_success(self) -> Self {
        Self { tells_of_success: true, ..self }
    }

    /// Prompt tokens.
    pub fn input_length(&self) -> u32 {
        self.input_length
    }

    /// The next event; `None` after the last token or an error.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event, InferError>>> {
        if self.is_finished {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.scheduled.events.poll_recv(context));
        Poll::Ready(Some(match event {
            Some(Ok(Event::Last(token, end))) => {
                self.is_finished = true;
                let generated_tokens = end.generated_text.generated_tokens;
                let times = self.times(&end);
                self.metrics.request_succeeded(&times, generated_tokens);
                if self.tells_of_success {
                    request_log::succeeded(&self.span, &times, end.generated_text.seed);
                }
                Ok(Event::Last(token, end))
            }
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => {
                self.is_finished = true;
                self.metrics.request_failed(Failure::Generation);
                Err(self.told(error.into()))
            }
            None => {
                self.is_finished = true;
                self.metrics.request_failed(Failure::Incomplete);
                Err(self.told(InferError::IncompleteStream))
            }
        }))
    }

    fn told(&self, error: InferError) -> InferError {
        request_log::failed(&self.span, &error);
        error
    }

    /// As [`Self::poll_next`]. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Event, InferError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// Where the time went until now.
    pub fn times(&self, end: &End) -> RequestTimes {
        let inference = end.started.elapsed();
        RequestTimes {
            total: self.arrived.elapsed(),
            validation: end.queued.saturating_duration_since(self.arrived),
            queue: end.started.saturating_duration_since(end.queued),
            inference,
            time_per_token: inference
                .checked_div(end.generated_text.generated_tokens)
                .unwrap_or(Duration::ZERO),
        }
    }
}
