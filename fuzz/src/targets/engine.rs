//! Calls to an engine with a tiny model on the CPU: what a router that has lost its way might send, in any order.
//!
//! Every call must be answered, with a result or with one line, and the engine must go on: after all of it, and a cleared cache,
//! an honest request gets the tokens that it gets from a fresh engine.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Instant;

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuOptions};
use models::LoadOptions;
use proto::v3;
use shard::engine::{Command, Engine, EngineOptions, NewBatch, Reply, StepReply, Vocabulary, WarmupRequest};

use super::loading;
use crate::message::check_line;
use crate::scratch::Scratch;

/// Tokens of a KV block.
const BLOCK_SIZE: usize = 16;
/// Longest prompt and answer.
const MAX_TOTAL_TOKENS: usize = 48;
/// Calls of one input.
const MAX_CALLS: usize = 40;
/// Of the tiny model.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, "model": {"type": "WordLevel",
    "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "g": 6, "h": 7}, "unk_token": "a"}}"#;

static MODEL: LazyLock<Scratch> = LazyLock::new(|| {
    let weights = include_bytes!("../../seeds/safetensors/f32");
    Scratch::with(&[("config.json", loading::CONFIG.as_bytes()), ("model.safetensors", weights)])
});

/// What a fresh engine answers.
static EXPECTED: LazyLock<Vec<u32>> = LazyLock::new(|| honest_answer(&mut engine()));

/// Makes the calls that the input describes.
///
/// # Panics
/// A call is not answered, or the engine gives up or is not what it was before.
pub fn run(input: &[u8]) {
    let expected = &*EXPECTED;
    let mut engine = engine();
    let mut bytes = Bytes(input);
    if bytes.flag() {
        warm_up(&mut engine, honest_warmup());
    }
    for _ in 0..MAX_CALLS {
        if bytes.0.is_empty() {
            break;
        }
        call(&mut engine, &mut bytes);
    }
    assert_eq!(honest_answer(&mut engine), *expected, "the engine is not what it was");
}

fn engine() -> Engine {
    let files = loading::locate(MODEL.path()).expect("the model is there");
    let options = CpuOptions { threads: 1, isa: None, pin_threads: false };
    let backend = CpuBackend::new(options, Box::new(Single)).expect("a backend on this machine");
    let options = LoadOptions { block_size: BLOCK_SIZE, ..LoadOptions::default() };
    let model = models::load(backend, &files, &options).expect("a sound model");
    let tokenizer = || hub::tokenizer_from_json(TOKENIZER.as_bytes()).map_err(|error| error.to_string());
    let vocabulary = Vocabulary::new(tokenizer().expect("a tokenizer"), Box::new(tokenizer), vec![7]);
    let options = EngineOptions {
        rank: 0,
        world_size: 1,
        request_logprobs: true,
        // Few enough blocks that some inputs run out of them.
        memory_fraction: 1e-5,
        model_max_length: None,
        max_input_tokens: None,
        max_total_tokens: None,
        run_ahead: true,
    };
    Engine::new(Box::new(model), vocabulary, options)
}

/// Makes a call, which must be answered; the answer, unless it was refused.
fn answered<T: Send + 'static>(engine: &mut Engine, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
    let slot = Arc::new(Mutex::new(None));
    let reply = Arc::clone(&slot);
    let command = command(Box::new(move |answer| {
        *reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }));
    let outcome = engine.execute(command);
    assert!(outcome.is_ok() && !engine.has_failed(), "the engine gave up: {outcome:?}");
    let answer = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    answer.expect("every call is answered").inspect_err(|problem| check_line(problem)).ok()
}

fn prefill(engine: &mut Engine, batch: NewBatch, cached_batch: Option<u64>) -> Option<StepReply> {
    let received = Instant::now();
    answered(engine, |reply| Command::Prefill { batch, cached_batch, received, reply })
}

fn decode(engine: &mut Engine, batch_ids: Vec<u64>) -> Option<StepReply> {
    answered(engine, |reply| Command::Decode { batch_ids, received: Instant::now(), reply })
}

fn warm_up(engine: &mut Engine, request: WarmupRequest) {
    answered(engine, |reply| Command::Warmup { request, reply });
}

fn honest_warmup() -> WarmupRequest {
    let request = v3::Request { inputs: "a b c".to_owned(), ..honest_request() };
    WarmupRequest {
        batch: new_batch(1, vec![request]).expect("an honest batch"),
        max_input_tokens: Some(32),
        max_prefill_tokens: 64,
        max_total_tokens: Some(MAX_TOTAL_TOKENS),
    }
}

fn honest_request() -> v3::Request {
    let parameters = v3::NextTokenChooserParameters {
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..Default::default()
    };
    let stopping =
        v3::StoppingCriteriaParameters { max_new_tokens: 6, ignore_eos_token: true, ..Default::default() };
    v3::Request {
        id: 1,
        input_ids: vec![1, 2, 3, 4, 5, 6],
        truncate: 32,
        parameters: Some(parameters),
        stopping_parameters: Some(stopping),
        ..Default::default()
    }
}

