//! Matrix products with weights of eight bits in Llama 3.1 8B's shapes by every kernel that can compute them.

use backend::cuda::{CudaBackend, Fp8Kernel, MatmulKernel};
use backend::{Activation, Backend, BackendError, DType, HostMatrix};

use crate::measure::{Figure, Random, buffer, matrix, microseconds};

/// Weights are rotated through as many bytes.
const ROTATED_BYTES: usize = 800 << 20;
/// `[out_features, in_features]`: attention's projections, the feed-forward layer's.
const SHAPES: [(usize, usize); 4] = [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)];
/// The one whose outputs are gates and ups.
const GATED: (usize, usize) = SHAPES[2];
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 4096];

/// Every kernel for every shape and number of rows; the one that is taken is marked with a star.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let ceilings = backend.measure_ceilings()?;
    let ceiling = |name: &str, bytes: f64, flops: f64| {
        let name = name.to_owned();
        Figure { name, microseconds: 1e6, bytes, flops }
    };
    let mut figures = vec![
        ceiling("reading", ceilings.read_bytes_per_second, 0.0),
        ceiling("multiplying eight bits", 0.0, ceilings.fp8.map_or(0.0, |rate| rate.burst)),
    ];
    for (outputs, inputs) in SHAPES {
        let mut random = Random(outputs as u64);
        let block = matrix(&mut random, 1 << 6, inputs, 0.02);
        let bytes = block.bytes.repeat(outputs.div_ceil(1 << 6));
        let host = HostMatrix {
            dtype: DType::BF16,
            rows: outputs,
            cols: inputs,
            row_stride: inputs,
            bytes: bytes.into(),
        };
        let count = ROTATED_BYTES.div_ceil(outputs * inputs).max(2);
        let weights = (0..count)
            .map(|_| backend.quantized_to_fp8(std::slice::from_ref(&host), DType::BF16))
            .collect::<Result<Vec<_>, _>>()?;
        for rows in ROWS {
            let x = buffer(backend, &mut random, (rows, inputs), DType::BF16)?;
            let mut out = backend.buffer(rows, outputs, DType::BF16)?;
            let (bytes, flops) =
                (outputs * inputs + 2 * rows * (inputs + outputs), 2.0 * (rows * outputs * inputs) as f64);
            let figure = |what: String, microseconds| Figure {
                name: format!("fp8 {rows} x {inputs} -> {outputs} {what}"),
                microseconds,
                bytes: bytes as f64,
                flops,
            };
            for (place, kernel) in backend.matmul_kernels(&x, &weights[0], &out).into_iter().enumerate() {
                let microseconds = microseconds(backend, rows, count, |backend, index| {
                    backend.matmul_with(kernel, &x, (&weights[index], None), &mut out)
                })?;
                let mark = if place == 0 { "*" } else { "" };
                figures.push(figure(format!("{}{mark}", name(kernel)), microseconds));
            }
            if (outputs, inputs) == GATED {
                let mut activated = backend.buffer(rows, outputs / 2, DType::BF16)?;
                let microseconds = microseconds(backend, rows, count, |backend, index| {
                    let weight = (&weights[index], None);
                    backend.gated_matmul(&x, weight, Activation::Silu, (&mut out, &mut activated))
                })?;
                figures.push(figure("gated".to_owned(), microseconds));
            }
        }
    }
    Ok(figures)
}

/// What the kernel is called in figures.
pub(crate) fn name(kernel: MatmulKernel) -> String {
    match kernel {
        MatmulKernel::Fp8(Fp8Kernel::Gemv) => "gemv".to_owned(),
        MatmulKernel::Fp8(Fp8Kernel::FewRows { tokens, tiles }) => format!("few_rows {tokens}/{tiles}"),
        MatmulKernel::Fp8(Fp8Kernel::Skinny) => "skinny".to_owned(),
        MatmulKernel::Fp8(Fp8Kernel::Hopper { tokens, boxes, cluster }) => {
            format!("hopper {tokens}/{boxes}/{cluster}")
        }
        MatmulKernel::Fp8(Fp8Kernel::Library) => "library".to_owned(),
        MatmulKernel::Fp8(Fp8Kernel::Dequantized) => "dequantized".to_owned(),
        other => format!("{other:?}"),
    }
}
