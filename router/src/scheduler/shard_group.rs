//! The shards over several lives: what the batching task needs beside the calls of a batch.

use std::future::Future;

use super::step_client::StepClient;

/// What new shards allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regained {
    /// Tokens of all running requests; the new cache may be smaller or larger than the one before.
    pub max_batch_total_tokens: u32,
}

/// Why waiting for new shards is of no use: they are there, and cannot serve what the old ones served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the restarted shards cannot be used: {0}")]
pub struct Unrecoverable(pub String);

/// A group of shards that somebody starts again when it dies. Tests put a scripted one in its place.
pub trait ShardGroup: Send + 'static {
    /// Makes the calls.
    type Client: StepClient;

    /// The client of the shards' present life. Once they are lost, all its calls fail.
    fn client(&mut self) -> &mut Self::Client;

    /// Resolves when the present life has ended, so that it is noticed while nobody calls.
    fn closed(&self) -> impl Future<Output = ()> + Send + 'static;

    /// Waits for the next life: connects to all ranks, makes sure that no batch of an earlier one is left, warms them up.
    ///
    /// # Errors
    /// [`Unrecoverable`].
    fn reconnect(&mut self) -> impl Future<Output = Result<Regained, Unrecoverable>> + Send;
}