/// The tokens of an honest request, once everything is cleared.
fn honest_answer(engine: &mut Engine) -> Vec<u32> {
    answered(engine, |reply| Command::ClearCache { batch_id: None, reply });
    warm_up(engine, honest_warmup());
    let batch = new_batch(9, vec![honest_request()]).expect("an honest batch");
    let mut answer = prefill(engine, batch, None).expect("an honest prefill is served");
    let mut ids = Vec::new();
    loop {
        ids.extend(answer.generations.iter().flat_map(|generation| generation.tokens.ids.iter().copied()));
        match answer.batch {
            None => return ids,
            Some(batch) => answer = decode(engine, vec![batch.id]).expect("an honest decode is served"),
        }
    }
}

fn new_batch(id: u64, requests: Vec<v3::Request>) -> Option<NewBatch> {
    let batch = v3::Batch { id, size: requests.len() as u32, requests, ..Default::default() };
    shard::server::new_batch(batch).inspect_err(|problem| check_line(problem)).ok()
}

fn call(engine: &mut Engine, bytes: &mut Bytes<'_>) {
    match bytes.byte() % 8 {
        0..=2 => {
            let (id, cached) = (bytes.small(), bytes.flag().then(|| bytes.small()));
            let requests = (0..bytes.byte() % 5).map(|_| request(bytes)).collect();
            if let Some(batch) = new_batch(id, requests) {
                prefill(engine, batch, cached);
            }
        }
        3 | 4 => {
            let ids = (0..bytes.byte() % 4).map(|_| bytes.small()).collect();
            decode(engine, ids);
        }
        5 => {
            let batch_id = bytes.small();
            let request_ids = (0..bytes.byte() % 5).map(|_| bytes.small()).collect();
            answered(engine, |reply| Command::FilterBatch { batch_id, request_ids, reply });
        }
        6 => {
            let batch_id = bytes.flag().then(|| bytes.small());
            answered(engine, |reply| Command::ClearCache { batch_id, reply });
        }
        _ => {
            let batch = new_batch(bytes.small(), vec![request(bytes)]).unwrap_or_default();
            let request = WarmupRequest {
                batch,
                max_input_tokens: bytes.flag().then(|| bytes.number() as usize),
                max_prefill_tokens: bytes.number() as usize,
                max_total_tokens: bytes.flag().then(|| bytes.number() as usize),
            };
            warm_up(engine, request);
        }
    }
}

/// A request with anything in it; half of them are mostly honest, so that there is something for the others to disturb.
fn request(bytes: &mut Bytes<'_>) -> v3::Request {
    let mut request = honest_request();
    request.id = bytes.small();
    request.input_ids = (0..bytes.byte() % 24).map(|_| u32::from(bytes.byte() % 8)).collect();
    if bytes.flag() {
        return request;
    }
    let mut numbers = |most: u8| (0..bytes.byte() % most).map(|_| bytes.number() as u32).collect::<Vec<_>>();
    let (ids, generated) = (numbers(6), numbers(4));
    (request.blocks, request.slots) = (numbers(16), numbers(48));
    request.input_ids.extend(ids);
    request.generated_ids = generated;
    request.inputs = "a b h".repeat(usize::from(bytes.byte() % 3));
    request.truncate = bytes.number() as u32;
    request.cache_len = bytes.number() as u32;
    request.chunk_len = bytes.flag().then(|| bytes.number() as u32);
    request.prefill_logprobs = bytes.flag();
    request.top_n_tokens = bytes.number() as u32;
    request.stopping_parameters = Some(v3::StoppingCriteriaParameters {
        max_new_tokens: bytes.number() as u32,
        stop_sequences: (0..bytes.byte() % 3).map(|_| "b".repeat(usize::from(bytes.byte() % 3))).collect(),
        ignore_eos_token: bytes.flag(),
    });
    request.parameters = Some(v3::NextTokenChooserParameters {
        temperature: bytes.float(),
        top_k: bytes.number() as u32,
        top_p: bytes.float(),
        typical_p: bytes.float(),
        do_sample: bytes.flag(),
        seed: bytes.number(),
        repetition_penalty: bytes.float(),
        frequency_penalty: bytes.float(),
        ..Default::default()
    });
    request
}

/// The input; zeros behind its end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// The number of a batch or a request: few, so that they meet.
    fn small(&mut self) -> u64 {
        u64::from(self.byte() % 6)
    }

    /// Mostly one that could be right.
    fn number(&mut self) -> u64 {
        match self.byte() {
            byte @ 0..240 => u64::from(byte % 64),
            byte => [255, 1024, 4095, 65_536, (1 << 31) - 1, 1 << 31, u64::from(u32::MAX), u64::MAX]
                [usize::from(byte % 8)],
        }
    }

    fn float(&mut self) -> f32 {
        let values = [1.0, 1.0, 0.5, 0.0, -1.0, 2.0, 1e-30, 1e30, f32::NAN, f32::INFINITY];
        values[usize::from(self.byte()) % values.len()]
    }
}
