//! Entries and a scripted shard for the scheduler's tests.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use proto::v3::{Batch, CachedBatch, FinishReason, GeneratedText, Generation, Tokens};
use proto::{ClientError, StepResult};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::metrics::{BucketLimits, Metrics};

use super::{
    Batcher, BatcherSettings, BlockAllocator, Entry, Event, HealthFlag, Queue, QueueSettings, Regained,
    Scheduled, Scheduler, SchedulerError, ShardGroup, StepClient, Unrecoverable, ValidRequest,
};

/// The client's end of an entry.
pub(super) struct TestClient {
    pub(super) events: UnboundedReceiver<Result<Event, SchedulerError>>,
}

pub(super) fn valid_request(input_length: usize, max_new_tokens: u32) -> ValidRequest {
    let mut request = ValidRequest {
        inputs: "test".to_string(),
        input_ids: (0..input_length as u32).collect(),
        ..Default::default()
    };
    request.stopping_parameters.max_new_tokens = max_new_tokens;
    request
}

pub(super) fn entry(input_length: usize, max_new_tokens: u32) -> (Entry, TestClient) {
    let (sender, events) = tokio::sync::mpsc::unbounded_channel();
    let request = valid_request(input_length, max_new_tokens);
    (Entry::new(request, sender), TestClient { events })
}

pub(super) fn generation(request_id: u64, id: u32, last: bool) -> Generation {
    Generation {
        request_id,
        tokens: Some(Tokens {
            ids: vec![id],
            logprobs: vec![-0.25],
            texts: vec![format!(" {id}")],
            is_special: vec![false],
        }),
        generated_text: last.then(|| GeneratedText {
            text: "done".to_string(),
            generated_tokens: id + 1,
            finish_reason: FinishReason::Length as i32,
            seed: None,
        }),
        ..Default::default()
    }
}

#[derive(Default)]
pub(super) struct ShardState {
    /// Calls in order, such as `prefill 0 [0, 1]`.
    pub(super) log: Vec<String>,
    /// Cached batches: request id, prompt tokens left, tokens generated, tokens wanted.
    pub(super) cached: HashMap<u64, Vec<(u64, u32, u32, u32)>>,
    /// The next call of this name fails.
    pub(super) fail: Option<&'static str>,
    /// A client that leaves while this call is computed.
    pub(super) leaves: Option<(&'static str, Scheduled)>,
    /// Prompt tokens of a chunked prompt that one step computes.
    pub(super) chunk: u32,
    /// The shard dies of the first of these calls, then the next life of the second, and so on.
    pub(super) deaths: VecDeque<&'static str>,
    /// It can still say that its engine failed.
    pub(super) dies_with_a_word: bool,
    pub(super) is_dead: bool,
    /// Tokens that the cache of the next life holds; 0: as many as before.
    pub(super) next_cache: u32,
    /// Why the next life is of no use.
    pub(super) unusable: Option<&'static str>,
    /// What is asked of the scheduler while there is no shard.
    pub(super) meanwhile: Option<Box<dyn FnOnce() + Send>>,
}

/// A shard that generates 0, 1, 2, … for everybody and keeps TGI's rules about cached batches.
#[derive(Clone, Default)]
pub(super) struct FakeShard(pub(super) Arc<Mutex<ShardState>>);

impl FakeShard {
    pub(super) fn log(&self) -> Vec<String> {
        self.0.lock().unwrap().log.clone()
    }

    fn call(&self, name: &'static str, detail: String) -> Result<(), ClientError> {
        let mut state = self.0.lock().unwrap();
        let line = format!("{name} {detail}");
        if state.leaves.as_ref().is_some_and(|(call, _)| line == *call) {
            state.leaves = None;
        }
        if state.is_dead {
            return Err(ClientError::Lost("the connection is closed".to_string()));
        }
        let dies = state.deaths.front().is_some_and(|call| line == *call);
        state.log.push(line);
        if dies {
            state.deaths.pop_front();
            state.is_dead = true;
            state.cached.clear();
            if state.dies_with_a_word {
                return Err(ClientError::EngineFailed("out of numbers".to_string()));
            }
            return Err(ClientError::Lost("it was killed".to_string()));
        }
        if state.fail == Some(name) {
            state.fail = None;
            return Err(ClientError::Generation(format!("{name} failed")));
        }
        Ok(())
    }

    fn take(&self, id: u64) -> Result<Vec<(u64, u32, u32, u32)>, ClientError> {
        let rows = self.0.lock().unwrap().cached.remove(&id);
        rows.ok_or_else(|| ClientError::Generation(format!("batch {id} is not cached")))
    }

