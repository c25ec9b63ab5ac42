//! Products with weights of eight bits: those of a checkpoint, and those that are rounded while they are loaded.

use backend::{Activation, Backend, DType, Fp8Format, Fp8Matrix};

use crate::cases::{Random, activations_beside, on_every_backend, random_as, upload_as};
use crate::tolerances::{self, assert_close};

/// `weight` as numbers.
fn values_of(parts: &[Fp8Matrix<'_>]) -> Vec<f32> {
    let mut values = Vec::new();
    for part in parts {
        for row in 0..part.rows {
            let groups = part.groups();
            for col in 0..part.cols {
                let group = if part.group == usize::MAX { 0 } else { (part.skipped + col) / part.group };
                let number = Fp8Format::E4M3.decode(part.bytes[row * part.row_stride + col]);
                values.push(number * part.scales[row * groups + group]);
            }
        }
    }
    values
}

/// Random finite numbers with random scales: one a row, or one for each `group` columns of a window that begins within a group.
fn random_part(random: &mut Random, rows: usize, cols: usize, group: Option<usize>) -> Fp8Matrix<'static> {
    let row_stride = cols + 5;
    let number = |random: &mut Random| {
        let bits = random.bits() as u8;
        // Not a number.
        if bits & 0x7f == 0x7f { 0x38 } else { bits }
    };
    let bytes: Vec<u8> = (0..rows * row_stride).map(|_| number(random)).collect();
    let (group, skipped) = group.map_or((usize::MAX, 0), |group| (group, group / 4));
    let part = Fp8Matrix { rows, cols, row_stride, bytes: bytes.into(), group, skipped, scales: Vec::new() };
    // Numbers reach 448, most are below 1.
    let scales = (0..rows * part.groups()).map(|_| (1.0 + random.normal().abs()) / 64.0).collect();
    Fp8Matrix { scales, ..part }
}

/// `x weight^T + bias` and the sums of absolute values.
fn reference(x: &[f32], weight: &[f32], bias: Option<&[f32]>, inputs: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut sums, mut magnitudes) = (Vec::new(), Vec::new());
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

/// Rows rounded to E4M3 with a scale each, and what they stand for.
#[cfg(feature = "cuda")]
fn rounded_rows(values: &[f32], width: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let scale = if largest > 1e-35 { largest / 448.0 } else { 1.0 };
        let inverse = 1.0 / scale;
        let number = |&x: &f32| Fp8Format::E4M3.decode(Fp8Format::E4M3.encode(x * inverse)) * scale;
        row.iter().map(number).collect::<Vec<_>>()
    };
    values.chunks(width).flat_map(row).collect()
}

/// The same with a scale for each 128 neighbours of a row.
#[cfg(feature = "cuda")]
fn rounded_groups(values: &[f32], width: usize) -> Vec<f32> {
    values
        .chunks(width)
        .flat_map(|row| row.chunks(128).flat_map(|group| rounded_rows(group, group.len())))
        .collect()
}

/// Parts of several kinds of scales; up to 16 rows, so that activations keep their type everywhere.
fn agrees_with_plain_sums<B: Backend>(backend: &mut B) {
    let mut random = Random(41);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (rows, inputs, outputs, group) in [
            (1, 64, 48, None),
            (1, 160, 7, None),
            (2, 1040, 33, None),
            (3, 48, 130, None),
            (4, 4112, 65, None),
            (7, 256, 16, None),
            (8, 96, 300, None),
            (13, 528, 1001, None),
            (15, 144, 40, None),
            (16, 1024, 100, None),
            (5, 33, 17, None),
            (3, 256, 40, Some(128)),
            (9, 130, 21, Some(64)),
        ] {
            let parts = [
                random_part(&mut random, outputs / 3 + 1, inputs, group),
                random_part(&mut random, outputs - outputs / 3 - 1, inputs, group),
            ];
            let beside = activations_beside(backend, dtype);
            // On the CPU, and where scales are blocks', they are multiplied in first.
            let is_exact = backend.keeps_fp8() && group.is_none() && dtype != DType::F32;
            let of_weight = if backend.keeps_fp8() { dtype } else { DType::F32 };
            let weight: Vec<f32> = match is_exact {
                true => values_of(&parts),
                false => values_of(&parts).iter().map(|&x| crate::cases::rounded(x, of_weight)).collect(),
            };
            let x = random_as(&mut random, rows * inputs, beside);
            let bias = (outputs % 2 == 1).then(|| random.vector(outputs));
            let packed = backend.fp8_linear(&parts, of_weight).unwrap();
            let bias_vector = bias.clone().map(|bias| backend.vector(bias).unwrap());
            let input = upload_as(backend, &x, inputs, beside);
            let (expected, magnitudes) = reference(&x, &weight, bias.as_deref(), inputs);
            for out_dtype in [DType::F32, beside] {
                // Sizes that no kernel takes as they are are dequantized, which rounds once more.
                let dequantizes = is_exact && !inputs.is_multiple_of(16);
                let tolerance = if dequantizes {
                    tolerances::matmul(DType::F32).stored_as(dtype)
                } else {
                    tolerances::matmul(of_weight)
                };
                let mut out = upload_as(backend, &vec![f32::NAN; rows * outputs], outputs, out_dtype);
                backend.matmul(&input, &packed, bias_vector.as_ref(), &mut out).unwrap();
                let what =
                    format!("{rows} x {inputs} -> {outputs}, groups {group:?}, {dtype} to {out_dtype}");
                assert_close(
                    &what,
                    &backend.read(&out).unwrap(),
                    &expected,
                    &magnitudes,
                    tolerance.stored_as(out_dtype),
                );
            }
        }
    }
}

