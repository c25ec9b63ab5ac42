//! From valid requests to steps on the shards. Knows no HTTP, no tokenizer, no chat template.
//!
//! One task owns the queue and the running batch ([`Batcher`]); the rest of the router holds a [`Scheduler`], a
//! cheap handle that sends commands. Everything that all ranks must see in the same order goes through that task.

mod batcher;
mod block_allocator;
mod entry;
mod health;
mod queue;
mod recovery;
mod running;
mod shard_group;
mod step_client;
#[cfg(test)]
mod testing;
mod trace;
mod wire;

use tokio::sync::{mpsc, oneshot};

pub use batcher::{Batcher, BatcherSettings};
pub use block_allocator::{BlockAllocation, BlockAllocator};
pub use entry::{End, Entry, Event, GeneratedToken, PromptToken, Token, ValidRequest};
pub use health::HealthFlag;
pub use queue::{BatchLimits, NewBatch, Queue, QueueSettings};
pub use shard_group::{Regained, ShardGroup, Unrecoverable};
pub use step_client::StepClient;
pub use trace::RequestTrace;
pub use wire::text_chunk;

/// Why a scheduled request got no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchedulerError {
    /// A shard failed; the text is the client's, such as `Server error: out of memory`.
    #[error("{0}")]
    Step(String),
    /// The batching task is gone: the router is on its way out.
    #[error("the scheduler has stopped")]
    Stopped,
}

/// What the batching task is asked for.
#[derive(Debug)]
pub enum Command {
    /// Queue a request.
    Append(Box<Entry>),
    /// Compute one token, to see whether the shards still can.
    Probe(oneshot::Sender<bool>),
    /// Answer every request, now and from now on, with this error.
    GiveUp(SchedulerError),
}

/// A request that was handed to the scheduler. Dropping it is how a client leaves.
#[derive(Debug)]
pub struct Scheduled {
    /// The tokens, see [`Event`].
    pub events: mpsc::UnboundedReceiver<Result<Event, SchedulerError>>,
}

/// A handle to the batching task. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Scheduler {
    commands: mpsc::UnboundedSender<Command>,
}

impl Scheduler {
    /// A handle, and the receiving end for [`Batcher::new`].
    ///
    /// Unbounded because the permits of the HTTP side bound what can be in it.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        (Self { commands }, receiver)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`SchedulerError::Stopped`] when the batching task is gone.
    pub fn schedule(&self, request: ValidRequest) -> Result<Scheduled, SchedulerError> {
        let (sender, events) = mpsc::unbounded_channel();
        let entry = Entry::new(request, sender);
        self.commands.send(Command::Append(Box::new(entry))).map_err(|_| SchedulerError::Stopped)?;
        Ok(Scheduled { events })
    }

    /// Computes one token between two steps of the running batch; whether that went well.
    pub async fn probe(&self) -> bool {
        let (sender, receiver) = oneshot::channel();
        if self.commands.send(Command::Probe(sender)).is_err() {
            return false;
        }
        receiver.await.unwrap_or(false)
    }

    /// Ends every request with `reason`, those that come later too: nothing will ever compute them.
    pub fn give_up(&self, reason: &str) {
        // A batching task that is gone has ended them already.
        let _ = self.commands.send(Command::GiveUp(SchedulerError::Step(reason.to_string())));
    }
}
