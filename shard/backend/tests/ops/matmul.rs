//! Matrix products, packing and reading back.

use std::borrow::Cow;

use backend::{Activation, Backend, DType, HostMatrix};

#[cfg(feature = "cuda")]
use crate::cases::cuda;
use crate::cases::{
    FIXED_ROWS, Random, activation_types, activations_beside, bytes_of, has_fixed_point, matrix,
    on_every_backend, random_as, rounded, upload_as,
};
use crate::tolerances::{self, assert_close};

/// `x weight^T + bias` and the sums of absolute values.
fn reference(x: &[f32], weight: &[f32], bias: Option<&[f32]>, inputs: usize) -> (Vec<f64>, Vec<f64>) {
    let mut sums = Vec::new();
    let mut magnitudes = Vec::new();
    for row in x.chunks(inputs) {
        for (output, weights) in weight.chunks(inputs).enumerate() {
            let products = row.iter().zip(weights).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            magnitudes.push(products.clone().map(f64::abs).sum::<f64>() + bias.abs());
            sums.push(products.sum::<f64>() + bias);
        }
    }
    (sums, magnitudes)
}

/// `rows x inputs -> outputs` with weights of `dtype` that were stored as `stored`, into results of every type a backend has.
fn check_product<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    (rows, inputs, outputs): (usize, usize, usize),
    (stored, dtype): (DType, DType),
) {
    let values = random.vector(outputs * inputs);
    let weight: Vec<f32> = values.iter().map(|&x| rounded(rounded(x, stored), dtype)).collect();
    let beside = activations_beside(backend, dtype);
    let x = random_as(random, rows * inputs, beside);
    let bias = (outputs % 2 == 1 || outputs % 24 == 0).then(|| random.vector(outputs));
    let input = upload_as(backend, &x, inputs, beside);
    let packed = backend.linear(&[matrix(&values, outputs, inputs, stored)], dtype).unwrap();
    let bias_vector = bias.clone().map(|bias| backend.vector(bias).unwrap());
    let (expected, magnitudes) = reference(&x, &weight, bias.as_deref(), inputs);
    for &out_dtype in activation_types(backend) {
        if out_dtype != DType::F32 && out_dtype != dtype {
            continue;
        }
        let mut out = upload_as(backend, &vec![f32::NAN; rows * outputs], outputs, out_dtype);
        backend.matmul(&input, &packed, bias_vector.as_ref(), &mut out).unwrap();
        let what = format!("{rows} x {inputs} -> {outputs}, {stored} as {dtype} to {out_dtype}");
        let found = backend.read(&out).unwrap();
        assert_close(&what, &found, &expected, &magnitudes, tolerances::matmul(dtype).stored_as(out_dtype));
    }
}

fn agrees_with_plain_sums<B: Backend>(backend: &mut B) {
    let mut random = Random(1);
    // What is computed in fixed point is in `many_rows`, with errors relative to norms.
    let has_fixed_point = has_fixed_point(backend);
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for dtype in dtypes {
        for shape in [
            (1, 64, 48),
            (1, 7, 5),
            (2, 33, 17),
            (3, 48, 16),
            (5, 31, 65),
            (17, 63, 40),
            (63, 65, 33),
            (65, 128, 100),
            (1, 576, 192),
            (4, 130, 50),
        ] {
            let stored = dtypes[random.below(3)];
            if has_fixed_point && dtype == DType::BF16 && shape.0 >= FIXED_ROWS {
                continue;
            }
            check_product(backend, &mut random, shape, (stored, dtype));
        }
    }
}

#[test]
fn matmul_agrees_with_plain_sums() {
    on_every_backend!(agrees_with_plain_sums);
}

/// Enough weights for a GPU to share them out: tiles of one block, of several, and rests; every number of rows that has a
/// kernel of its own.
#[cfg(feature = "cuda")]
fn agrees_when_shared_out<B: Backend>(backend: &mut B) {
    let mut random = Random(4);
    for dtype in [DType::BF16, DType::F16] {
        for shape in [
            (1, 1032, 523),
            (2, 264, 5001),
            (4, 2048, 130),
            (7, 520, 9001),
            (8, 1024, 65),
            (9, 1160, 1027),
            (16, 72, 4096),
            (17, 968, 777),
            (32, 256, 2049),
            (33, 392, 1300),
            (64, 1024, 320),
            (65, 456, 901),
            (128, 1024, 257),
            (129, 264, 390),
            // Many rows: whole tiles, rests, and rows that bulk copies cannot take.
            (512, 64, 512),
            (513, 200, 264),
            (700, 72, 1000),
            (600, 36, 260),
        ] {
            check_product(backend, &mut random, shape, (dtype, dtype));
        }
    }
}