#[test]
fn products_with_eight_bits_agree_with_plain_sums() {
    on_every_backend!(agrees_with_plain_sums);
}

/// Gate, up and activation in one operation are what they are one after the other.
fn gates_what_it_multiplies<B: Backend>(backend: &mut B) {
    let mut random = Random(42);
    for dtype in [DType::BF16, DType::F16] {
        for (rows, inputs, width) in
            [(1, 272, 100), (2, 48, 129), (5, 1040, 65), (8, 528, 500), (16, 144, 72), (30, 784, 131)]
        {
            let parts = [random_part(&mut random, 2 * width, inputs, None)];
            let beside = activations_beside(backend, dtype);
            let of_weight = if backend.keeps_fp8() { dtype } else { DType::F32 };
            // So that the gate's exponential stays within reach.
            let x: Vec<f32> =
                random_as(&mut random, rows * inputs, beside).iter().map(|x| x / 64.0).collect();
            let packed = backend.fp8_linear(&parts, of_weight).unwrap();
            let input = upload_as(backend, &x, inputs, beside);
            let mut gate_up = upload_as(backend, &vec![f32::NAN; rows * 2 * width], 2 * width, beside);
            let (mut expected, mut found) = (
                upload_as(backend, &vec![f32::NAN; rows * width], width, beside),
                upload_as(backend, &vec![f32::NAN; rows * width], width, beside),
            );
            backend.matmul(&input, &packed, None, &mut gate_up).unwrap();
            backend.gated_activation(&gate_up, Activation::Silu, &mut expected).unwrap();
            backend
                .gated_matmul(&input, (&packed, None), Activation::Silu, (&mut gate_up, &mut found))
                .unwrap();
            let expected: Vec<f64> = backend.read(&expected).unwrap().iter().map(|&x| f64::from(x)).collect();
            // Sums in another order may be rounded to another neighbour, both gate and up.
            let mut tolerance = tolerances::ACTIVATION.stored_as(beside);
            tolerance.relative *= 3.0;
            tolerance.absolute += if beside == DType::F32 { 1e-3 } else { 0.02 };
            let what = format!("{rows} x {inputs} -> {width}, {dtype}");
            assert_close(&what, &backend.read(&found).unwrap(), &expected, &expected, tolerance);
        }
    }
}

#[test]
fn gated_products_with_eight_bits_activate_what_they_multiply() {
    on_every_backend!(gates_what_it_multiplies);
}

