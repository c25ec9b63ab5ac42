//! Random orders of calls against an engine on a GPU; every request is told what the CPU computes for it alone.

use std::collections::VecDeque;

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuOptions};
use backend::cuda::{CudaBackend, CudaOptions};
use backend::{Backend, StepInput};
use hub::{HubOptions, ModelFiles, ModelRef};
use models::{LoadOptions, load};

use super::caller::{Caller, Reference};
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

/// Greedy requests, computed by themselves on the CPU.
struct OnCpu {
    model: Box<dyn CausalLm>,
    compared: usize,
}

impl Reference for OnCpu {
    type ToCome = ToCome;

    fn request(&mut self, id: u64, lots: &mut Lots) -> (NewRequest, ToCome) {
        let vocab_size = self.model.info().vocab_size;
        let prompt: Vec<u32> =
            (0..1 + lots.below(60)).map(|_| 1 + lots.below(vocab_size - 1) as u32).collect();
        let count = 1 + lots.below(30);
        let mut request = request(id, 1);
        request.stopping.max_new_tokens = count as u32;
        request.chunk_len = lots.once_in(4).then(|| 1 + lots.below(40));
        let tokens = alone(self.model.as_mut(), &prompt, count);
        request.prompt = Prompt::Ids(prompt);
        (request, ToCome { tokens, is_certain: true })
    }

    fn compare(&mut self, to_come: &mut ToCome, told: Generation) -> bool {
        let request = told.request_id;
        let expected = to_come.tokens.pop_front().expect("not past the last token");
        to_come.is_certain &= expected.gap > NEAR_TIE;
        if to_come.is_certain {
            let (found, logprob) = (told.tokens.ids[0], told.tokens.logprobs[0]);
            assert_eq!(found, expected.id, "request {request}, gap {}", expected.gap);
            let error = (logprob - expected.logprob).abs();
            assert!(error < TOLERANCE, "request {request}: {logprob}, expected {}", expected.logprob);
            self.compared += 1;
        }
        assert_eq!(told.generated_text.is_some(), to_come.tokens.is_empty());
        to_come.tokens.is_empty()
    }
}

/// An engine that runs `model`, warmed up.
fn harness(model: Box<dyn CausalLm>, files: &ModelFiles) -> Harness {
    let options = EngineOptions { memory_fraction: 0.05, ..options() };
    let script = Arc::default();
    let mut harness = Harness { engine: Engine::new(model, vocabulary(files), options), script };
    let request =
        WarmupRequest { max_prefill_tokens: 48, max_total_tokens: Some(128), ..WarmupRequest::default() };
    harness.call(|reply| Command::Warmup { request, reply }).unwrap();
    harness
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
        let mut model = load_on(on_cpu, &files);
        model.allocate_kv_cache(1 + 128 / BLOCK_SIZE).unwrap();
        let mut caller = Caller::new(seed, harness(on_gpu, &files), OnCpu { model, compared: 0 });
        caller.run(CALLS / 2);
        let compared = caller.reference.compared;
        eprintln!("{compared} tokens compared, {} requests ended", caller.ended);
        assert!(compared > CALLS);
    }
}
