//! A model that can be computed by hand, a tokenizer of bytes, and requests for the tests.

mod byte_tokenizer;

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backend::sampling::{Sampled, SamplingParams, SamplingRow};
use backend::{BackendError, DType, DeviceInfo, MemoryInfo, StepInput};
use models::{CausalLm, ModelError, ModelInfo};

use super::block_pool::BlockPool;
use super::sequence::{Sequence, SequenceContext};
use super::*;
use byte_tokenizer::byte_tokenizer;

/// Tokens of the test vocabulary: every byte, then the special tokens.
pub(crate) const EOS: u32 = 256;
const VOCAB_SIZE: usize = 257;

/// Token id = byte, special tokens from 256 on.
pub(crate) fn byte_vocabulary(special: &[&str]) -> Vocabulary {
    let make = {
        let text = byte_tokenizer(special).to_string();
        move || hub::tokenizer_from_json(text.as_bytes()).map_err(|error| error.to_string())
    };
    Vocabulary::new(make().unwrap(), Box::new(make), vec![EOS])
}

pub(crate) fn model_info() -> ModelInfo {
    ModelInfo {
        dtype: DType::F32,
        device: DeviceInfo { device_type: "cpu", description: "test".to_string(), is_asynchronous: false },
        vocab_size: VOCAB_SIZE,
        max_position_embeddings: 4096,
        block_size: 16,
        block_bytes: 16 * 1024,
        max_step_tokens: 64,
        memory: vec![("weights".to_string(), 1)],
    }
}

pub(crate) fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        do_sample: false,
        seed: 0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
    }
}

/// A greedy request with a prompt of `prompt_len` tokens that is different for every id, and four new tokens.
pub(crate) fn request(id: u64, prompt_len: usize) -> NewRequest {
    let ids = (0..prompt_len as u64)
        .map(|index| b'a' as u32 + ((id.wrapping_mul(7).wrapping_add(index * index)) % 26) as u32);
    NewRequest {
        id,
        prompt: Prompt::Ids(ids.collect()),
        generated: Vec::new(),
        truncate: 0,
        sampling: greedy(),
        stopping: StoppingParams { max_new_tokens: 4, stop_sequences: Vec::new(), ignore_eos: true },
        prefill_logprobs: false,
        top_n: 0,
        blocks: Vec::new(),
        slots: Vec::new(),
        cache_len: 0,
        chunk_len: None,
    }
}

/// What the test model answers to a sequence: mostly letters, sometimes a line end, the end-of-text token or half a
/// character.
pub(crate) fn next_token(history: &[u32], params: &SamplingParams) -> Sampled {
    let seed = if params.is_greedy() { 0 } else { params.seed };
    let hash = hash(history.iter().copied().chain([seed as u32]));
    let id = match hash % 64 {
        letter @ 0..=51 => b'a' as u32 + letter as u32 % 26,
        52..=54 => 0xc3,
        55..=57 => 0xa4,
        58..=60 => b'\n' as u32,
        61 => EOS,
        _ => b' ' as u32,
    };
    Sampled { id, logprob: -(((hash >> 8) % 1000) as f32) / 100.0, top: Vec::new() }
}

/// What the test model says of `target` after `history`.
pub(crate) fn target_logprob(history: &[u32], target: u32) -> f32 {
    -((hash(history.iter().copied().chain([target, 1])) % 1000) as f32) / 100.0
}

