//! Random orders of calls against an engine on a GPU; every request is told what the CPU computes for it alone.

use std::collections::{BTreeMap, VecDeque};

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuOptions};
use backend::cuda::{CudaBackend, CudaOptions};
use backend::{Backend, StepInput};
use hub::{HubOptions, ModelFiles, ModelRef};
use models::{LoadOptions, load};

use super::*;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../integration-tests/fixtures/tiny-llama");
const BLOCK_SIZE: usize = 16;
const CALLS: usize = 10_000;
/// Below this gap of the best two either token is right.
const NEAR_TIE: f32 = 1e-3;
/// Most difference of log-probabilities in float32.
const TOLERANCE: f32 = 1e-3;

fn load_on<B: Backend>(backend: B, files: &ModelFiles) -> Box<dyn CausalLm>
where
    models::Decoder<B>: CausalLm + 'static,
{
    let options = LoadOptions { dtype: Some(backend::DType::F32), ..LoadOptions::default() };
    Box::new(load(backend, files, &options).unwrap())
}

fn vocabulary(files: &ModelFiles) -> Vocabulary {
    let tokenizer = files.decoding_tokenizer().unwrap();
    let eos = files.generation_config().unwrap().eos_token_ids;
    let files = files.clone();
    let make = move || files.tokenizer().map_err(|error| error.to_string());
    Vocabulary::new(tokenizer, Box::new(make), eos)
}

/// A token that is to come.
#[derive(Clone, Copy)]
struct Expected {
    id: u32,
    logprob: f32,
    gap: f32,
}

/// The tokens of a greedy request, computed by itself on the CPU.
fn alone(model: &mut dyn CausalLm, prompt: &[u32], count: usize) -> VecDeque<Expected> {
    let mut ids = prompt.to_vec();
    let mut cached = 0;
    let max_blocks = (prompt.len() + count).div_ceil(BLOCK_SIZE);
    let mut expected = VecDeque::new();
    for _ in 0..count {
        let step = StepInput {
            input_ids: ids[cached..].to_vec(),
            position_ids: (cached as u32..ids.len() as u32).collect(),
            slot_mapping: (cached..ids.len()).map(|position| (BLOCK_SIZE + position) as u32).collect(),
            cu_seqlens_q: vec![0, (ids.len() - cached) as u32],
            context_lens: vec![ids.len() as u32],
            prompt_lens: vec![prompt.len() as u32],
            block_tables: (1..=max_blocks as u32).collect(),
            max_blocks,
            logits_rows: vec![(ids.len() - cached) as u32 - 1],
        };
        model.forward(&step).unwrap();
        let row = backend::sampling::SamplingRow { params: &greedy(), history: &ids, top_n: 2 };
        let token = model.sample(&[row]).unwrap().remove(0);
        cached = ids.len();
        ids.push(token.id);
        let gap = token.top[0].1 - token.top[1].1;
        expected.push_back(Expected { id: token.id, logprob: token.logprob, gap });
    }
    expected
}

/// What a request is still to be told. Past a near-tie only how many tokens.
struct ToCome {
    tokens: VecDeque<Expected>,
    is_certain: bool,
}

struct Caller {
    harness: Harness,
    reference: Box<dyn CausalLm>,
    vocab_size: usize,
    to_come: BTreeMap<u64, ToCome>,
    batches: BTreeMap<u64, Vec<u64>>,
    next_id: u64,
    lots: Lots,
    compared: usize,
    ended: usize,
}

impl Caller {
    fn new(seed: u64, model: Box<dyn CausalLm>, reference: Box<dyn CausalLm>, files: &ModelFiles) -> Self {
        let script = Arc::default();
        let vocab_size = model.info().vocab_size;
        let options = EngineOptions { memory_fraction: 0.05, ..options() };
        let mut harness = Harness { engine: Engine::new(model, vocabulary(files), options), script };
        let request =
            WarmupRequest { max_prefill_tokens: 48, max_total_tokens: Some(128), ..WarmupRequest::default() };
        harness.call(|reply| Command::Warmup { request, reply }).unwrap();
        Self {
            harness,
            reference,
            vocab_size,
            to_come: BTreeMap::new(),
            batches: BTreeMap::new(),
            next_id: 0,
            lots: Lots(seed),
            compared: 0,
            ended: 0,
        }
    }

    fn any_batch(&mut self) -> Option<u64> {
        let count = self.batches.len();
        (count > 0).then(|| *self.batches.keys().nth(self.lots.below(count)).unwrap())
    }

    fn one_call(&mut self) {
        match self.lots.below(10) {
            0 | 1 if self.to_come.len() < 24 => self.prefill(),
            2 => self.cancel(),
            3 if self.lots.once_in(8) => self.clear(),
            _ => self.decode(),
        }
    }

