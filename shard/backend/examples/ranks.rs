//! How long sums and gathers over GPUs take, by size.
//!
//!     cargo run --release -p backend --features cuda --example ranks -- R/N SOCKET auto|peers|nccl|host
//!
//! One of N processes, each with a device of its own (CUDA_VISIBLE_DEVICES). Rank 0 prints a JSON object a line: bytes of a message,
//! microseconds of a sum in a recorded step and launch by launch. Every time is the best of several runs of many sums.

#![allow(clippy::print_stdout, reason = "the lines are what it is for")]

use std::time::{Duration, Instant};

use backend::collectives::shm::{Rendezvous, join};
use backend::cuda::{CudaBackend, CudaOptions, RankPath};
use backend::{Backend, BackendError, DType, HostMatrix, StepInput, StepPart};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const USAGE: &str = "usage: ranks R/N SOCKET auto|peers|nccl|host";
const WIDTH: usize = 4096;
/// Sums in a step.
const SUMS: usize = 64;
const RUNS: usize = 8;

fn main() -> Result<(), Failure> {
    let [rank, socket, path] =
        <[String; 3]>::try_from(std::env::args().skip(1).collect::<Vec<_>>()).map_err(|_| USAGE)?;
    let (rank, ranks) = rank.split_once('/').ok_or(USAGE)?;
    let (rank, ranks) = (rank.parse::<usize>()?, ranks.parse::<usize>()?);
    let communicator = join(&Rendezvous {
        socket: socket.into(),
        rank,
        world_size: ranks,
        fingerprint: "ranks".to_owned(),
        timeout: Duration::from_secs(60),
    })?;
    let begin = Instant::now();
    let rank_path = RankPath::from_name(&path).ok_or(USAGE)?;
    let rows = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];
    let options = CudaOptions { rank_path, graph_batches: rows.to_vec(), ..CudaOptions::default() };
    let mut backend = CudaBackend::new(options, Box::new(communicator))?;
    let opened = begin.elapsed();
    for rows in rows {
        let recorded = if rows <= 1024 { Some(sum_time(&mut backend, rows, true)?) } else { None };
        let launched = sum_time(&mut backend, rows, false)?;
        let gathered = if rows <= 256 { Some(gather_time(&mut backend, rows, ranks)?) } else { None };
        if rank == 0 {
            let micros = |time: Option<f64>| {
                time.map_or_else(|| "null".to_owned(), |seconds| format!("{:.2}", seconds * 1e6))
            };
            println!(
                r#"{{"path": "{path}", "ranks": {ranks}, "rows": {rows}, "bytes": {}, "recorded_us": {}, "launched_us": {}, "gather_128256_us": {}, "opened_s": {:.3}}}"#,
                rows * WIDTH * 2,
                micros(recorded),
                micros(Some(launched)),
                micros(gathered),
                opened.as_secs_f64()
            );
        }
    }
    Ok(())
}

/// Seconds of one sum of `rows` rows of bf16.
fn sum_time(backend: &mut CudaBackend, rows: usize, is_recorded: bool) -> Result<f64, Failure> {
    let mut x = filled(backend, rows, WIDTH, DType::BF16)?;
    let done = filled(backend, 1, 1, DType::F32)?;
    let mut best = f64::MAX;
    for _ in 0..RUNS {
        backend.begin_step(&step_of(rows))?;
        let begin = Instant::now();
        let mut sums = |backend: &mut CudaBackend| (0..SUMS).try_for_each(|_| backend.all_reduce(&mut x));
        if is_recorded {
            backend.run(StepPart::Layers, sums)?
        } else {
            sums(backend)?
        }
        backend.read(&done)?;
        best = best.min(begin.elapsed().as_secs_f64() / SUMS as f64);
    }
    Ok(best)
}

/// Seconds of one gather of logits of 128,256 columns.
fn gather_time(backend: &mut CudaBackend, rows: usize, ranks: usize) -> Result<f64, Failure> {
    let width = 128_256 / ranks;
    let local = filled(backend, rows, width, DType::F32)?;
    let done = filled(backend, 1, 1, DType::F32)?;
    let mut out = backend.buffer(rows, width * ranks, DType::F32)?;
    let mut best = f64::MAX;
    for _ in 0..RUNS {
        let begin = Instant::now();
        for _ in 0..8 {
            backend.all_gather(&local, &vec![width; ranks], &mut out)?;
        }
        backend.read(&done)?;
        best = best.min(begin.elapsed().as_secs_f64() / 8.0);
    }
    Ok(best)
}

/// Rows that are not zero, but small enough to be added up many times.
fn filled(
    backend: &mut CudaBackend,
    rows: usize,
    width: usize,
    dtype: DType,
) -> Result<<CudaBackend as Backend>::Buffer, BackendError> {
    let bytes: Vec<u8> = (0..width).flat_map(|at| (at as f32 * 1e-30).to_le_bytes()).collect();
    let matrix =
        HostMatrix { dtype: DType::F32, rows: 1, cols: width, row_stride: width, bytes: bytes.into() };
    let table = backend.linear(&[matrix], DType::F32)?;
    let mut buffer = backend.buffer(rows, width, dtype)?;
    backend.begin_step(&step_of(rows))?;
    backend.embed(&table, 0, &mut buffer)?;
    // The table goes when nothing reads it any more.
    backend.read(&buffer)?;
    Ok(buffer)
}

/// Sequences of one token each, or one prompt where they are more than a step has.
fn step_of(rows: usize) -> StepInput {
    let count = rows as u32;
    let num_seqs = if rows <= 1024 { count } else { 1 };
    let tokens = count / num_seqs;
    StepInput {
        input_ids: vec![0; rows],
        position_ids: vec![0; rows],
        slot_mapping: (16..16 + count).collect(),
        cu_seqlens_q: (0..=num_seqs).map(|seq| seq * tokens).collect(),
        context_lens: vec![tokens; num_seqs as usize],
        prompt_lens: vec![tokens - 1; num_seqs as usize],
        block_tables: vec![1; num_seqs as usize * tokens.div_ceil(16) as usize],
        max_blocks: tokens.div_ceil(16) as usize,
        logits_rows: (0..num_seqs).collect(),
    }
}