fn hash(values: impl Iterator<Item = u32>) -> u64 {
    let folded = values.fold(0xcbf2_9ce4_8422_2325, |state: u64, value| {
        (state ^ u64::from(value)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
    });
    (folded ^ (folded >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16
}

/// What the test model was asked, and how it shall behave.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// Every pass: number of tokens of each sequence.
    pub(crate) passes: Vec<Vec<usize>>,
    /// The pass of this number (counted from 0) fails.
    pub(crate) fail_at: Option<usize>,
    /// The pass of this number panics.
    pub(crate) panic_at: Option<usize>,
    /// Free memory it reports.
    pub(crate) available_bytes: usize,
}

/// A model whose KV cache holds token ids, and whose next token is [`next_token`] of what it finds there.
pub(crate) struct TestModel {
    info: ModelInfo,
    cache: Vec<u32>,
    last: StepInput,
    script: Arc<Mutex<Script>>,
}

impl TestModel {
    pub(crate) fn new(info: ModelInfo, script: Arc<Mutex<Script>>) -> Self {
        Self { info, cache: Vec::new(), last: StepInput::default(), script }
    }

    /// What the cache holds of the sequence that owns token `row` of the last step, up to that token.
    fn context(&self, row: u32) -> Vec<u32> {
        let step = &self.last;
        let seq = step.cu_seqlens_q.iter().rposition(|&first| first <= row).unwrap();
        let table = step.block_table(seq);
        let size = self.info.block_size;
        (0..=step.position_ids[row as usize] as usize)
            .map(|position| self.cache[table[position / size] as usize * size + position % size])
            .collect()
    }
}

impl CausalLm for TestModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo, ModelError> {
        let available_bytes = self.script.lock().unwrap().available_bytes;
        Ok(MemoryInfo { total_bytes: available_bytes, available_bytes })
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        self.cache = vec![u32::MAX; num_blocks * self.info.block_size];
        Ok(())
    }

    fn forward(&mut self, step: &StepInput) -> Result<(), ModelError> {
        let mut script = self.script.lock().unwrap();
        let number = script.passes.len();
        script.passes.push(step.cu_seqlens_q.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect());
        if script.fail_at == Some(number) {
            let (operation, reason) = ("forward".to_string(), "the device has gone".to_string());
            return Err(BackendError::Device { operation, reason }.into());
        }
        let panics = script.panic_at == Some(number);
        drop(script);
        assert!(!panics, "scripted panic");
        assert!(step.num_tokens() > 0 && step.num_tokens() <= self.info.max_step_tokens);
        for (&slot, &id) in step.slot_mapping.iter().zip(&step.input_ids) {
            self.cache[slot as usize] = id;
        }
        self.last = step.clone();
        Ok(())
    }

    fn sample(&mut self, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>, ModelError> {
        assert_eq!(rows.len(), self.last.logits_rows.len());
        let rows = self.last.logits_rows.iter().zip(rows).map(|(&logits_row, row)| {
            let context = self.context(logits_row);
            assert_eq!(context, row.history, "the cache holds the sequence");
            let mut sampled = next_token(&context, row.params);
            sampled.top = (0..row.top_n).map(|rank| (b'a' as u32 + rank, -(rank as f32))).collect();
            sampled
        });
        Ok(rows.collect())
    }

    fn token_logprobs(&mut self, rows: &[u32], targets: &[u32]) -> Result<Vec<f32>, ModelError> {
        Ok(rows
            .iter()
            .zip(targets)
            .map(|(&row, &target)| target_logprob(&self.context(row), target))
            .collect())
    }
}

pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        rank: 0,
        world_size: 1,
        request_logprobs: true,
        memory_fraction: 1.0,
        model_max_length: None,
        max_input_tokens: None,
        max_total_tokens: None,
        run_ahead: true,
    }
}

/// An engine with the test model, called without a thread.
pub(crate) struct Harness {
    pub(crate) engine: Engine,
    pub(crate) script: Arc<Mutex<Script>>,
}

impl Harness {
    /// Not warmed up. The cache will have `num_blocks` blocks.
    pub(crate) fn cold(options: EngineOptions, num_blocks: usize) -> Self {
        Self::on_device(options, num_blocks, false)
    }

