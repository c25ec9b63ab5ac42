//! The batching task: prefill and decode, step after step, for as long as somebody waits for tokens.
//!
//! With chunking, waiting prompts ride along with the running batch, within the prefill budget of a step. Without,
//! a new batch is computed by itself when enough requests wait or some have waited for long enough, and then
//! joins the running one.
//!
//! No failure of a shard ends the task: whoever was part of the failed call gets the error, the health flag goes
//! down, and the next request is tried as usual.

use std::sync::Arc;
use std::time::Instant;

use proto::v3::{Batch, CachedBatch};
use proto::{ClientError, StepResult};
use tokio::sync::mpsc::UnboundedReceiver;

use super::queue::{BatchLimits, NewBatch, Queue};
use super::running::{self, Afterwards, Entries};
use super::step_client::StepClient;
use super::{Command, HealthFlag, SchedulerError, wire};
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
pub struct Batcher<C> {
    client: C,
    queue: Queue,
    settings: BatcherSettings,
    commands: UnboundedReceiver<Command>,
    metrics: Arc<Metrics>,
    health: HealthFlag,
}

/// The running batch between two steps.
struct Running {
    cached: CachedBatch,
    /// Steps since prompts were last let in, plus one.
    waiting_tokens: usize,
}

impl<C: StepClient> Batcher<C> {
    /// A batcher over an empty queue.
    pub fn new(
        client: C,
        queue: Queue,
        settings: BatcherSettings,
        commands: UnboundedReceiver<Command>,
        metrics: Arc<Metrics>,
        health: HealthFlag,
    ) -> Self {
        Self { client, queue, settings, commands, metrics, health }
    }

    /// Serves until every [`super::Scheduler`] handle is gone.
    pub async fn run(mut self) {
        while let Some(command) = self.commands.recv().await {
            self.accept(command).await;
            self.accept_waiting().await;
            self.serve_queue().await;
        }
    }

