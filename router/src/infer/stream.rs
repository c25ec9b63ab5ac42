//! The tokens of one request as they come.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use super::InferError;
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
    _permit: OwnedSemaphorePermit,
}

impl GenerateStream {
    pub(crate) fn new(
        scheduled: Scheduled,
        input_length: u32,
        arrived: Instant,
        permit: OwnedSemaphorePermit,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { scheduled, input_length, arrived, is_finished: false, metrics, _permit: permit }
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
                self.metrics.request_succeeded(&self.times(&end), generated_tokens);
                Ok(Event::Last(token, end))
            }
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => {
                self.is_finished = true;
                self.metrics.request_failed(Failure::Generation);
                Err(error.into())
            }
            None => {
                self.is_finished = true;
                self.metrics.request_failed(Failure::Incomplete);
                Err(InferError::IncompleteStream)
            }
        }))
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