#[cfg(feature = "cuda")]
#[test]
fn matmul_agrees_with_plain_sums_when_shared_out() {
    let Some(mut backend) = cuda() else { return };
    eprintln!("on CUDA");
    agrees_when_shared_out(&mut backend);
    // The counters of shared tiles must be as they were.
    agrees_when_shared_out(&mut backend);
}

/// Every kernel there is for a product, not only the one that is taken for it.
#[cfg(feature = "cuda")]
#[test]
fn every_kernel_agrees_with_plain_sums() {
    let Some(mut backend) = cuda() else { return };
    eprintln!("on CUDA");
    let mut random = Random(5);
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for (rows, inputs, outputs) in
            [(1, 776, 1003), (8, 264, 300), (13, 520, 911), (31, 1024, 130), (50, 328, 577), (111, 200, 650)]
        {
            let values = random.vector(outputs * inputs);
            let weight: Vec<f32> = values.iter().map(|&x| rounded(x, dtype)).collect();
            let x = random_as(&mut random, rows * inputs, dtype);
            let bias = random.vector(outputs);
            let input = upload_as(&mut backend, &x, inputs, dtype);
            let packed = backend.linear(&[matrix(&values, outputs, inputs, dtype)], dtype).unwrap();
            let bias_vector = backend.vector(bias.clone()).unwrap();
            let (expected, magnitudes) = reference(&x, &weight, Some(&bias), inputs);
            let mut out = upload_as(&mut backend, &vec![f32::NAN; rows * outputs], outputs, DType::F32);
            for kernel in backend.matmul_kernels(&input, &packed, &out) {
                let nothing = upload_as(&mut backend, &vec![f32::NAN; rows * outputs], outputs, DType::F32);
                out = nothing;
                backend.matmul_with(kernel, &input, (&packed, Some(&bias_vector)), &mut out).unwrap();
                let first = backend.read(&out).unwrap();
                let what = format!("{rows} x {inputs} -> {outputs}, {dtype} by {kernel:?}");
                assert_close(&what, &first, &expected, &magnitudes, tolerances::matmul(dtype));
                backend.matmul_with(kernel, &input, (&packed, Some(&bias_vector)), &mut out).unwrap();
                assert_eq!(first, backend.read(&out).unwrap(), "{what}: the same bits again");
            }
        }
    }
}

/// What computes many rows quickest is taken for any number of them where a row's bits must not depend on it.
#[cfg(feature = "cuda")]
#[test]
fn batch_invariant_products_agree_with_plain_sums() {
    let Some(mut backend) = crate::deterministic::backend() else { return };
    eprintln!("on CUDA, batch-invariant");
    agrees_when_shared_out(&mut backend);
    gates_what_it_multiplies(&mut backend);
    adds_what_it_multiplies(&mut backend);
}

/// SiLU or GELU by tanh, and how much a value moves by its argument's relative change.
fn activated(activation: Activation, x: f64) -> (f64, f64) {
    let of = |x: f64| match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        _ => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh()),
    };
    let step = 1e-4 * (1.0 + x.abs());
    (of(x), (of(x + step) - of(x - step)) / (2.0 * step))
}

