//! The batching task: prefill and decode, step after step, for as long as somebody waits for tokens.
//!
//! With chunking, waiting prompts ride along with the running batch, within the prefill budget of a step. Without,
//! a new batch is computed by itself when enough requests wait or some have waited for long enough, and then
//! joins the running one.
//!
//! A call that is refused costs those that were part of it: they get the error, the health flag goes down, and the next
//! request is tried as usual. When the shards are lost, nobody is told: running requests go back into the queue with the
//! tokens that they have, and everybody waits for new shards (see `recovery`).

use std::sync::Arc;
use std::time::Instant;

use proto::v3::{Batch, CachedBatch};
use proto::{ClientError, StepResult};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::Instrument;

use super::queue::{BatchLimits, LossCause, NewBatch, Queue};
use super::running::{self, Afterwards, Entries};
use super::shard_group::{ShardGroup, Unrecoverable};
use super::step_client::StepClient;
use super::{Command, HealthFlag, SchedulerError, trace, wire};
use crate::metrics::{ConcatReason, Failure, Method, Metrics};

/// TGI's knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatcherSettings {
    /// Without chunking: let prompts interrupt once this fraction of the running batch's size waits.
    pub waiting_served_ratio: f32,
    /// Prompt tokens of one step.
    pub max_batch_prefill_tokens: u32,
    /// Tokens of all running requests.
    pub max_batch_total_tokens: u32,
    /// Without chunking: let prompts interrupt after this many steps, however few wait.
    pub max_waiting_tokens: usize,
    /// Requests that run at once.
    pub max_batch_size: Option<usize>,
}

/// Owner of the queue and of the running batch.
pub struct Batcher<G> {
    pub(super) group: G,
    pub(super) queue: Queue,
    pub(super) settings: BatcherSettings,
    pub(super) commands: UnboundedReceiver<Command>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: HealthFlag,
    /// The shards are lost; nothing is computed before there are new ones.
    pub(super) is_lost: bool,
    /// What every request is told since somebody gave up.
    pub(super) given_up: Option<SchedulerError>,
}

/// The running batch between two steps.
struct Running {
    cached: CachedBatch,
    /// Steps since prompts were last let in, plus one.
    waiting_tokens: usize,
}

impl<G: ShardGroup> Batcher<G> {
    /// A batcher over an empty queue.
    pub fn new(
        group: G,
        queue: Queue,
        settings: BatcherSettings,
        commands: UnboundedReceiver<Command>,
        metrics: Arc<Metrics>,
        health: HealthFlag,
    ) -> Self {
        let (is_lost, given_up) = (false, None);
        Self { group, queue, settings, commands, metrics, health, is_lost, given_up }
    }

    /// Serves until every [`super::Scheduler`] handle is gone.
    ///
    /// # Errors
    /// The shards were lost and their successors cannot be used. Everybody has been told.
    pub async fn run(mut self) -> Result<(), Unrecoverable> {
        loop {
            let closed = self.group.closed();
            tokio::select! {
                // Requests that were accepted before the end of the shards was noticed change nothing about it.
                biased;
                command = self.commands.recv() => match command {
                    Some(command) => self.accept(command).await,
                    None => return Ok(()),
                },
                () = closed, if !self.is_lost => {
                    self.lose("nobody computed anything", LossCause::Outside, &mut Entries::new());
                },
            }
            self.accept_waiting().await;
            self.serve_queue().await?;
        }
    }

    /// From idle to idle.
    async fn serve_queue(&mut self) -> Result<(), Unrecoverable> {
        loop {
            if self.is_lost && self.given_up.is_none() {
                self.recover().await?;
            }
            match self.next_batch(None, self.settings.max_batch_size, 0, 0) {
                Some(batch) => self.serve(batch).await,
                // Everything is free, so what does not fit now never will.
                None if !self.queue.is_empty() => {
                    self.queue.reject_first("the request does not fit into an empty batch");
                    self.metrics.set_queue_size(self.queue.len());
                }
                None => return Ok(()),
            }
            self.metrics.set_current_batch(0, 0);
            self.accept_waiting().await;
        }
    }

