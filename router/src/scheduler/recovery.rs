//! What happens when the shards die: nobody is told, everybody waits, and goes on behind the last token it was told.
//!
//! A step that was lost under way costs nothing but time: its tokens were delivered to nobody, and the new shards choose
//! the same ones, because random numbers depend on nothing but seed and position.

use super::batcher::Batcher;
use super::queue::LossCause;
use super::running::Entries;
use super::shard_group::{Regained, ShardGroup, Unrecoverable};
use super::{Command, SchedulerError};

impl<G: ShardGroup> Batcher<G> {
    /// Takes the running requests back into the queue.
    pub(super) fn lose(&mut self, what_was_seen: &str, cause: LossCause, entries: &mut Entries) {
        self.is_lost = true;
        self.health.begin_recovery();
        let running = entries.len();
        let error = SchedulerError::Step(what_was_seen.to_string());
        let resumed = self.queue.resume(std::mem::take(entries), cause, &error);
        self.metrics.requests_interrupted(resumed);
        self.metrics.set_queue_size(self.queue.len());
        tracing::warn!(
            "the shards are lost ({what_was_seen}): {resumed} of {running} running requests and {} queued ones wait for \
             new ones",
            self.queue.len().saturating_sub(resumed)
        );
    }

    /// Waits for new shards, for as long as it takes: whoever starts them decides when to give up. Requests that arrive
    /// meanwhile are queued.
    ///
    /// # Errors
    /// The new shards cannot be used; everybody has been told.
    pub(super) async fn recover(&mut self) -> Result<(), Unrecoverable> {
        match self.reconnect().await {
            Err(reason) => {
                self.give_up(reason);
                Ok(())
            }
            Ok(Ok(regained)) => {
                self.settings.max_batch_total_tokens = regained.max_batch_total_tokens;
                self.queue.renew_cache(regained.max_batch_total_tokens);
                self.metrics.set_max_batch_total_tokens(regained.max_batch_total_tokens);
                self.is_lost = false;
                let pause = self.health.end_recovery();
                self.metrics.shards_recovered(pause);
                tracing::info!(
                    "the shards are back after {:.0} ms: {} requests go on",
                    pause.as_secs_f64() * 1e3,
                    self.queue.len()
                );
                Ok(())
            }
            Ok(Err(error)) => {
                self.queue.fail_all_if(Some(&SchedulerError::Step(error.to_string())));
                Err(error)
            }
        }
    }

    /// What became of the shards, unless somebody gave up before.
    async fn reconnect(&mut self) -> Result<Result<Regained, Unrecoverable>, SchedulerError> {
        // Three parts of this task are in use at once: the group connects while commands fill the queue.
        let Self { group, queue, commands, metrics, .. } = self;
        let reconnecting = group.reconnect();
        tokio::pin!(reconnecting);
        let mut is_open = true;
        loop {
            tokio::select! {
                regained = &mut reconnecting => return Ok(regained),
                command = commands.recv(), if is_open => match command {
                    Some(Command::Append(entry)) => {
                        queue.append(*entry);
                        metrics.set_queue_size(queue.len());
                    }
                    Some(Command::Probe(answer)) => {
                        // Whoever asked may have given up.
                        let _ = answer.send(false);
                    }
                    Some(Command::GiveUp(reason)) => return Err(reason),
                    // Nobody can ask for anything any more; those that wait may still be waited for.
                    None => is_open = false,
                },
            }
        }
    }

    /// Ends every request, now and from now on.
    pub(super) fn give_up(&mut self, reason: SchedulerError) {
        tracing::warn!("every request is ended: {reason}");
        self.queue.fail_all_if(Some(&reason));
        self.metrics.set_queue_size(0);
        self.health.set(false);
        self.given_up = Some(reason);
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