    fn prefill(&mut self) {
        let cached = if self.lots.once_in(3) { None } else { self.any_batch() };
        let id = 1000 + self.next_id;
        let mut members = cached.map(|id| self.batches.remove(&id).unwrap()).unwrap_or_default();
        let mut requests = Vec::new();
        for _ in 0..1 + self.lots.below(3) {
            let prompt: Vec<u32> = (0..1 + self.lots.below(60))
                .map(|_| 1 + self.lots.below(self.vocab_size - 1) as u32)
                .collect();
            let count = 1 + self.lots.below(30);
            let mut request = request(self.next_id, 1);
            request.stopping.max_new_tokens = count as u32;
            request.chunk_len = self.lots.once_in(4).then(|| 1 + self.lots.below(40));
            let tokens = alone(self.reference.as_mut(), &prompt, count);
            request.prompt = Prompt::Ids(prompt);
            self.to_come.insert(request.id, ToCome { tokens, is_certain: true });
            members.push(request.id);
            self.next_id += 1;
            requests.push(request);
        }
        let step = self.harness.prefill(id, requests, cached).unwrap();
        self.check(cached.unwrap_or(id), members, step);
    }

    fn decode(&mut self) {
        let Some(first) = self.any_batch() else { return };
        let mut ids = vec![first];
        let others: Vec<u64> = self.batches.keys().copied().filter(|id| *id != first).collect();
        ids.extend(others.into_iter().filter(|_| self.lots.once_in(3)));
        let members = ids.iter().flat_map(|id| self.batches.remove(id).unwrap()).collect();
        let step = self.harness.decode(&ids).unwrap();
        self.check(first, members, step);
    }

    fn check(&mut self, id: u64, members: Vec<u64>, step: StepReply) {
        for generation in step.generations {
            let request = generation.request_id;
            let to_come = self.to_come.get_mut(&request).expect("of a request that still runs");
            let expected = to_come.tokens.pop_front().expect("not past the last token");
            to_come.is_certain &= expected.gap > NEAR_TIE;
            if to_come.is_certain {
                let (found, logprob) = (generation.tokens.ids[0], generation.tokens.logprobs[0]);
                assert_eq!(found, expected.id, "request {request}, gap {}", expected.gap);
                let error = (logprob - expected.logprob).abs();
                assert!(error < TOLERANCE, "request {request}: {logprob}, expected {}", expected.logprob);
                self.compared += 1;
            }
            assert_eq!(generation.generated_text.is_some(), to_come.tokens.is_empty());
        }
        self.to_come.retain(|_, to_come| !to_come.tokens.is_empty());
        let running: Vec<u64> = members.iter().copied().filter(|id| self.to_come.contains_key(id)).collect();
        self.ended += members.len() - running.len();
        let Some(batch) = step.batch else {
            assert!(running.is_empty());
            return;
        };
        assert_eq!((batch.id, &batch.request_ids), (id, &members));
        self.batches.insert(id, members.clone());
        if running.len() < members.len() && !self.lots.once_in(4) {
            self.filter(id, running);
        }
    }

    fn cancel(&mut self) {
        let Some(id) = self.any_batch() else { return };
        let members = self.batches[&id].clone();
        let kept: Vec<u64> = members.iter().copied().filter(|_| !self.lots.once_in(4)).collect();
        if kept.iter().any(|id| self.to_come.contains_key(id)) {
            self.filter(id, kept);
        }
    }

    fn filter(&mut self, id: u64, kept: Vec<u64>) {
        let batch = self.harness.filter(id, &kept).unwrap();
        assert_eq!(batch.request_ids, kept);
        for dropped in self.batches.insert(id, kept.clone()).unwrap() {
            if !kept.contains(&dropped) {
                self.to_come.remove(&dropped);
            }
        }
    }

    fn clear(&mut self) {
        let Some(id) = self.any_batch() else { return };
        self.harness.clear(Some(id));
        for dropped in self.batches.remove(&id).unwrap() {
            self.to_come.remove(&dropped);
        }
    }
}

#[test]
fn any_order_of_calls_on_a_gpu_gives_every_request_what_the_cpu_gives_it_alone() {
    if let Err(error) = CudaBackend::find_device(0) {
        eprintln!("not on CUDA: {error}");
        return;
    }
    let model = ModelRef { model_id: MODEL.to_owned(), revision: None };
    let files = hub::locate(&model, &HubOptions::default()).unwrap();
    for (seed, graph_batches) in [(1, CudaOptions::default().graph_batches), (2, Vec::new())] {
        let options = CudaOptions { graph_batches, max_step_tokens: 64, ..CudaOptions::default() };
        let on_gpu = load_on(CudaBackend::new(options, Box::new(Single)).unwrap(), &files);
        let on_cpu =
            CpuBackend::new(CpuOptions { threads: 1, isa: None, pin_threads: false }, Box::new(Single))
                .unwrap();
        let mut reference = load_on(on_cpu, &files);
        reference.allocate_kv_cache(1 + 128 / BLOCK_SIZE).unwrap();
        let mut caller = Caller::new(seed, on_gpu, reference, &files);
        for _ in 0..CALLS / 2 {
            caller.one_call();
            if caller.batches.is_empty() {
                assert_eq!(caller.harness.blocks_used(), 0, "no batch, no blocks");
            }
        }
        caller.harness.clear(None);
        assert_eq!(caller.harness.blocks_used(), 0);
        eprintln!("{} tokens compared, {} requests ended", caller.compared, caller.ended);
        assert!(caller.compared > CALLS && caller.ended > CALLS / 100);
    }
}