/// Every kernel there is for a product, with weights that the device rounded itself.
#[cfg(feature = "cuda")]
#[test]
fn every_kernel_for_eight_bits_agrees_with_plain_sums() {
    use backend::cuda::{Fp8Kernel, MatmulKernel};

    use crate::cases::{cuda, matrix};
    let Some(mut backend) = cuda() else { return };
    let mut random = Random(43);
    for dtype in [DType::BF16, DType::F16] {
        for (rows, inputs, outputs) in [
            (1, 784, 1003),
            (2, 4096, 512),
            (4, 272, 300),
            (8, 528, 912),
            (13, 528, 911),
            (31, 1024, 130),
            (32, 14336, 64),
            (33, 400, 1312),
            (129, 2048, 256),
            (5000, 160, 96),
            (3000, 14336, 32),
        ] {
            let values = random_as(&mut random, outputs * inputs, dtype);
            let weight = rounded_rows(&values, inputs);
            let x = random_as(&mut random, rows * inputs, dtype);
            let bias = random.vector(outputs);
            let input = upload_as(&mut backend, &x, inputs, dtype);
            let half = outputs / 2;
            let parts = [
                matrix(&values[..half * inputs], half, inputs, dtype),
                matrix(&values[half * inputs..], outputs - half, inputs, dtype),
            ];
            let packed = backend.quantized_to_fp8(&parts, dtype).unwrap();
            let bias_vector = backend.vector(bias.clone()).unwrap();
            let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
            let (exact, magnitudes) = reference(&x, &weight, Some(&bias), inputs);
            for kernel in backend.matmul_kernels(&input, &packed, &out) {
                out = upload_as(&mut backend, &vec![f32::NAN; rows * outputs], outputs, DType::F32);
                backend.matmul_with(kernel, &input, (&packed, Some(&bias_vector)), &mut out).unwrap();
                let found = backend.read(&out).unwrap();
                let what = format!("{rows} x {inputs} -> {outputs}, {dtype} by {kernel:?}");
                let (expected, tolerance) = match kernel {
                    MatmulKernel::Fp8(Fp8Kernel::Library) => {
                        let x = rounded_rows(&x, inputs);
                        (reference(&x, &weight, Some(&bias), inputs).0, tolerances::FP8_MATMUL)
                    }
                    MatmulKernel::Fp8(Fp8Kernel::Hopper { .. }) => {
                        let x = rounded_groups(&x, inputs);
                        (reference(&x, &weight, Some(&bias), inputs).0, tolerances::FP8_MATMUL)
                    }
                    MatmulKernel::Fp8(Fp8Kernel::Dequantized) => {
                        (exact.clone(), tolerances::matmul(DType::F32).stored_as(dtype))
                    }
                    _ => (exact.clone(), tolerances::matmul(dtype)),
                };
                let worst = found.iter().zip(&expected).zip(&magnitudes);
                let worst = worst.map(|((&a, &b), &m)| (f64::from(a) - b).abs() / m).fold(0.0, f64::max);
                eprintln!("{what}: {worst:.2e}");
                assert_close(&what, &found, &expected, &magnitudes, tolerance);
                backend.matmul_with(kernel, &input, (&packed, Some(&bias_vector)), &mut out).unwrap();
                assert_eq!(found, backend.read(&out).unwrap(), "{what}: the same bits again");
            }
        }
    }
}

/// A result that only a product with weights of eight bits reads may leave its operation in eight bits: the product is the same.
#[cfg(feature = "cuda")]
#[test]
fn what_one_product_reads_may_be_rounded_before_it() {
    use crate::cases::{cuda, matrix};
    let Some(mut backend) = cuda() else { return };
    let mut random = Random(44);
    for dtype in [DType::BF16, DType::F16] {
        for (rows, width, outputs) in [(65, 1040, 96), (130, 16_400, 48), (70, 4096, 64), (3, 512, 32)] {
            let values = random_as(&mut random, outputs * width, dtype);
            let weight = rounded_rows(&values, width);
            let packed = backend.quantized_to_fp8(&[matrix(&values, outputs, width, dtype)], dtype).unwrap();
            let gate_up = random_as(&mut random, 2 * width * 32, dtype);
            let gate_up = backend.quantized_to_fp8(&[matrix(&gate_up, 2 * width, 32, dtype)], dtype).unwrap();
            let x: Vec<f32> = random_as(&mut random, rows * 32, dtype).iter().map(|x| x / 4.0).collect();
            let x = upload_as(&mut backend, &x, 32, dtype);
            let delta = random_as(&mut random, rows * width, dtype);
            let delta = upload_as(&mut backend, &delta, width, dtype);
            let stream = random.vector(rows * width);
            let norm = backend.vector(random.vector(width)).unwrap();
            for is_gated in [true, false] {
                let mut found = Vec::new();
                let mut read = Vec::new();
                for is_told in [false, true] {
                    let mut both = backend.buffer(rows, 2 * width, dtype).unwrap();
                    let mut between = upload_as(&mut backend, &vec![f32::NAN; rows * width], width, dtype);
                    let mut residual = upload_as(&mut backend, &stream, width, DType::F32);
                    let mut out =
                        upload_as(&mut backend, &vec![f32::NAN; rows * outputs], outputs, DType::F32);
                    if is_told {
                        backend.comes_next(&packed);
                    }
                    if is_gated {
                        let tools = (&mut both, &mut between);
                        backend.gated_matmul(&x, (&gate_up, None), Activation::Silu, tools).unwrap();
                    } else {
                        backend.add_rms_norm(&mut residual, &delta, (&norm, 1e-5), &mut between).unwrap();
                    }
                    backend.matmul(&between, &packed, None, &mut out).unwrap();
                    if !is_told {
                        read = backend.read(&between).unwrap();
                    }
                    found.push((backend.read(&out).unwrap(), backend.read(&residual).unwrap()));
                }
                let (_, magnitudes) = reference(&read, &weight, None, width);
                let expected: Vec<f64> = found[0].0.iter().map(|&x| f64::from(x)).collect();
                let what = format!("{rows} x {width} -> {outputs}, {dtype}, gated {is_gated}");
                assert_close(&what, &found[1].0, &expected, &magnitudes, tolerances::FP8_MATMUL);
                assert_eq!(found[0].1, found[1].1, "{what}: the residual stream");
            }
        }
    }
}