/// Gate, up and activation in one operation; gate and up are rounded as if they were stored.
fn gates_what_it_multiplies<B: Backend>(backend: &mut B) {
    let mut random = Random(6);
    let has_fixed_point = has_fixed_point(backend);
    for dtype in [DType::BF16, DType::F16] {
        let beside = activations_beside(backend, dtype);
        for (rows, inputs, width) in [
            (1, 264, 100),
            (3, 40, 129),
            (5, 1032, 65),
            (8, 520, 1000),
            (16, 136, 72),
            (30, 776, 333),
            (64, 1024, 96),
            (90, 72, 70),
            (600, 40, 264),
        ] {
            if has_fixed_point && dtype == DType::BF16 && rows >= FIXED_ROWS {
                continue;
            }
            let values: Vec<f32> =
                random_as(&mut random, 2 * width * inputs, dtype).iter().map(|x| x / 16.0).collect();
            let x = random_as(&mut random, rows * inputs, beside);
            let input = upload_as(backend, &x, inputs, beside);
            let packed = backend.linear(&[matrix(&values, 2 * width, inputs, dtype)], dtype).unwrap();
            let bias = (width % 2 == 1).then(|| random.vector(2 * width));
            let bias_vector = bias.clone().map(|bias| backend.vector(bias).unwrap());
            let (sums, sizes) = reference(&x, &values, bias.as_deref(), inputs);
            let mut gate_up = backend.buffer(rows, 2 * width, beside).unwrap();
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let rounding = tolerances::ACTIVATION.stored_as(beside).relative;
                let product = tolerances::matmul(dtype).relative;
                let (mut expected, mut allowed) = (Vec::new(), Vec::new());
                for (sums, sizes) in sums.chunks(2 * width).zip(sizes.chunks(2 * width)) {
                    for at in 0..width {
                        let (gate, up) = (sums[at], sums[at + width]);
                        let (value, slope) = activated(activation, gate);
                        let error_of_gate = rounding * gate.abs() + product * sizes[at];
                        let error_of_up = rounding * up.abs() + product * sizes[at + width];
                        expected.push(value * up);
                        allowed.push(
                            (slope * up).abs() * error_of_gate
                                + value.abs() * error_of_up
                                + rounding * (value * up).abs(),
                        );
                    }
                }
                let mut out = upload_as(backend, &vec![f32::NAN; rows * width], width, beside);
                backend
                    .gated_matmul(
                        &input,
                        (&packed, bias_vector.as_ref()),
                        activation,
                        (&mut gate_up, &mut out),
                    )
                    .unwrap();
                let what = format!("{rows} x {inputs} -> {width}, {dtype}, {activation:?}");
                let tolerance =
                    tolerances::Tolerance { absolute: tolerances::ACTIVATION.absolute, relative: 1.0 };
                assert_close(&what, &backend.read(&out).unwrap(), &expected, &allowed, tolerance);
            }
        }
    }
}

#[test]
fn gated_matmul_activates_what_it_multiplies() {
    on_every_backend!(gates_what_it_multiplies);
}

/// A product added to what is there, or nothing done.
fn adds_what_it_multiplies<B: Backend>(backend: &mut B) {
    let mut random = Random(8);
    for dtype in [DType::BF16, DType::F16] {
        let beside = activations_beside(backend, dtype);
        for (rows, inputs, outputs) in [(1, 64, 48), (40, 136, 512), (600, 72, 264), (513, 1032, 256)] {
            let values = random_as(&mut random, outputs * inputs, dtype);
            let x = random_as(&mut random, rows * inputs, beside);
            let before = random.vector(rows * outputs);
            let bias = (outputs % 3 == 0).then(|| random.vector(outputs));
            let input = upload_as(backend, &x, inputs, beside);
            let packed = backend.linear(&[matrix(&values, outputs, inputs, dtype)], dtype).unwrap();
            let bias_vector = bias.clone().map(|bias| backend.vector(bias).unwrap());
            let mut out = upload_as(backend, &before, outputs, DType::F32);
            let what = format!("{rows} x {inputs} -> {outputs}, {dtype} added");
            if !backend.add_matmul(&input, (&packed, bias_vector.as_ref()), &mut out).unwrap() {
                assert_eq!(backend.read(&out).unwrap(), before, "{what}: nothing is done");
                continue;
            }
            let (sums, mut magnitudes) = reference(&x, &values, bias.as_deref(), inputs);
            let expected: Vec<f64> = sums.iter().zip(&before).map(|(a, &b)| a + f64::from(b)).collect();
            magnitudes.iter_mut().zip(&before).for_each(|(size, &b)| *size += f64::from(b.abs()));
            let found = backend.read(&out).unwrap();
            assert_close(&what, &found, &expected, &magnitudes, tolerances::matmul(dtype));
        }
    }
}

#[test]
fn add_matmul_adds_all_or_nothing() {
    on_every_backend!(adds_what_it_multiplies);
}