    /// From idle to idle.
    async fn serve_queue(&mut self) {
        loop {
            match self.next_batch(None, self.settings.max_batch_size, 0, 0) {
                Some(batch) => self.serve(batch).await,
                // Everything is free, so what does not fit now never will.
                None if !self.queue.is_empty() => {
                    self.queue.reject_first("the request does not fit into an empty batch");
                    self.metrics.set_queue_size(self.queue.len());
                }
                None => break,
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
        let sent = self.step_sent(Method::Prefill);
        let answer = self.client.prefill(batch, cached).await;
        self.finish_step(Method::Prefill, sent, answer, &ids, entries).await
    }

    async fn decode(&mut self, batches: Vec<CachedBatch>, entries: &mut Entries) -> Option<CachedBatch> {
        let ids: Vec<u64> = batches.iter().map(|batch| batch.id).collect();
        let sent = self.step_sent(Method::Decode);
        let answer = self.client.decode(batches).await;
        self.finish_step(Method::Decode, sent, answer, &ids, entries).await
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
            Afterwards::Filter(id, kept) => (id, self.client.filter_batch(id, kept).await),
            Afterwards::Clear(id) => (id, self.client.clear_cache(Some(id)).await.map(|()| None)),
        };
        match answer {
            Ok(batch) => batch,
            Err(error) => {
                self.fail(&error, &[batch_id], entries).await;
                None
            }
        }
    }

    /// The shards may or may not still hold the batches: they are cleared, the entries are told.
    async fn fail(&mut self, error: &ClientError, batch_ids: &[u64], entries: &mut Entries) {
        tracing::error!("{} running requests failed: {error}", entries.len());
        self.health.set(false);
        for id in batch_ids {
            if let Err(error) = self.client.clear_cache(Some(*id)).await {
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
                self.metrics.set_queue_size(self.queue.len());
            }
            Command::Probe(answer) => {
                let result = self.client.prefill(wire::liveness_batch(), None).await;
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
mod tests {
    use super::*;
    use crate::metrics::BucketLimits;
    use crate::scheduler::testing::{FakeShard, valid_request};
    use crate::scheduler::{BlockAllocator, Event, QueueSettings, Scheduled, Scheduler};

    struct Fixture {
        shard: FakeShard,
        allocator: BlockAllocator,
        health: HealthFlag,
        scheduler: Scheduler,
        batcher: Batcher<FakeShard>,
    }

    fn fixture(supports_chunking: bool, settings: impl FnOnce(&mut BatcherSettings)) -> Fixture {
        let allocator = BlockAllocator::new(400, 4, None);
        let queue = Queue::new(QueueSettings {
            allocator: Some(allocator.clone()),
            block_size: 4,
            speculate: 0,
            supports_chunking,
        });
        let mut knobs = BatcherSettings {
            waiting_served_ratio: 1.2,
            max_batch_prefill_tokens: 16,
            max_batch_total_tokens: 400,
            max_waiting_tokens: 20,
            max_batch_size: None,
        };
        settings(&mut knobs);
        let metrics =
            Arc::new(Metrics::new(BucketLimits { max_input_tokens: 10, max_total_tokens: 20 }).unwrap());
        let (scheduler, commands) = Scheduler::channel();
        let health = HealthFlag::default();
        let shard = FakeShard::default();
        let batcher = Batcher::new(shard.clone(), queue, knobs, commands, metrics, health.clone());
        Fixture { shard, allocator, health, scheduler, batcher }
    }

    impl Fixture {
        fn request(&self, input_length: usize, max_new_tokens: u32) -> Scheduled {
            self.scheduler.schedule(valid_request(input_length, max_new_tokens)).unwrap()
        }

        /// Runs until everything that was asked for is done.
        async fn run(self) -> (Vec<String>, HealthFlag) {
            let Fixture { shard, allocator, health, scheduler, batcher } = self;
            drop(scheduler);
            batcher.run().await;
            assert_eq!(allocator.free_blocks(), 99, "every block came back");
            assert!(shard.0.lock().unwrap().cached.is_empty(), "nothing stays cached");
            (shard.log(), health)
        }
    }

    fn texts(mut scheduled: Scheduled) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        loop {
            match scheduled.events.try_recv() {
                Ok(Ok(Event::Token(token))) => ids.push(token.token.id),
                Ok(Ok(Event::Last(token, _))) => {
                    ids.push(token.token.id);
                    return Ok(ids);
                }
                Ok(Ok(Event::Prefill(_))) => {}
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) => return Err("incomplete".to_string()),
            }
        }
    }

    #[tokio::test]
    async fn a_batch_is_filtered_as_its_requests_finish() {
        let fixture = fixture(true, |_| ());
        let (a, b) = (fixture.request(3, 3), fixture.request(3, 2));
        let (log, health) = fixture.run().await;
        assert_eq!(log, ["prefill 0 [0, 1]", "decode [0]", "filter 0 [0]", "decode [0]"]);
        assert_eq!((texts(a), texts(b)), (Ok(vec![0, 1, 2]), Ok(vec![0, 1])));
        assert!(health.is_healthy());
    }

    #[tokio::test]
    async fn chunked_prompts_ride_along_with_the_running_batch() {
        let fixture = fixture(true, |_| ());
        fixture.shard.0.lock().unwrap().chunk = 16;
        let (a, b) = (fixture.request(6, 4), fixture.request(40, 2));
        let (log, _) = fixture.run().await;
        assert_eq!(
            log,
            ["prefill 0 [0, 1]", "decode [0]", "decode [0]", "decode [0]"],
            "40 prompt tokens in steps of 16: no token for request 1 in the first two steps; both end in the fourth"
        );
        assert_eq!((texts(a), texts(b)), (Ok(vec![0, 1, 2, 3]), Ok(vec![0, 1])));
    }

    #[tokio::test]
    async fn with_chunking_new_requests_join_in_one_prefill_call() {
        let fixture = fixture(true, |knobs| knobs.max_batch_size = Some(2));
        let clients = [fixture.request(16, 3), fixture.request(15, 3), fixture.request(1, 1)];
        let (log, _) = fixture.run().await;
        // 16 tokens fill the first step. Request 1 joins beside one running row (budget 15), and max_batch_size
        // keeps request 2 out until one of them is done.
        assert_eq!(
            log,
            ["prefill 0 [0]", "prefill 1 [1] with 0", "decode [0]", "filter 0 [1]", "prefill 2 [2] with 0"]
        );
        for client in clients {
            assert!(texts(client).is_ok());
        }
    }

    #[tokio::test]
    async fn without_chunking_prompts_wait_for_their_share_or_their_time() {
        let fixture = fixture(false, |knobs| knobs.max_waiting_tokens = 3);
        let clients = [fixture.request(16, 6), fixture.request(16, 1)];
        let (log, _) = fixture.run().await;
        // ratio 1.2 of one running row asks for one waiting request: it is let in at once.
        assert_eq!(log[..3], ["prefill 0 [0]", "prefill 1 [1]", "decode [0]"]);
        for client in clients {
            assert!(texts(client).is_ok());
        }

        let patient = super::tests::fixture(false, |knobs| {
            knobs.max_waiting_tokens = 3;
            knobs.waiting_served_ratio = 2.0;
        });
        let clients = [patient.request(16, 6), patient.request(16, 2)];
        let (log, _) = patient.run().await;
        assert_eq!(log[..4], ["prefill 0 [0]", "decode [0]", "decode [0]", "prefill 1 [1]"]);
        assert_eq!(log[4], "decode [0, 1]");
        for client in clients {
            assert!(texts(client).is_ok());
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_filtered_out_in_the_same_step() {
        let fixture = fixture(true, |_| ());
        let (a, b) = (fixture.request(3, 3), fixture.request(3, 50));
        drop(fixture.request(3, 50));
        fixture.shard.0.lock().unwrap().leaves = Some(("decode [0]", b));
        let (log, _) = fixture.run().await;
        assert_eq!(
            log,
            ["prefill 0 [0, 1]", "decode [0]", "filter 0 [0]", "decode [0]"],
            "who left before the first batch is not in it"
        );
        assert_eq!(texts(a), Ok(vec![0, 1, 2]));
    }

    #[tokio::test]
    async fn the_last_client_to_leave_clears_the_batch() {
        let fixture = fixture(true, |_| ());
        let only = fixture.request(3, 50);
        fixture.shard.0.lock().unwrap().leaves = Some(("decode [0]", only));
        let (log, _) = fixture.run().await;
        assert_eq!(log, ["prefill 0 [0]", "decode [0]", "clear Some(0)"]);
    }

    #[tokio::test]
    async fn everybody_in_a_failed_call_gets_the_error_and_the_next_request_is_served() {
        for (call, chunking) in [("prefill", true), ("decode", true), ("decode", false), ("filter", true)] {
            let fixture = fixture(chunking, |_| ());
            fixture.shard.0.lock().unwrap().fail = Some(call);
            let (a, b) = (fixture.request(3, 3), fixture.request(3, 2));
            let later = fixture.request(16, 2);
            let (log, health) = fixture.run().await;
            let error = Err(format!("Server error: {call} failed"));
            assert_eq!(texts(a), error, "{call}: {log:?}");
            if call != "filter" {
                assert_eq!(texts(b), error);
            }
            // Without chunking it may have been computed beside the failed ones, and then it is among them.
            let answer = texts(later);
            assert!(answer == Ok(vec![0, 1]) || answer == error, "{call}: {answer:?}");
            assert!(log.iter().any(|line| line.starts_with("clear")), "{log:?}");
            assert_eq!(health.is_healthy(), answer.is_ok(), "{call}: the last step decides");
        }
    }

    #[tokio::test]
    async fn a_failing_clear_does_not_end_the_task() {
        let fixture = fixture(true, |_| ());
        let leaves = fixture.request(16, 50);
        let later = fixture.request(16, 1);
        {
            let mut state = fixture.shard.0.lock().unwrap();
            state.fail = Some("clear");
            state.leaves = Some(("prefill 0 [0]", leaves));
        }
        let (log, health) = fixture.run().await;
        assert_eq!(log, ["prefill 0 [0]", "clear Some(0)", "clear Some(0)", "prefill 1 [1]"]);
        assert_eq!(texts(later), Ok(vec![0]));
        assert!(health.is_healthy());
    }

    #[tokio::test]
    async fn the_probe_is_a_prefill_of_its_own() {
        let fixture = fixture(true, |_| ());
        fixture.health.set(false);
        let scheduler = fixture.scheduler.clone();
        let probe = tokio::spawn(async move { scheduler.probe().await });
        let (log, health) = fixture.run().await;
        assert!(probe.await.unwrap());
        assert_eq!(log, [format!("prefill {} [{}]", u64::MAX, u64::MAX)]);
        assert!(health.is_healthy());
    }
}
