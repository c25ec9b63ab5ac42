//! Choosing tokens of a vocabulary of 128256, with the wait for the device.

use std::time::Instant;

use backend::cuda::CudaBackend;
use backend::sampling::{SamplingParams, SamplingRow};
use backend::{Backend, BackendError, DType};

use crate::measure::{Figure, Random, buffer};

const VOCAB: usize = 128_256;
const RUNS: usize = 41;

/// `sample` with common parameters. Times are of whole calls.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let plain = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        do_sample: false,
        seed: 5,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
    };
    let on = SamplingParams { do_sample: true, ..plain.clone() };
    let cases = [
        ("greedy", plain.clone(), 0),
        ("greedy, top 5", plain.clone(), 5),
        ("greedy, repetition", SamplingParams { repetition_penalty: 1.1, ..plain }, 0),
        ("sampled", on.clone(), 0),
        ("temperature, top-p", SamplingParams { temperature: 0.8, top_p: 0.95, ..on.clone() }, 0),
        ("top-k", SamplingParams { top_k: 50, ..on.clone() }, 0),
        ("all", SamplingParams { temperature: 0.8, top_k: 50, top_p: 0.9, repetition_penalty: 1.1, ..on }, 0),
    ];
    let history: Vec<u32> = (0..2000u32).map(|at| at * 37 % VOCAB as u32).collect();
    let mut figures = Vec::new();
    for rows in [1, 8, 32, 128] {
        let mut logits = buffer(backend, &mut Random(6), (rows, VOCAB), DType::F32)?;
        // Logits of a model are a few units wide.
        backend.scale(&mut logits, 2.5)?;
        for (name, params, top_n) in &cases {
            let inputs = vec![SamplingRow { params, history: &history, top_n: *top_n }; rows];
            let mut times = Vec::new();
            for run in 0..RUNS + 3 {
                backend.scale(&mut logits, 1.0)?;
                backend.token_logprobs(&logits, &vec![0; rows])?;
                let start = Instant::now();
                backend.sample(&mut logits, &inputs)?;
                if run >= 3 {
                    times.push(start.elapsed().as_secs_f64() * 1e6);
                }
                // Undo the temperature, or the logits grow from run to run.
                backend.scale(&mut logits, params.temperature)?;
            }
            times.sort_by(f64::total_cmp);
            figures.push(Figure {
                name: format!("sample {rows}: {name}"),
                microseconds: times[RUNS / 2],
                bytes: (rows * VOCAB * 4) as f64,
                flops: 0.0,
            });
        }
    }
    Ok(figures)
}
