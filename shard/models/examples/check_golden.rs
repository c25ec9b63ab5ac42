//! Compares a model with reference outputs: tokens, and log-probabilities.
//!
//!     cargo run --release -p models --example check_golden -- MODEL GOLDEN [--ranks N] [--threads N] [--dtype D] [--chunk N]
//!
//! MODEL is a directory or a .gguf file. GOLDEN is JSON: either an object with a list `prompts`, or one object a line. Read
//! are, of each prompt: `input_ids`, `generated_ids` (greedy), `logprobs` and `gaps` of the generated ids (gap: best minus
//! second-best logit), and where present `last_logprobs` (log-softmax of the whole vocabulary after the prompt) and `prefill`
//! (log-probability of each prompt token, the first null).
//!
//! Ids are compared up to the first gap below 0.02: past a near-tie either choice is right and the texts part.
//! `--ranks` splits the model over that many threads that meet through shared memory as processes would; `--chunk` cuts
//! prompts into steps of at most that many tokens. Exit code 1 when an id differs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use backend::collectives::shm::{Rendezvous, join};
use backend::cpu::{CpuBackend, CpuOptions};
use backend::sampling::{SamplingParams, SamplingRow};
use backend::{DType, StepInput};
use models::{CausalLm, Decoder, LoadOptions, load};
use serde_json::Value;

/// Below this gap the reference itself could have chosen otherwise.
const NEAR_TIE: f64 = 0.02;
const BLOCK_SIZE: usize = 16;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone)]
struct Arguments {
    model: String,
    golden: PathBuf,
    ranks: usize,
    threads: usize,
    dtype: Option<DType>,
    chunk: usize,
}

/// One prompt of the reference.
struct Case {
    name: String,
    input_ids: Vec<u32>,
    generated_ids: Vec<u32>,
    logprobs: Vec<f64>,
    gaps: Vec<f64>,
    last_logprobs: Vec<f64>,
    /// Of the second prompt token and those after it.
    prefill: Vec<f64>,
}

/// What came of one prompt.
#[derive(Clone, PartialEq)]
struct Outcome {
    ids: Vec<u32>,
    /// Steps before the first near-tie.
    comparable: usize,
    /// Steps of those whose ids are equal.
    equal: usize,
    worst_generated: f64,
    worst_last: f64,
    worst_prefill: f64,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Failure> {
    let arguments = parse_arguments()?;
    let cases = read_cases(&arguments.golden)?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("rendezvous");
    let (arguments, cases) = (&arguments, cases.as_slice());
    let mut results = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..arguments.ranks)
            .map(|rank| {
                let socket = socket.clone();
                scope.spawn(move || run_rank(arguments, cases, rank, socket))
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().map_err(|_| "a rank panicked")?)
            .collect::<Result<Vec<_>, _>>()
    })?;
    let all_equal = results.windows(2).all(|pair| pair[0].1 == pair[1].1);
    let (header, outcomes) = results.swap_remove(0);
    eprintln!("{header}");
    print_table(cases, &outcomes);
    if !all_equal {
        eprintln!("the ranks' results differ");
    }
    Ok(all_equal && outcomes.iter().all(|outcome| outcome.equal == outcome.comparable))
}

