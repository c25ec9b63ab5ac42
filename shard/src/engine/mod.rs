//! The engine: one plain thread that owns the model, the KV cache and the batches.
//!
//! It takes [`Command`]s one after the other and answers each through its reply. Right after the answer to a prefill or
//! decode has been handed out, the next step of the same batch is computed without being asked (*run-ahead*): while the
//! answer travels, the device works. A later call finds those results waiting in the sequences and computes only what is
//! not there yet. What is computed, and when, depends on the order of calls alone, never on their timing, so that all
//! ranks of a model take part in the same collectives.

mod batch;
mod batch_store;
mod block_pool;
mod command;
mod detokenizer;
mod forward_input;
mod generation;
mod liveness;
mod request;
mod sequence;
mod step;
mod stopping;
#[cfg(test)]
pub(crate) mod testing;
mod thread;
mod vocabulary;
mod warmup;

use std::sync::Arc;
use std::time::Instant;

use backend::StepInput;
use models::{CausalLm, ModelError, ModelInfo};

use batch::Batch;
use batch_store::BatchStore;
use block_pool::BlockPool;
use sequence::SequenceContext;
use step::Launched;
use warmup::CacheBudget;

pub use command::{Command, Reply};
pub use generation::{CachedBatch, GeneratedText, Generation, StepReply, StepTimings, Tokens};
pub use liveness::Liveness;
pub use request::{NewBatch, NewRequest, Prompt};
pub use stopping::{FinishReason, StoppingParams};
pub use thread::{EngineExit, EngineHandle, spawn};
pub use vocabulary::Vocabulary;
pub use warmup::{WarmupLimits, WarmupRequest};

/// The name of the KV cache in the memory ledger.
const KV_CACHE_ENTRY: &str = "kv_cache";

/// What the engine needs to know besides its model.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// This process's rank: it reports the requests with `id % world_size == rank`.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Whether prompts may be asked for their log-probabilities.
    pub request_logprobs: bool,
    /// Share of the free memory that the KV cache may use, see [`WarmupRequest`].
    pub memory_fraction: f64,
    /// Longest text the tokenizer is meant for.
    pub model_max_length: Option<usize>,
    /// Used when a warm-up does not say.
    pub max_input_tokens: Option<usize>,
    /// Used when a warm-up does not say.
    pub max_total_tokens: Option<usize>,
    /// Off only to compare: compute each step when it is asked for.
    pub run_ahead: bool,
}

/// The KV cache that a warm-up would make of `available_bytes`: its blocks, and what they allow.
///
/// # Errors
/// As the warm-up: one line when the memory does not suffice, with the options that change it.
pub fn forecast_cache(
    model: &ModelInfo,
    options: &EngineOptions,
    max_prefill_tokens: usize,
    available_bytes: usize,
) -> Result<(usize, WarmupLimits), String> {
    let request = WarmupRequest {
        max_input_tokens: options.max_input_tokens,
        max_total_tokens: options.max_total_tokens,
        max_prefill_tokens,
        ..WarmupRequest::default()
    };
    let plan = warmup::plan(&request, model, &cache_budget(model, options, available_bytes))?;
    Ok((plan.num_blocks, plan.limits))
}

fn cache_budget(model: &ModelInfo, options: &EngineOptions, available_bytes: usize) -> CacheBudget {
    CacheBudget {
        available_bytes,
        memory_fraction: options.memory_fraction,
        local_world_size: options.world_size,
        max_context: options.model_max_length.unwrap_or(usize::MAX).min(model.max_position_embeddings),
    }
}

/// Why a call failed.
#[derive(Debug)]
enum StepError {
    /// The call cannot be served; the engine is as good as before.
    Refused(String),
    /// The model cannot be used any more.
    Broken(ModelError),
}

impl From<String> for StepError {
    fn from(problem: String) -> Self {
        StepError::Refused(problem)
    }
}

impl From<ModelError> for StepError {
    fn from(error: ModelError) -> Self {
        StepError::Broken(error)
    }
}

/// Model, cache and batches.
pub struct Engine {
    model: Box<dyn CausalLm>,
    vocabulary: Vocabulary,
    options: EngineOptions,
    pool: BlockPool,
    store: BatchStore,
    step: StepInput,
    liveness: Arc<Liveness>,
    /// Prompt tokens that later parts of cut prompts share in one step; known from the warm-up.
    max_prefill_tokens: usize,
    /// A step that ran ahead failed; the next call is told.
    failure: Option<ModelError>,
    /// The next step of the batch that is being answered.
    launched: Option<Launched>,
}

