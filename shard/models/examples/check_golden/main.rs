//! Compares a model with reference outputs: tokens, and log-probabilities.
//!
//!     cargo run --release -p models --example check_golden -- MODEL GOLDEN [--ranks N] [--threads N] [--dtype D] [--chunk N] [--batch N]
//!         [--device cpu|cuda] [--rank R --rendezvous SOCKET] [--quantize fp8] [--kv-cache-dtype fp8_e4m3fn|fp8_e5m2]
//!
//! MODEL is a directory or a .gguf file. GOLDEN is JSON: either an object with a list `prompts`, or one object a line. Read
//! are, of each prompt: `input_ids`, `generated_ids` (greedy), `logprobs` and `gaps` of the generated ids (gap: best minus
//! second-best logit), and where present `last_logprobs` (log-softmax of the whole vocabulary after the prompt) and `prefill`
//! (log-probability of each prompt token, the first null).
//!
//! Ids are compared up to the first gap below 0.02: past a near-tie either choice is right and the texts part.
//! `--ranks` splits the model over that many threads that meet through shared memory as processes would; with `--rank` this process
//! is one of them, as ranks on GPUs have to be. `--chunk` cuts
//! prompts into steps of at most that many tokens, `--batch` computes so many prompts in the same steps. Exit code 1 when an id differs.

mod batch;
mod golden;
#[path = "../steps/mod.rs"]
mod steps;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use backend::collectives::Communicator;
use backend::collectives::shm::{Rendezvous, join};
use backend::cpu::{CpuBackend, CpuOptions};
use backend::{Backend, DType, KvDType};
use batch::{NEAR_TIE, Outcome, check, num_blocks};
use golden::{Case, read_cases};
use models::{CausalLm, LoadOptions, Quantize, load};
use steps::BLOCK_SIZE;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone)]
struct Arguments {
    model: String,
    golden: PathBuf,
    ranks: usize,
    threads: usize,
    dtype: Option<DType>,
    chunk: usize,
    batch: usize,
    is_cuda: bool,
    /// Gaps below this count as near-ties.
    near_tie: f64,
    quantize: Option<Quantize>,
    kv_dtype: Option<KvDType>,
    /// The only rank in this process.
    rank: Option<usize>,
    /// Where it meets the others.
    rendezvous: PathBuf,
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
    let (socket, own) = match arguments.rank {
        Some(rank) => (arguments.rendezvous.clone(), rank..rank + 1),
        None => (folder.path().join("rendezvous"), 0..arguments.ranks),
    };
    let (arguments, cases) = (&arguments, cases.as_slice());
    let mut results = std::thread::scope(|scope| {
        let ranks: Vec<_> = own
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
    if arguments.is_cuda {
        return run_on_cuda(arguments, cases, communicator);
    }
    let options = CpuOptions { threads: arguments.threads, isa: None, pin_threads: false };
    run_on(CpuBackend::new(options, communicator)?, arguments, cases)
}

#[cfg(feature = "cuda")]
fn run_on_cuda(
    arguments: &Arguments,
    cases: &[Case],
    communicator: Box<dyn Communicator>,
) -> Result<(String, Vec<Outcome>), Failure> {
    use backend::cuda::{CudaBackend, CudaOptions};
    run_on(CudaBackend::new(CudaOptions::default(), communicator)?, arguments, cases)
}

#[cfg(not(feature = "cuda"))]
fn run_on_cuda(
    _arguments: &Arguments,
    _cases: &[Case],
    _communicator: Box<dyn Communicator>,
) -> Result<(String, Vec<Outcome>), Failure> {
    Err("--device cuda needs --features cuda when this example is built".into())
}

fn run_on<B: Backend>(
    backend: B,
    arguments: &Arguments,
    cases: &[Case],
) -> Result<(String, Vec<Outcome>), Failure> {
    let begin = Instant::now();
    let model = hub::ModelRef { model_id: arguments.model.clone(), revision: None };
    let files = hub::locate(&model, &hub::HubOptions::default())?;
    let options = LoadOptions {
        dtype: arguments.dtype,
        quantize: arguments.quantize,
        kv_dtype: arguments.kv_dtype,
        block_size: BLOCK_SIZE,
        threads: arguments.threads,
        ..LoadOptions::default()
    };
    let mut decoder = load(backend, &files, &options)?;
    let loaded = begin.elapsed();
    // Every case is in some batch; the last batch is filled up with the first cases again.
    let num_batches = cases.len().div_ceil(arguments.batch);
    let batches: Vec<Vec<&Case>> = (0..num_batches)
        .map(|batch| cases.iter().cycle().skip(batch * arguments.batch).take(arguments.batch).collect())
        .collect();
    let blocks = |batch: &Vec<&Case>| batch.iter().map(|case| num_blocks(case)).sum::<usize>();
    decoder.allocate_kv_cache(batches.iter().map(blocks).max().unwrap_or(0) + 1)?;
    let begin = Instant::now();
    let mut outcomes = Vec::new();
    for batch in &batches {
        outcomes.extend(check(&mut decoder, batch, (arguments.chunk, arguments.near_tie))?);
    }
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
    for (case, outcome) in cases.iter().cycle().zip(outcomes) {
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

fn parse_arguments() -> Result<Arguments, Failure> {
    const USAGE: &str = "usage: check_golden MODEL GOLDEN [--ranks N] [--threads N] [--dtype float32|bfloat16|float16] [--chunk N] [--batch N] [--device cpu|cuda] [--rank R --rendezvous SOCKET] [--near-tie GAP] [--quantize fp8] [--kv-cache-dtype fp8_e4m3fn|fp8_e5m2]";
    let mut positional = Vec::new();
    let mut arguments = Arguments {
        model: String::new(),
        golden: PathBuf::new(),
        ranks: 1,
        threads: 1,
        dtype: None,
        chunk: usize::MAX,
        batch: 1,
        is_cuda: false,
        near_tie: NEAR_TIE,
        quantize: None,
        kv_dtype: None,
        rank: None,
        rendezvous: PathBuf::new(),
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
            "--batch" => arguments.batch = value.parse::<usize>()?.max(1),
            "--device" if matches!(value.as_str(), "cpu" | "cuda") => arguments.is_cuda = value == "cuda",
            "--quantize" => arguments.quantize = Some(Quantize::from_name(&value).ok_or(USAGE)?),
            "--kv-cache-dtype" => arguments.kv_dtype = Some(KvDType::from_fp8_name(&value).ok_or(USAGE)?),
            "--rank" => arguments.rank = Some(value.parse()?),
            "--rendezvous" => arguments.rendezvous = value.into(),
            "--near-tie" => arguments.near_tie = value.parse()?,
            "--dtype" => arguments.dtype = Some(DType::from_name(&value).ok_or(USAGE)?),
            _ => return Err(USAGE.into()),
        }
    }
    let [model, golden] = <[String; 2]>::try_from(positional).map_err(|_| USAGE)?;
    (arguments.model, arguments.golden) = (model, golden.into());
    Ok(arguments)
}