fn run_rank(
    arguments: &Arguments,
    cases: &[Case],
    rank: usize,
    socket: PathBuf,
) -> Result<(String, Vec<Outcome>), Failure> {
    let rendezvous = Rendezvous {
        socket,
        rank,
        world_size: arguments.ranks,
        fingerprint: "check_golden".to_owned(),
        timeout: Duration::from_secs(60),
    };
    let communicator = Box::new(join(&rendezvous)?);
    let begin = Instant::now();
    let options = CpuOptions { threads: arguments.threads, isa: None };
    let backend = CpuBackend::new(options, communicator)?;
    let model = hub::ModelRef { model_id: arguments.model.clone(), revision: None };
    let files = hub::locate(&model, &hub::HubOptions::default())?;
    let options = LoadOptions {
        dtype: arguments.dtype,
        block_size: BLOCK_SIZE,
        threads: arguments.threads,
        ..LoadOptions::default()
    };
    let mut decoder = load(backend, &files, &options)?;
    let loaded = begin.elapsed();
    let longest = cases.iter().map(|case| case.input_ids.len() + case.generated_ids.len()).max().unwrap_or(0);
    decoder.allocate_kv_cache(longest.div_ceil(BLOCK_SIZE) + 1)?;
    let begin = Instant::now();
    let outcomes =
        cases.iter().map(|case| check(&mut decoder, case, arguments.chunk)).collect::<Result<_, _>>()?;
    let info = decoder.info();
    let header = format!(
        "{}: {}, {}, {} rank(s); loaded in {:.3} s, run in {:.3} s\nmemory of rank 0: {:?}",
        arguments.model,
        info.dtype,
        info.device.description,
        arguments.ranks,
        loaded.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
        info.memory,
    );
    Ok((header, outcomes))
}

fn check(decoder: &mut Decoder<CpuBackend>, case: &Case, chunk: usize) -> Result<Outcome, Failure> {
    let comparable = case.gaps.iter().position(|&gap| gap < NEAR_TIE).unwrap_or(case.gaps.len());
    let mut outcome = Outcome {
        ids: Vec::new(),
        comparable,
        equal: 0,
        worst_generated: 0.0,
        worst_last: 0.0,
        worst_prefill: 0.0,
    };
    let worst = |worst: &mut f64, found: f64, expected: f64| *worst = worst.max((found - expected).abs());
    let mut history = Vec::new();
    let chunk = chunk.min(decoder.info().max_step_tokens);
    for ids in case.input_ids.chunks(chunk) {
        let first = history.len();
        history.extend_from_slice(ids);
        decoder.forward(&step(&history, first, case.input_ids.len()))?;
        // The targets are the prompt's following tokens; after its last one there is none.
        let targets = &case.input_ids[first + 1..(first + ids.len() + 1).min(case.input_ids.len())];
        let rows: Vec<u32> = (0..targets.len() as u32).collect();
        let logprobs = decoder.token_logprobs(&rows, targets)?;
        for (logprob, &expected) in logprobs.iter().zip(case.prefill.iter().skip(first)) {
            worst(&mut outcome.worst_prefill, f64::from(*logprob), expected);
        }
    }
    let last = (case.input_ids.len() - 1) % chunk;
    let logprobs = log_softmax(&decoder.read_logits(&[last as u32])?);
    for (logprob, &expected) in logprobs.iter().zip(&case.last_logprobs) {
        worst(&mut outcome.worst_last, *logprob, expected);
    }
    for (index, &expected) in case.generated_ids.iter().enumerate() {
        let row = SamplingRow { params: &GREEDY, history: &history, top_n: 0 };
        let sampled = decoder.sample(&[row])?.remove(0);
        outcome.ids.push(sampled.id);
        if index >= comparable || sampled.id != expected {
            break;
        }
        outcome.equal += 1;
        worst(&mut outcome.worst_generated, f64::from(sampled.logprob), case.logprobs[index]);
        history.push(sampled.id);
        decoder.forward(&step(&history, history.len() - 1, case.input_ids.len()))?;
    }
    Ok(outcome)
}

const GREEDY: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    typical_p: 1.0,
    do_sample: false,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
};

