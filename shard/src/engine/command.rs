//! What the engine can be asked to do.

use std::time::Instant;

use super::generation::{CachedBatch, StepReply};
use super::request::NewBatch;
use super::warmup::{WarmupLimits, WarmupRequest};

/// Takes the answer to wherever it is awaited. Called at most once, from the engine's thread, and must not block. An
/// engine that ends drops the ones it has not called.
pub type Reply<T> = Box<dyn FnOnce(Result<T, String>) + Send>;

/// One call. Calls are carried out in the order they come, each as a whole.
pub enum Command {
    /// Size the KV cache and touch everything once; drops all batches.
    Warmup {
        /// What to expect.
        request: WarmupRequest,
        /// What the cache allows.
        reply: Reply<WarmupLimits>,
    },
    /// Compute prompts, and the next tokens of a cached batch that they join.
    Prefill {
        /// The new requests.
        batch: NewBatch,
        /// The batch they join.
        cached_batch: Option<u64>,
        /// When the call came.
        received: Instant,
        /// The first tokens.
        reply: Reply<StepReply>,
    },
    /// Compute the next token of every request of the cached batches, which become one.
    Decode {
        /// Cached batches; the first one's id stays.
        batch_ids: Vec<u64>,
        /// When the call came.
        received: Instant,
        /// The next tokens.
        reply: Reply<StepReply>,
    },
    /// Keep some requests of a cached batch.
    FilterBatch {
        /// The batch.
        batch_id: u64,
        /// What to keep, in this order.
        request_ids: Vec<u64>,
        /// The batch as it is now.
        reply: Reply<CachedBatch>,
    },
    /// Drop one cached batch, or all.
    ClearCache {
        /// `None`: all.
        batch_id: Option<u64>,
        /// Nothing to say.
        reply: Reply<()>,
    },
}

impl Command {
    /// Answers with an error.
    pub fn refuse(self, problem: String) {
        match self {
            Command::Warmup { reply, .. } => reply(Err(problem)),
            Command::Prefill { reply, .. } | Command::Decode { reply, .. } => reply(Err(problem)),
            Command::FilterBatch { reply, .. } => reply(Err(problem)),
            Command::ClearCache { reply, .. } => reply(Err(problem)),
        }
    }
}
