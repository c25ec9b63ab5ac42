//! Mixtures of experts in the shapes of Mixtral 8x7B, Qwen3-30B-A3B and DeepSeek-V2-Lite.

use std::collections::HashSet;

use backend::cuda::CudaBackend;
use backend::{
    Activation, Backend, BackendError, DType, HeadColumns, RouterScores, Routing, WeightNormalization,
};

use crate::measure::{Figure, Random, buffer, matrix, microseconds};

struct Shape {
    name: &'static str,
    experts: usize,
    chosen: usize,
    hidden: usize,
    width: usize,
}

const SHAPES: [Shape; 3] = [
    Shape { name: "mixtral", experts: 8, chosen: 2, hidden: 4096, width: 14_336 },
    Shape { name: "qwen3-30b", experts: 128, chosen: 8, hidden: 2048, width: 768 },
    Shape { name: "deepseek-lite", experts: 64, chosen: 6, hidden: 2048, width: 1408 },
];
const ROWS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096];
/// Sets of router logits, so that other experts are chosen from one operation to the next.
const SETS: usize = 4;

/// `mixture_of_experts`, and the products of latent attention's heads.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let mut figures = heads(backend)?;
    for shape in &SHAPES {
        let mut random = Random(3);
        let mut projections = Vec::new();
        let gate_up = matrix(&mut random, 2 * shape.width, shape.hidden, 0.02);
        let down = matrix(&mut random, shape.hidden, shape.width, 0.02);
        for _ in 0..shape.experts {
            projections.push((
                backend.linear(std::slice::from_ref(&gate_up), DType::BF16)?,
                backend.linear(std::slice::from_ref(&down), DType::BF16)?,
            ));
        }
        let experts = backend.experts(projections, Activation::Silu)?;
        let routing = Routing {
            num_chosen: shape.chosen,
            scores: RouterScores::Softmax,
            groups: None,
            normalization: WeightNormalization::Sum,
            scale: 1.0,
        };
        for rows in ROWS {
            let x = buffer(backend, &mut random, (rows, shape.hidden), DType::BF16)?;
            let mut logits = Vec::new();
            let mut used = 0.0;
            for _ in 0..SETS {
                let buffer = buffer(backend, &mut random, (rows, shape.experts), DType::F32)?;
                used += experts_used(&backend.read(&buffer)?, shape) as f64 / SETS as f64;
                logits.push(buffer);
            }
            let mut out = backend.buffer(rows, shape.hidden, DType::BF16)?;
            let count = if rows <= 64 { 32 } else { 4 };
            let microseconds = microseconds(backend, rows, count, |backend, index| {
                let logits = &logits[index % SETS];
                backend.mixture_of_experts(&x, logits, (&routing, None), &experts, &mut out)
            })?;
            let elements = (3 * shape.hidden * shape.width) as f64;
            figures.push(Figure {
                name: format!("{} {rows} tokens", shape.name),
                microseconds,
                bytes: used * elements * 2.0,
                flops: (rows * shape.chosen) as f64 * elements * 2.0,
            });
        }
    }
    Ok(figures)
}

/// Experts that any row chooses.
fn experts_used(logits: &[f32], shape: &Shape) -> usize {
    let mut used = HashSet::new();
    for row in logits.chunks(shape.experts) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        used.extend(order.into_iter().take(shape.chosen));
    }
    used.len()
}

/// DeepSeek's 16 heads (V2-Lite) and 128 heads (V3) of latent attention: 128 to 512 and back.
fn heads(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let mut figures = Vec::new();
    let mut random = Random(4);
    for num_heads in [16, 128] {
        for (inputs, outputs) in [(128, 512), (512, 128)] {
            let source = matrix(&mut random, outputs, inputs, 0.05);
            let mut weights = Vec::new();
            for _ in 0..num_heads {
                weights.push(backend.linear(std::slice::from_ref(&source), DType::BF16)?);
            }
            for rows in [1, 8, 64, 1024] {
                let x = buffer(backend, &mut random, (rows, num_heads * inputs), DType::BF16)?;
                let mut out = backend.buffer(rows, num_heads * outputs, DType::BF16)?;
                let from = HeadColumns { first: 0, stride: inputs, width: inputs };
                let to = HeadColumns { first: 0, stride: outputs, width: outputs };
                let microseconds = microseconds(backend, rows, 32, |backend, _| {
                    backend.matmul_heads((&x, from), &weights, (&mut out, to))
                })?;
                let elements = (num_heads * inputs * outputs) as f64;
                figures.push(Figure {
                    name: format!("matmul_heads {num_heads} x {inputs} -> {outputs}, {rows} rows"),
                    microseconds,
                    bytes: elements * 2.0,
                    flops: elements * 2.0 * rows as f64,
                });
            }
        }
    }
    Ok(figures)
}