    /// As [`Harness::cold`]; `is_asynchronous`: on a device whose steps are launched before the last one's texts are made.
    fn on_device(options: EngineOptions, num_blocks: usize, is_asynchronous: bool) -> Self {
        let mut info = model_info();
        info.device.is_asynchronous = is_asynchronous;
        let available_bytes = num_blocks * info.block_bytes * 2;
        let script = Arc::new(Mutex::new(Script { available_bytes, ..Script::default() }));
        let model = Box::new(TestModel::new(info, Arc::clone(&script)));
        Self { engine: Engine::new(model, byte_vocabulary(&["<end>"]), options), script }
    }

    /// Warmed up.
    pub(crate) fn new(options: EngineOptions, num_blocks: usize) -> Self {
        Self::cold(options, num_blocks).warm()
    }

    /// Warmed up, on a device whose steps are launched before the last one's texts are made.
    pub(crate) fn asynchronous(options: EngineOptions, num_blocks: usize) -> Self {
        Self::on_device(options, num_blocks, true).warm()
    }

    fn warm(self) -> Self {
        let mut harness = self;
        let request = WarmupRequest { max_prefill_tokens: 48, ..WarmupRequest::default() };
        harness.call(|reply| Command::Warmup { request, reply }).unwrap();
        harness
    }

    /// Calls the engine; the model must not fail.
    pub(crate) fn call<T: Send + 'static>(
        &mut self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, String> {
        let (answer, outcome) = self.try_call(command);
        outcome.unwrap();
        answer
    }

    pub(crate) fn try_call<T: Send + 'static>(
        &mut self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> (Result<T, String>, Result<(), ModelError>) {
        let (sender, receiver) = channel();
        let reply: Reply<T> = Box::new(move |answer| sender.send(answer).unwrap());
        let outcome = self.engine.execute(command(reply));
        (receiver.try_recv().expect("every command is answered"), outcome)
    }

    pub(crate) fn prefill(
        &mut self,
        id: u64,
        requests: Vec<NewRequest>,
        cached_batch: Option<u64>,
    ) -> Result<StepReply, String> {
        let batch = NewBatch { id, requests };
        self.call(|reply| Command::Prefill { batch, cached_batch, received: Instant::now(), reply })
    }

    pub(crate) fn decode(&mut self, batch_ids: &[u64]) -> Result<StepReply, String> {
        let batch_ids = batch_ids.to_vec();
        self.call(|reply| Command::Decode { batch_ids, received: Instant::now(), reply })
    }

    pub(crate) fn filter(&mut self, batch_id: u64, request_ids: &[u64]) -> Result<CachedBatch, String> {
        let request_ids = request_ids.to_vec();
        self.call(|reply| Command::FilterBatch { batch_id, request_ids, reply })
    }

    pub(crate) fn clear(&mut self, batch_id: Option<u64>) {
        self.call(|reply| Command::ClearCache { batch_id, reply }).unwrap();
    }

    /// The passes since the last call of this function: number of tokens of each sequence.
    pub(crate) fn passes(&self) -> Vec<Vec<usize>> {
        std::mem::take(&mut self.script.lock().unwrap().passes)
    }

    pub(crate) fn blocks_used(&self) -> usize {
        self.engine.pool.num_used()
    }
}

/// What sequences are made with, without an engine.
pub(crate) struct Fixture {
    vocabulary: Vocabulary,
    pool: BlockPool,
    model: ModelInfo,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self { vocabulary: byte_vocabulary(&["<end>"]), pool: BlockPool::new(16), model: model_info() }
    }

    pub(in crate::engine) fn try_sequence(&self, request: NewRequest) -> Result<Sequence, String> {
        let context = SequenceContext {
            vocabulary: &self.vocabulary,
            pool: &self.pool,
            model: &self.model,
            request_logprobs: true,
        };
        Sequence::new(request, &context)
    }

    pub(in crate::engine) fn sequence(&self, request: NewRequest) -> Sequence {
        self.try_sequence(request).unwrap()
    }
}

/// SplitMix64: tests that draw lots must draw the same ones every time.
pub(crate) struct Lots(pub(crate) u64);

impl Lots {
    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}