    fn step(&self, id: u64, mut rows: Vec<(u64, u32, u32, u32)>) -> StepResult {
        let mut state = self.0.lock().unwrap();
        let chunk = state.chunk.max(1);
        let mut generations = Vec::new();
        for (request_id, prompt_left, generated, wanted) in &mut rows {
            *prompt_left = prompt_left.saturating_sub(chunk);
            if *prompt_left == 0 {
                generations.push(generation(*request_id, *generated, *generated + 1 >= *wanted));
                *generated += 1;
            }
        }
        let all_stopped = rows.iter().all(|(_, _, generated, wanted)| generated >= wanted);
        let next_batch = (!all_stopped).then(|| cached_batch(id, &rows));
        if !all_stopped {
            state.cached.insert(id, rows);
        }
        StepResult { generations, next_batch, ..Default::default() }
    }
}

fn cached_batch(id: u64, rows: &[(u64, u32, u32, u32)]) -> CachedBatch {
    CachedBatch {
        id,
        request_ids: rows.iter().map(|row| row.0).collect(),
        size: rows.len() as u32,
        max_tokens: rows.len() as u32 * 8,
        current_tokens: rows.len() as u32,
    }
}

impl StepClient for FakeShard {
    async fn prefill(
        &mut self,
        batch: Batch,
        cached_batch: Option<CachedBatch>,
    ) -> Result<StepResult, ClientError> {
        let ids: Vec<u64> = batch.requests.iter().map(|request| request.id).collect();
        let with = cached_batch.as_ref().map(|cached| format!(" with {}", cached.id)).unwrap_or_default();
        self.call("prefill", format!("{} {ids:?}{with}", batch.id))?;
        let mut rows = match &cached_batch {
            Some(cached) => self.take(cached.id)?,
            None => Vec::new(),
        };
        rows.extend(batch.requests.iter().map(|request| {
            let left = request.chunk_len.map_or(0, |_| request.input_ids.len() as u32);
            let generated = request.generated_ids.len() as u32;
            assert!(request.generated_ids.iter().copied().eq(0..generated), "the answer so far");
            (request.id, left, generated, request.stopping_parameters.as_ref().unwrap().max_new_tokens)
        }));
        Ok(self.step(cached_batch.map_or(batch.id, |cached| cached.id), rows))
    }

    async fn decode(&mut self, batches: Vec<CachedBatch>) -> Result<StepResult, ClientError> {
        let ids: Vec<u64> = batches.iter().map(|batch| batch.id).collect();
        self.call("decode", format!("{ids:?}"))?;
        let mut rows = Vec::new();
        for id in &ids {
            rows.extend(self.take(*id)?);
        }
        Ok(self.step(ids[0], rows))
    }

    async fn filter_batch(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> Result<Option<CachedBatch>, ClientError> {
        self.call("filter", format!("{batch_id} {request_ids:?}"))?;
        let mut rows = self.take(batch_id)?;
        rows.retain(|row| request_ids.contains(&row.0));
        let answer = cached_batch(batch_id, &rows);
        self.0.lock().unwrap().cached.insert(batch_id, rows);
        Ok(Some(answer))
    }

    async fn clear_cache(&mut self, batch_id: Option<u64>) -> Result<(), ClientError> {
        self.call("clear", format!("{batch_id:?}"))?;
        let mut state = self.0.lock().unwrap();
        match batch_id {
            Some(id) => drop(state.cached.remove(&id)),
            None => state.cached.clear(),
        }
        Ok(())
    }
}

impl ShardGroup for FakeShard {
    type Client = FakeShard;

    fn client(&mut self) -> &mut FakeShard {
        self
    }

    fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let state = Arc::clone(&self.0);
        std::future::poll_fn(move |_| match state.lock().unwrap().is_dead {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        })
    }

    async fn reconnect(&mut self) -> Result<Regained, Unrecoverable> {
        let meanwhile = self.0.lock().unwrap().meanwhile.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let mut state = self.0.lock().unwrap();
        state.log.push("reconnect".to_string());
        if let Some(reason) = state.unusable {
            return Err(Unrecoverable(reason.to_string()));
        }
        state.is_dead = false;
        let max_batch_total_tokens = if state.next_cache == 0 { 400 } else { state.next_cache };
        Ok(Regained { max_batch_total_tokens })
    }
}

/// A batching task that has not been started.
pub(super) struct Fixture {
    pub(super) shard: FakeShard,
    allocator: BlockAllocator,
    pub(super) health: HealthFlag,
    pub(super) scheduler: Scheduler,
    batcher: Batcher<FakeShard>,
}

pub(super) fn fixture(supports_chunking: bool, settings: impl FnOnce(&mut BatcherSettings)) -> Fixture {
    let allocator = BlockAllocator::new(400, 4, None);
    let queue = Queue::new(QueueSettings {
        allocator: Some(allocator.clone()),
        block_size: 4,
        speculate: 0,
        supports_chunking,
        supports_resume: true,
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
    pub(super) fn request(&self, input_length: usize, max_new_tokens: u32) -> Scheduled {
        self.scheduler.schedule(valid_request(input_length, max_new_tokens)).unwrap()
    }

    /// Without the field that makes a request go on.
    pub(super) fn without_resume(mut self) -> Self {
        self.batcher.queue.forget_resume();
        self
    }

    /// Runs until everything that was asked for is done.
    pub(super) async fn run(self) -> (Vec<String>, HealthFlag) {
        let (log, health, ended) = self.run_to_end().await;
        ended.unwrap();
        (log, health)
    }

    pub(super) async fn run_to_end(self) -> (Vec<String>, HealthFlag, Result<(), Unrecoverable>) {
        let Fixture { shard, allocator, health, scheduler, batcher } = self;
        drop(scheduler);
        let ended = batcher.run().await;
        assert_eq!(allocator.free_blocks(), 99, "every block came back");
        assert!(shard.0.lock().unwrap().cached.is_empty(), "nothing stays cached");
        (shard.log(), health, ended)
    }
}

/// The ids of an answer, or why there is none.
pub(super) fn texts(mut scheduled: Scheduled) -> Result<Vec<u32>, String> {
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
