//! EXPERIMENT
use backend::cuda::{CudaBackend, MatmulKernel};
use backend::{Activation, Backend, BackendError, DType, HostMatrix};

use crate::measure::{Figure, Random, buffer, matrix, microseconds};

const ROTATED_BYTES: usize = 1000 << 20;
const SHAPES: [(usize, usize, bool); 10] = [
    (4096, 4096, false),
    (6144, 4096, false),
    (4096, 14_336, false),
    (28_672, 4096, true),
    (128_256, 4096, false),
    (2048, 2048, false),
    (3072, 2048, false),
    (2048, 8192, false),
    (16_384, 2048, true),
    (128_256, 2048, false),
];

pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let rows_list: Vec<usize> = std::env::var("SWEEP_ROWS")
        .unwrap_or("32,128".into())
        .split(',')
        .map(|x| x.parse().unwrap())
        .collect();
    let only: Option<String> = std::env::var("SWEEP_SHAPE").ok();
    let plans: Option<Vec<String>> =
        std::env::var("SWEEP_PLANS").ok().map(|x| x.split(' ').map(str::to_owned).collect());
    for (outputs, inputs, gated) in SHAPES {
        if only.as_ref().is_some_and(|only| {
            !only.split(' ').any(|x| x == format!("{outputs}x{inputs}{}", if gated { "g" } else { "" }))
        }) {
            continue;
        }
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
        for &rows in &rows_list {
            let x = buffer(backend, &mut random, (rows, inputs), DType::BF16)?;
            let mut out = backend.buffer(rows, outputs, DType::BF16)?;
            let mut half = backend.buffer(rows, outputs / 2, DType::BF16)?;
            let floor = (outputs * inputs * 2) as f64 / 3.09e6;
            let time = |backend: &mut CudaBackend,
                        out: &mut _,
                        half: &mut _,
                        what: &str|
             -> Result<(), BackendError> {
                let us = if gated {
                    microseconds(backend, rows, count, |backend, index| {
                        backend.gated_matmul(
                            &x,
                            (&weights[index], None),
                            Activation::Silu,
                            (&mut *out, &mut *half),
                        )
                    })?
                } else {
                    microseconds(backend, rows, count, |backend, index| {
                        backend.matmul(&x, &weights[index], None, &mut *out)
                    })?
                };
                println!(
                    "{outputs}x{inputs}{} {rows} {what} {us:.2} {:.3}",
                    if gated { "g" } else { "" },
                    us / floor
                );
                Ok(())
            };
            // SAFETY: one thread.
            unsafe {
                std::env::set_var("QX_MIN", "1000");
            }
            time(backend, &mut out, &mut half, "old")?;
            if !gated {
                let us = microseconds(backend, rows, count, |backend, index| {
                    backend.matmul_with(MatmulKernel::Library, &x, (&weights[index], None), &mut out)
                })?;
                println!("{outputs}x{inputs} {rows} library {us:.2} {:.3}", us / floor);
            }
            unsafe {
                std::env::set_var("QX_MIN", "1");
            }
            let tokens = [16usize, 32, 64, 128].into_iter().find(|&t| t >= rows).unwrap();
            let mut list = Vec::new();
            for split in [1usize, 2, 4] {
                if split > 1 && (gated || outputs > 20_000) {
                    continue;
                }
                for share in [1usize, 2, 4] {
                    if share == 4 && tokens < 128 {
                        continue;
                    }
                    for groups in [1usize, 2] {
                        if gated && groups == 1 {
                            continue;
                        }
                        let even = (outputs * split).div_ceil(128 * groups).next_multiple_of(8);
                        let mut sizes = vec![64];
                        if (24..64).contains(&even) {
                            sizes.push(even);
                        }
                        if gated && even > 64 && tokens < 128 {
                            sizes.push(56);
                        }
                        for r in sizes {
                            list.push(format!("g{groups},r{r},c{split},m{share},s0,e1"));
                        }
                    }
                }
            }
            if let Some(plans) = &plans {
                list = plans.clone();
            }
            for plan in list {
                unsafe {
                    std::env::set_var("QX_ALL", &plan);
                }
                time(backend, &mut out, &mut half, &plan)?;
            }
            unsafe {
                std::env::remove_var("QX_ALL");
            }
        }
    }
    Ok(Vec::new())
}