    /// From a first batch until nobody runs.
    async fn serve(&mut self, batch: NewBatch) {
        let mut entries = batch.entries;
        let mut cached = self.prefill(batch.batch, None, &mut entries).await;
        let mut waiting_tokens = 1;
        while let Some(batch) = cached {
            self.metrics.set_current_batch(batch.size, batch.max_tokens);
            self.accept_waiting().await;
            if let Some(reason) = &self.given_up {
                // Whoever gave up ends the shards too: what they have cached is of no interest.
                running::fail_all(&mut entries, reason);
                return;
            }
            let mut running = Running { cached: batch, waiting_tokens };
            let batches = if self.queue.is_empty() {
                vec![running.cached]
            } else if self.queue.settings().supports_chunking {
                self.join_chunked(&mut running, &mut entries).await
            } else {
                self.join_separate(&mut running, &mut entries).await
            };
            waiting_tokens = running.waiting_tokens + 1;
            cached = if batches.is_empty() { None } else { self.decode(batches, &mut entries).await };
        }
    }

    /// Lets waiting prompts ride along in one prefill call with the running batch.
    async fn join_chunked(&mut self, running: &mut Running, entries: &mut Entries) -> Vec<CachedBatch> {
        let cached = std::mem::take(&mut running.cached);
        let max_size = self.room_beside(cached.size);
        let new = self.next_batch(None, max_size, cached.current_tokens, cached.max_tokens);
        let Some(new) = new else { return vec![cached] };
        self.metrics.batch_joined(ConcatReason::Chunking);
        entries.extend(new.entries);
        running.waiting_tokens = 1;
        self.prefill(new.batch, Some(cached), entries).await.into_iter().collect()
    }

    /// Computes waiting prompts by themselves if it is time; the next decode joins the batches.
    async fn join_separate(&mut self, running: &mut Running, entries: &mut Entries) -> Vec<CachedBatch> {
        let cached = std::mem::take(&mut running.cached);
        let waited = running.waiting_tokens >= self.settings.max_waiting_tokens;
        let ratio = self.settings.waiting_served_ratio;
        let min_size = (!waited).then(|| (cached.size as f32 * ratio).floor() as usize);
        let max_size = self.room_beside(cached.size);
        let new = self.next_batch(min_size, max_size, 0, cached.max_tokens);
        let mut batches = vec![cached];
        let Some(mut new) = new else { return batches };
        let reason = if waited { ConcatReason::WaitExceeded } else { ConcatReason::Backpressure };
        self.metrics.batch_joined(reason);
        running.waiting_tokens = 1;
        if let Some(batch) = self.prefill(new.batch, None, &mut new.entries).await {
            entries.extend(new.entries);
            batches.push(batch);
        }
        batches
    }

    fn room_beside(&self, size: u32) -> Option<usize> {
        self.settings.max_batch_size.map(|max_size| max_size.saturating_sub(size as usize))
    }

    /// Forms a batch beside one that computes `current_tokens` in its next step and holds `max_tokens`.
    fn next_batch(
        &mut self,
        min_size: Option<usize>,
        max_size: Option<usize>,
        current_tokens: u32,
        max_tokens: u32,
    ) -> Option<NewBatch> {
        if self.queue.is_empty() {
            return None;
        }
        let batch = self.queue.next_batch(BatchLimits {
            min_size,
            max_size,
            prefill_budget: self.settings.max_batch_prefill_tokens.saturating_sub(current_tokens),
            token_budget: self.settings.max_batch_total_tokens.saturating_sub(max_tokens),
        });
        self.metrics.requests_failed(Failure::Dropped, self.queue.take_dropped());
        self.metrics.set_queue_size(self.queue.len());
        if let Some(batch) = &batch {
            self.metrics.batch_formed(batch.entries.len());
        }
        batch
    }

    async fn prefill(
        &mut self,
        batch: Batch,
        cached: Option<CachedBatch>,
        entries: &mut Entries,
    ) -> Option<CachedBatch> {
        let mut ids = vec![batch.id];
        ids.extend(cached.as_ref().map(|cached| cached.id));
        let span = trace::step_span(Method::Prefill, entries);
        let sent = self.step_sent(Method::Prefill);
        let answer =
            self.health.owed(self.group.client().prefill(batch, cached)).instrument(span.clone()).await;
        self.finish_step(Method::Prefill, sent, answer, &ids, entries).instrument(span).await
    }

