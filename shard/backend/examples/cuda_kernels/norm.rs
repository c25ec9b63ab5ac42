//! Norms and activations in Llama's shapes.

use backend::cuda::CudaBackend;
use backend::{Activation, Backend, BackendError, DType};

use crate::measure::{Figure, Random, buffer, microseconds};

/// Operations recorded together, each on buffers of its own as far as memory of this many bytes goes.
const COUNT: usize = 64;
const ROTATED_BYTES: usize = 512 << 20;

/// `add_rms_norm` and `gated_activation`.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let mut figures = Vec::new();
    for (rows, width) in [(1, 2048), (1, 4096), (1, 8192), (8, 4096), (64, 4096), (512, 4096), (8192, 4096)] {
        let mut random = Random(1);
        let bytes = rows * width * 12;
        let sets = (ROTATED_BYTES / bytes).clamp(1, COUNT);
        let mut residuals = Vec::new();
        for _ in 0..sets {
            residuals.push(buffer(backend, &mut random, (rows, width), DType::F32)?);
        }
        let delta = buffer(backend, &mut random, (rows, width), DType::BF16)?;
        let mut out = backend.buffer(rows, width, DType::BF16)?;
        let weight = backend.vector(vec![1.0; width])?;
        let microseconds = microseconds(backend, rows, COUNT, |backend, index| {
            backend.add_rms_norm(&mut residuals[index % sets], &delta, (&weight, 1e-5), &mut out)
        })?;
        let name = format!("add_rms_norm {rows} x {width}");
        figures.push(Figure { name, microseconds, bytes: bytes as f64, flops: 0.0 });
    }
    for (rows, width) in [(1, 8192), (1, 14_336), (64, 14_336), (512, 14_336), (8192, 14_336)] {
        let mut random = Random(2);
        let gate_up = buffer(backend, &mut random, (rows, 2 * width), DType::BF16)?;
        let mut out = backend.buffer(rows, width, DType::BF16)?;
        let microseconds = microseconds(backend, rows, COUNT, |backend, _| {
            backend.gated_activation(&gate_up, Activation::Silu, &mut out)
        })?;
        let name = format!("gated_activation {rows} x {width}");
        figures.push(Figure { name, microseconds, bytes: (rows * width * 6) as f64, flops: 0.0 });
    }
    Ok(figures)
}