impl Engine {
    /// An engine without a KV cache: the first call must be a warm-up.
    pub fn new(model: Box<dyn CausalLm>, vocabulary: Vocabulary, options: EngineOptions) -> Self {
        let memory = model.info().memory.iter().map(|(name, bytes)| (name.clone(), *bytes as u64)).collect();
        Self {
            model,
            vocabulary,
            options,
            pool: BlockPool::new(0),
            store: BatchStore::default(),
            step: StepInput::default(),
            liveness: Arc::new(Liveness::new(memory)),
            max_prefill_tokens: usize::MAX,
            failure: None,
            launched: None,
        }
    }

    /// The model's fixed facts.
    pub fn model_info(&self) -> &ModelInfo {
        self.model.info()
    }

    /// The counters that others may read meanwhile.
    pub fn liveness(&self) -> Arc<Liveness> {
        Arc::clone(&self.liveness)
    }

    /// Carries out one command and replies to it, then runs ahead.
    ///
    /// # Errors
    /// The model's; the engine is not to be used again. The caller of the command has been told.
    pub fn execute(&mut self, command: Command) -> Result<(), ModelError> {
        if let Some(error) = self.failure.take() {
            self.liveness.set_failed();
            command.refuse(error.to_string());
            return Err(error);
        }
        match command {
            Command::Warmup { request, reply } => {
                let result = self.warmup(request);
                self.answer(reply, result)
            }
            Command::Prefill { batch, cached_batch, received, reply } => {
                let result = self.prefill(batch, cached_batch, received);
                self.answer_step(reply, result)
            }
            Command::Decode { batch_ids, received, reply } => {
                let result = self.decode(&batch_ids, received);
                self.answer_step(reply, result)
            }
            Command::FilterBatch { batch_id, request_ids, reply } => {
                let result = self.filter_batch(batch_id, &request_ids);
                self.answer(reply, result.map_err(StepError::Refused))
            }
            Command::ClearCache { batch_id, reply } => {
                self.store.clear(batch_id);
                self.answer(reply, Ok(()))
            }
        }
    }

    /// Whether a step that ran ahead has failed and nobody has been told yet.
    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The error of [`Engine::has_failed`], when no call comes that could be told.
    pub fn take_failure(&mut self) -> Option<ModelError> {
        self.failure.take()
    }

    fn answer<T>(&self, reply: Reply<T>, result: Result<T, StepError>) -> Result<(), ModelError> {
        self.liveness.set_blocks(self.pool.num_blocks(), self.pool.num_used());
        match result {
            Ok(value) => reply(Ok(value)),
            Err(StepError::Refused(problem)) => reply(Err(problem)),
            Err(StepError::Broken(error)) => {
                self.liveness.set_failed();
                reply(Err(error.to_string()));
                return Err(error);
            }
        }
        Ok(())
    }

    fn answer_step(
        &mut self,
        reply: Reply<StepReply>,
        result: Result<StepReply, StepError>,
    ) -> Result<(), ModelError> {
        let next = result.as_ref().ok().and_then(|step| step.batch.as_ref()).map(|batch| batch.id);
        let launched = self.launched.take();
        self.answer(reply, result)?;
        match next.filter(|_| self.options.run_ahead) {
            Some(id) => self.run_ahead(id, launched),
            // All texts ended, as only their texts could tell.
            None if launched.is_some() => self.liveness.step_finished(),
            None => {}
        }
        Ok(())
    }

    /// Computes the next step of a batch that nobody has asked for yet, or what is left of it when it was launched before the
    /// answer. An error is kept for the next call.
    fn run_ahead(&mut self, id: u64, launched: Option<Launched>) {
        let Ok(mut batch) = self.store.take(id) else { return };
        let model = &mut *self.model;
        let collected = match launched {
            Some(launched) => step::collect(model, &mut batch, launched, &self.liveness),
            None => Ok(()),
        };
        let rows = batch.rows_with_slots().collect();
        let computed =
            collected.and_then(|()| step::compute(model, &mut self.step, &mut batch, rows, &self.liveness));
        match computed {
            Ok(()) => self.store.put(batch),
            Err(error) => self.failure = Some(error),
        }
    }

    fn prefill(
        &mut self,
        new: NewBatch,
        cached_batch: Option<u64>,
        received: Instant,
    ) -> Result<StepReply, StepError> {
        let cached = cached_batch.map(|id| self.store.take(id)).transpose()?;
        self.check_warm()?;
        let new = Batch::new(new, &self.sequence_context())?;
        let concat_started = Instant::now();
        let Some(mut batch) = cached else { return self.run_step(new, received, None) };
        batch.append(new);
        self.run_step(batch, received, Some(concat_started))
    }

    fn decode(&mut self, batch_ids: &[u64], received: Instant) -> Result<StepReply, StepError> {
        // All of them are taken out before anything can fail: a batch that was asked for is gone in any case.
        let mut batches = batch_ids.iter().map(|&id| self.store.take(id)).collect::<Vec<_>>().into_iter();
        let mut batch = match batches.next() {
            Some(first) => first?,
            None => {
                return Err(StepError::Refused("no batches to decode, expected at least one".to_string()));
            }
        };
        let concat_started = (batches.len() > 0).then(Instant::now);
        for other in batches {
            batch.append(other?);
        }
        self.run_step(batch, received, concat_started)
    }