/// A step of one sequence: the tokens of `history` from `first` on, of a prompt of `prompt_len`.
fn step(history: &[u32], first: usize, prompt_len: usize) -> StepInput {
    let len = history.len();
    let num_blocks = len.div_ceil(BLOCK_SIZE);
    let block_tables: Vec<u32> = (1..=num_blocks as u32).collect();
    StepInput {
        input_ids: history[first..].to_vec(),
        position_ids: (first as u32..len as u32).collect(),
        slot_mapping: (first..len)
            .map(|position| {
                block_tables[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
            })
            .collect(),
        cu_seqlens_q: vec![0, (len - first) as u32],
        context_lens: vec![len as u32],
        prompt_lens: vec![prompt_len as u32],
        block_tables,
        max_blocks: num_blocks,
        logits_rows: vec![(len - first - 1) as u32],
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - max) - sum.ln()).collect()
}

fn print_table(cases: &[Case], outcomes: &[Outcome]) {
    eprintln!(
        "{:<16} {:>6} {:>14} {:>10} {:>10} {:>10}",
        "prompt", "tokens", "equal", "generated", "last", "prefill"
    );
    let line = |name: &str, tokens: usize, o: &Outcome| {
        eprintln!(
            "{name:<16} {tokens:>6} {:>6} of {:>4} {:>10.6} {:>10.6} {:>10.6}",
            o.equal, o.comparable, o.worst_generated, o.worst_last, o.worst_prefill
        );
    };
    for (case, outcome) in cases.iter().zip(outcomes) {
        line(&case.name, case.input_ids.len(), outcome);
    }
    let worst = |of: fn(&Outcome) -> f64| outcomes.iter().map(of).fold(0.0, f64::max);
    let total = Outcome {
        ids: Vec::new(),
        comparable: outcomes.iter().map(|outcome| outcome.comparable).sum(),
        equal: outcomes.iter().map(|outcome| outcome.equal).sum(),
        worst_generated: worst(|outcome| outcome.worst_generated),
        worst_last: worst(|outcome| outcome.worst_last),
        worst_prefill: worst(|outcome| outcome.worst_prefill),
    };
    line("all", cases.iter().map(|case| case.input_ids.len()).sum(), &total);
}

fn read_cases(path: &Path) -> Result<Vec<Case>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let prompts = match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(mut object)) if object.contains_key("prompts") => match object.remove("prompts") {
            Some(Value::Array(prompts)) => prompts,
            _ => return Err("prompts is not a list".into()),
        },
        _ => text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?,
    };
    let case = |(index, prompt): (usize, &Value)| Case {
        name: prompt["name"].as_str().map_or_else(|| index.to_string(), str::to_owned),
        input_ids: ids(&prompt["input_ids"]),
        generated_ids: ids(&prompt["generated_ids"]),
        logprobs: numbers(&prompt["logprobs"]),
        gaps: numbers(&prompt["gaps"]),
        last_logprobs: numbers(&prompt["last_logprobs"]),
        prefill: numbers(&prompt["prefill"]),
    };
    Ok(prompts.iter().enumerate().map(case).collect())
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|number| number as u32).collect()
}

/// The numbers of a list, without nulls.
fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

fn parse_arguments() -> Result<Arguments, Failure> {
    const USAGE: &str = "usage: check_golden MODEL GOLDEN [--ranks N] [--threads N] [--dtype float32|bfloat16|float16] [--chunk N]";
    let mut positional = Vec::new();
    let mut arguments = Arguments {
        model: String::new(),
        golden: PathBuf::new(),
        ranks: 1,
        threads: 1,
        dtype: None,
        chunk: usize::MAX,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            positional.push(word);
            continue;
        }
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--ranks" => arguments.ranks = value.parse::<usize>()?.max(1),
            "--threads" => arguments.threads = value.parse()?,
            "--chunk" => arguments.chunk = value.parse::<usize>()?.max(1),
            "--dtype" => arguments.dtype = Some(DType::from_name(&value).ok_or(USAGE)?),
            _ => return Err(USAGE.into()),
        }
    }
    let [model, golden] = <[String; 2]>::try_from(positional).map_err(|_| USAGE)?;
    (arguments.model, arguments.golden) = (model, golden.into());
    Ok(arguments)
}
