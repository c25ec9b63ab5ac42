//! Why a request got no answer.

use std::time::Duration;

use crate::chat_template::TemplateError;
use crate::scheduler::SchedulerError;
use crate::validation::ValidationError;

/// A failed request. The texts are TGI's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InferError {
    /// Every permit is taken.
    #[error("Model is overloaded")]
    Overloaded {
        /// When it is worth coming back.
        retry_after: Duration,
    },
    /// Every permit is taken, and those that have them wait for new shards.
    #[error("Model is recovering and as many requests wait as it may serve at once")]
    Recovering {
        /// When it is worth coming back.
        retry_after: Duration,
    },
    /// The server was asked to stop: it finishes what it has.
    #[error("The server is shutting down and takes no new requests")]
    Stopping,
    /// A rule was broken.
    #[error("Input validation error: {0}")]
    Validation(#[from] ValidationError),
    /// A shard failed.
    #[error("Request failed during generation: {0}")]
    Generation(#[from] SchedulerError),
    /// The tokens ended without a last one.
    #[error("Incomplete generation")]
    Incomplete,
    /// The tokens ended without a last one, in a stream.
    #[error("Incomplete generation stream")]
    IncompleteStream,
    /// The chat template refused the messages.
    #[error("Template error: {0}")]
    Template(#[from] TemplateError),
    /// Something about tools.
    #[error("Tool error: {0}")]
    Tool(String),
    /// Completions with a suffix.
    #[error("Suffix is not supported and can be achieved by preprocessing the prompt.")]
    Suffix,
    /// Completions with too many prompts.
    #[error("Number of prompts exceeds the maximum allowed batch size of {max}")]
    BatchSize {
        /// The limit.
        max: usize,
    },
}