    /// Computes what is not there yet, reports it, keeps the batch.
    fn run_step(
        &mut self,
        mut batch: Batch,
        received: Instant,
        concat_started: Option<Instant>,
    ) -> Result<StepReply, StepError> {
        let concat = concat_started.map(|started| started.elapsed());
        batch.check_slots()?;
        let rows: Vec<_> = batch.rows().collect();
        if !rows.is_empty() {
            step::compute(&mut *self.model, &mut self.step, &mut batch, rows, &self.liveness)?;
        }
        let forward = received.elapsed();
        let (rank, world_size) = (self.options.rank as u64, self.options.world_size as u64);
        batch.advance(self.max_prefill_tokens);
        self.launched = self.launch_ahead(&batch)?;
        let generations = batch.report(&self.vocabulary, |request_id| request_id % world_size == rank)?;
        let next_batch = (!batch.is_finished()).then(|| batch.describe(self.model.info().block_size));
        if next_batch.is_some() {
            self.store.put(batch);
        } else {
            drop(batch);
        }
        let total = received.elapsed();
        let timings = StepTimings { forward, decode: total.saturating_sub(forward), total, concat };
        Ok(StepReply { generations, batch: next_batch, timings })
    }

    /// Hands the next step of a batch to a device that works by itself, before texts are made and the answer is out: it is never
    /// without work. On other devices the answer would have to wait.
    fn launch_ahead(&mut self, batch: &Batch) -> Result<Option<Launched>, ModelError> {
        if !self.options.run_ahead || !self.model.info().device.is_asynchronous {
            return Ok(None);
        }
        let rows = batch.rows_before_report(&self.vocabulary);
        step::launch(&mut *self.model, &mut self.step, batch, rows, &self.liveness)
    }

    fn filter_batch(&mut self, batch_id: u64, request_ids: &[u64]) -> Result<CachedBatch, String> {
        let block_size = self.model.info().block_size;
        let batch = self.store.get_mut(batch_id)?;
        batch.filter(request_ids)?;
        Ok(batch.describe(block_size))
    }

    fn warmup(&mut self, mut request: WarmupRequest) -> Result<WarmupLimits, StepError> {
        request.max_input_tokens = request.max_input_tokens.or(self.options.max_input_tokens);
        request.max_total_tokens = request.max_total_tokens.or(self.options.max_total_tokens);
        self.store.clear(None);
        if self.pool.num_blocks() > 1 {
            // The memory of the cache there is counts as free.
            self.pool = BlockPool::new(1);
            self.model.allocate_kv_cache(1)?;
        }
        let info = self.model.info();
        let budget = cache_budget(info, &self.options, self.model.memory()?.available_bytes);
        let plan = warmup::plan(&request, info, &budget)?;
        let block_bytes = info.block_bytes;
        let usable_tokens = (plan.num_blocks - 1) * info.block_size;
        self.model.allocate_kv_cache(plan.num_blocks)?;
        self.pool = BlockPool::new(plan.num_blocks);
        self.liveness.set_memory(KV_CACHE_ENTRY, plan.num_blocks * block_bytes);
        self.max_prefill_tokens = request.max_prefill_tokens.max(1);
        self.run_short_batch(warmup::short_batch(request.batch, usable_tokens))?;
        tracing::info!(
            "KV cache of {} blocks, {} MiB: {} tokens in all, {} a request",
            plan.num_blocks,
            plan.num_blocks * block_bytes / (1024 * 1024),
            plan.limits.max_supported_total_tokens,
            plan.limits.max_total_tokens
        );
        Ok(plan.limits)
    }

    /// Prefill and one decode step, whose results nobody sees.
    fn run_short_batch(&mut self, batch: NewBatch) -> Result<(), StepError> {
        if batch.requests.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new(batch, &self.sequence_context())?;
        while !batch.is_finished() {
            let rows = batch.rows().collect();
            step::compute(&mut *self.model, &mut self.step, &mut batch, rows, &self.liveness)?;
            batch.advance(usize::MAX);
            batch.report(&self.vocabulary, |_| true)?;
        }
        Ok(())
    }

    fn check_warm(&self) -> Result<(), String> {
        match self.pool.num_blocks() {
            0 => Err("there is no KV cache yet, expected a Warmup call before the first Prefill".to_string()),
            _ => Ok(()),
        }
    }

    fn sequence_context(&self) -> SequenceContext<'_> {
        SequenceContext {
            vocabulary: &self.vocabulary,
            pool: &self.pool,
            model: self.model.info(),
            request_logprobs: self.options.request_logprobs,
        }
    }
}

#[cfg(test)]
mod tests;