/// A rank's window of a larger matrix, at an odd address, stacked on others of other types.
fn stacks_windows<B: Backend>(backend: &mut B) {
    let mut random = Random(2);
    let (rows, stride, first, cols) = (21, 50, 13, 34);
    let whole = random.vector(rows * stride);
    let window: Vec<f32> = whole.chunks(stride).flat_map(|row| row[first..first + cols].to_vec()).collect();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut shifted = vec![0u8];
        shifted.extend(bytes_of(&whole, DType::BF16));
        let bytes = Cow::Borrowed(&shifted[1 + first * 2..]);
        let first_part = HostMatrix { dtype: DType::BF16, rows, cols, row_stride: stride, bytes };
        let second = random.vector(12 * cols);
        let parts = [first_part, matrix(&second, 12, cols, DType::F16)];
        let packed = backend.linear(&parts, dtype).unwrap();
        let mut weight: Vec<f32> = window.iter().map(|&x| rounded(rounded(x, DType::BF16), dtype)).collect();
        weight.extend(second.iter().map(|&x| rounded(rounded(x, DType::F16), dtype)));
        let beside = activations_beside(backend, dtype);
        let x = random_as(&mut random, 3 * cols, beside);
        let input = upload_as(backend, &x, cols, beside);
        let mut out = backend.buffer(3, 33, DType::F32).unwrap();
        backend.matmul(&input, &packed, None, &mut out).unwrap();
        let (expected, magnitudes) = reference(&x, &weight, None, cols);
        let what = format!("stacked as {dtype}");
        assert_close(&what, &backend.read(&out).unwrap(), &expected, &magnitudes, tolerances::matmul(dtype));
    }
}

#[test]
fn linear_stacks_windows_of_any_type() {
    on_every_backend!(stacks_windows);
}

fn refuses_bad_parts<B: Backend>(backend: &mut B) {
    let message = |result: Result<B::Linear, backend::BackendError>| match result {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    let parts = [matrix(&[0.0; 6], 2, 3, DType::F32), matrix(&[0.0; 4], 1, 4, DType::F32)];
    let text = message(backend.linear(&parts, DType::F32));
    assert!(text.contains("part 1 has 4 columns, the first has 3"), "{text}");
    let mut short = matrix(&[0.0; 6], 2, 3, DType::F32);
    short.rows = 3;
    let text = message(backend.linear(&[short], DType::BF16));
    assert!(text.contains("needs 36 bytes, has 24"), "{text}");
}

#[test]
fn linear_refuses_parts_that_do_not_fit() {
    on_every_backend!(refuses_bad_parts);
}

/// Products of exact numbers are exact whatever the order: batch rows must not influence one another.
fn row_alone_equals_row_in_batch<B: Backend>(backend: &mut B) {
    let mut random = Random(3);
    let (inputs, outputs) = (96, 80);
    // In fixed point, few rows are another computation: `many_rows` compares many with many.
    let (rows, places) = if has_fixed_point(backend) { (4, [0, 2, 3]) } else { (29, [0, 7, 28]) };
    let packed = backend
        .linear(&[matrix(&random.vector(inputs * outputs), outputs, inputs, DType::BF16)], DType::BF16)
        .unwrap();
    let beside = activations_beside(backend, DType::BF16);
    let x = random_as(&mut random, rows * inputs, beside);
    let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
    let input = upload_as(backend, &x, inputs, beside);
    backend.matmul(&input, &packed, None, &mut out).unwrap();
    let together = backend.read(&out).unwrap();
    for row in places {
        let input = upload_as(backend, &x[row * inputs..(row + 1) * inputs], inputs, beside);
        backend.matmul(&input, &packed, None, &mut out).unwrap();
        let alone = backend.read(&out).unwrap();
        let expected: Vec<f64> =
            together[row * outputs..(row + 1) * outputs].iter().map(|&x| f64::from(x)).collect();
        let magnitude = vec![inputs as f64; outputs];
        assert_close("alone against batch", &alone, &expected, &magnitude, tolerances::matmul(DType::F32));
    }
}

#[test]
fn matmul_of_a_row_does_not_depend_on_the_batch() {
    on_every_backend!(row_alone_equals_row_in_batch);
}
