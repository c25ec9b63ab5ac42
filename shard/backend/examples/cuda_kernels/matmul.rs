//! Matrix products in Llama's shapes by every kernel that can compute them, with weights that no cache holds.

use backend::cuda::{CudaBackend, MatmulKernel};
use backend::{Backend, BackendError, DType, HostMatrix};

use crate::measure::{Figure, Random, buffer, matrix, microseconds};

/// Weights are rotated through as many bytes.
const ROTATED_BYTES: usize = 1600 << 20;
/// `[out_features, in_features]` of Llama 3.1 8B and Llama 3.2 1B: attention's projections, the feed-forward layer's, logits.
const SHAPES: [(usize, usize); 10] = [
    (6144, 4096),
    (4096, 4096),
    (28_672, 4096),
    (4096, 14_336),
    (128_256, 4096),
    (3072, 2048),
    (2048, 2048),
    (16_384, 2048),
    (2048, 8192),
    (128_256, 2048),
];
const ROWS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 2048];

/// Every kernel for every shape and number of rows; the one that is taken is marked with a star.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let ceilings = backend.measure_ceilings()?;
    let mut figures = vec![
        Figure {
            name: "reading".to_owned(),
            microseconds: 1e6,
            bytes: ceilings.read_bytes_per_second,
            flops: 0.0,
        },
        Figure { name: "multiplying".to_owned(), microseconds: 1e6, bytes: 0.0, flops: ceilings.bf16.burst },
        Figure {
            name: "multiplying for long".to_owned(),
            microseconds: 1e6,
            bytes: 0.0,
            flops: ceilings.bf16.sustained,
        },
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
        let count = ROTATED_BYTES.div_ceil(outputs * inputs * 2).max(2);
        let weights = (0..count)
            .map(|_| backend.linear(std::slice::from_ref(&host), DType::BF16))
            .collect::<Result<Vec<_>, _>>()?;
        for rows in ROWS {
            let x = buffer(backend, &mut random, (rows, inputs), DType::BF16)?;
            let mut out = backend.buffer(rows, outputs, DType::BF16)?;
            for (place, kernel) in backend.matmul_kernels(&x, &weights[0], &out).into_iter().enumerate() {
                let microseconds = microseconds(backend, rows, count, |backend, index| {
                    backend.matmul_with(kernel, &x, (&weights[index], None), &mut out)
                })?;
                let mark = if place == 0 { "*" } else { "" };
                figures.push(Figure {
                    name: format!("matmul {rows} x {inputs} -> {outputs} {}{mark}", name(kernel)),
                    microseconds,
                    bytes: (2 * (outputs * inputs + rows * (inputs + outputs))) as f64,
                    flops: 2.0 * (rows * outputs * inputs) as f64,
                });
            }
        }
    }
    Ok(figures)
}

fn name(kernel: MatmulKernel) -> String {
    match kernel {
        MatmulKernel::Library => "library".to_owned(),
        MatmulKernel::Gemv => "gemv".to_owned(),
        MatmulKernel::FewRows => "few_rows".to_owned(),
        MatmulKernel::Hopper => "hopper_gemm".to_owned(),
        MatmulKernel::Fp8(_) => crate::fp8::name(kernel),
        MatmulKernel::Cluster(plan) => {
            format!("cluster {} {} x {}", plan.split, plan.groups, plan.group_rows)
        }
    }
}