    async fn decode(&mut self, batches: Vec<CachedBatch>, entries: &mut Entries) -> Option<CachedBatch> {
        let ids: Vec<u64> = batches.iter().map(|batch| batch.id).collect();
        let span = trace::step_span(Method::Decode, entries);
        let sent = self.step_sent(Method::Decode);
        let answer = self.health.owed(self.group.client().decode(batches)).instrument(span.clone()).await;
        self.finish_step(Method::Decode, sent, answer, &ids, entries).instrument(span).await
    }

    fn step_sent(&self, method: Method) -> Instant {
        self.metrics.step_sent(method);
        Instant::now()
    }

    /// Hands out what a step brought and filters the batch; on an error everybody in it gets the error.
    async fn finish_step(
        &mut self,
        method: Method,
        sent: Instant,
        answer: Result<StepResult, ClientError>,
        batch_ids: &[u64],
        entries: &mut Entries,
    ) -> Option<CachedBatch> {
        match answer {
            Ok(step) => {
                self.metrics.step_succeeded(method, sent.elapsed(), &step.timings);
                self.health.set(true);
                let delivering = Instant::now();
                let metrics = &self.metrics;
                running::deliver(entries, step.generations, |tokens| metrics.tokens_delivered(tokens));
                let next_batch = self.filter(step.next_batch, entries).await;
                self.metrics.step_delivered(method, delivering.elapsed());
                next_batch
            }
            Err(error) => {
                self.metrics.step_failed(method);
                self.fail(&error, batch_ids, entries).await;
                None
            }
        }
    }

    /// Makes the shards forget who no longer runs.
    async fn filter(
        &mut self,
        next_batch: Option<CachedBatch>,
        entries: &mut Entries,
    ) -> Option<CachedBatch> {
        let (batch_id, answer) = match running::afterwards(entries, next_batch) {
            Afterwards::Idle => return None,
            Afterwards::Unchanged(batch) => return Some(batch),
            Afterwards::Filter(id, kept) => {
                (id, self.health.owed(self.group.client().filter_batch(id, kept)).await)
            }
            Afterwards::Clear(id) => {
                (id, self.health.owed(self.group.client().clear_cache(Some(id))).await.map(|()| None))
            }
        };
        match answer {
            Ok(batch) => batch,
            Err(error) => {
                self.fail(&error, &[batch_id], entries).await;
                None
            }
        }
    }

    /// The shards may or may not still hold the batches: they are cleared, the entries are told. Unless there are no shards
    /// any more.
    async fn fail(&mut self, error: &ClientError, batch_ids: &[u64], entries: &mut Entries) {
        if error.is_lost() {
            let cause = match error {
                ClientError::EngineFailed(_) => LossCause::Engine,
                _ => LossCause::Outside,
            };
            return self.lose(&error.to_string(), cause, entries);
        }
        tracing::error!("{} running requests failed: {error}", entries.len());
        self.health.set(false);
        for id in batch_ids {
            if let Err(error) = self.health.owed(self.group.client().clear_cache(Some(*id))).await {
                tracing::error!("cached batch {id} could not be cleared: {error}");
            }
        }
        running::fail_all(entries, &SchedulerError::Step(error.to_string()));
    }

    /// Takes over what arrived meanwhile, without waiting.
    async fn accept_waiting(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.accept(command).await;
        }
    }

    async fn accept(&mut self, command: Command) {
        match command {
            Command::Append(entry) => {
                self.queue.append(*entry);
                self.queue.fail_all_if(self.given_up.as_ref());
                self.metrics.set_queue_size(self.queue.len());
            }
            Command::GiveUp(reason) => self.give_up(reason),
            Command::Probe(answer) if self.is_lost || self.given_up.is_some() => {
                let _ = answer.send(false);
            }
            Command::Probe(answer) => {
                let result =
                    self.health.owed(self.group.client().prefill(wire::liveness_batch(), None)).await;
                if let Err(error) = &result {
                    tracing::error!("the liveness probe failed: {error}");
                }
                self.health.set(result.is_ok());
                // Whoever asked may have given up.
                let _ = answer.send(result.is_ok());
            }
        }
    }
}

#[cfg(test)]
#[path = "batcher_tests.rs"]
mod tests;
