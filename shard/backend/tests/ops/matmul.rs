//! Matrix products, packing and reading back.

use std::borrow::Cow;

use backend::{Backend, DType, HostMatrix};

use crate::cases::{Random, bytes_of, matrix, on_every_backend, rounded, upload};
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

fn agrees_with_plain_sums<B: Backend>(backend: &mut B) {
    let mut random = Random(1);
    // Their many rows are in `many_rows`, with errors relative to norms.
    let has_fixed_point = ["VNNI", "BF16"].iter().any(|isa| backend.device().description.contains(isa));
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for dtype in dtypes {
        for (rows, inputs, outputs) in [
            (1, 64, 48),
            (1, 7, 5),
            (2, 33, 17),
            (3, 48, 16),
            (5, 31, 65),
            (17, 63, 40),
            (63, 65, 33),
            (65, 128, 100),
            (1, 576, 192),
        ] {
            let stored = dtypes[random.below(3)];
            if has_fixed_point && dtype == DType::BF16 && rows >= 32 {
                continue;
            }
            let values = random.vector(outputs * inputs);
            let weight: Vec<f32> = values.iter().map(|&x| rounded(rounded(x, stored), dtype)).collect();
            let x = random.vector(rows * inputs);
            let bias = (outputs % 2 == 1).then(|| random.vector(outputs));
            let input = upload(backend, &x, inputs);
            let packed = backend.linear(&[matrix(&values, outputs, inputs, stored)], dtype).unwrap();
            let bias_vector = bias.clone().map(|bias| backend.vector(bias).unwrap());
            let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
            backend.matmul(&input, &packed, bias_vector.as_ref(), &mut out).unwrap();
            let (expected, magnitudes) = reference(&x, &weight, bias.as_deref(), inputs);
            let what = format!("{rows} x {inputs} -> {outputs}, {stored} as {dtype}");
            assert_close(
                &what,
                &backend.read(&out).unwrap(),
                &expected,
                &magnitudes,
                tolerances::matmul(dtype),
            );
        }
    }
}

#[test]
fn matmul_agrees_with_plain_sums() {
    on_every_backend!(agrees_with_plain_sums);
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
        let x = random.vector(3 * cols);
        let input = upload(backend, &x, cols);
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
    let (rows, inputs, outputs) = (29, 96, 80);
    let packed = backend
        .linear(&[matrix(&random.vector(inputs * outputs), outputs, inputs, DType::BF16)], DType::BF16)
        .unwrap();
    let x = random.vector(rows * inputs);
    let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
    let input = upload(backend, &x, inputs);
    backend.matmul(&input, &packed, None, &mut out).unwrap();
    let together = backend.read(&out).unwrap();
    for row in [0, 7, 28] {
        let input = upload(backend, &x[row * inputs..(row + 1) * inputs], inputs);
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
