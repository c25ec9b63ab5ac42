//! Products with quantized weights, packing and reading back.

use backend::{Backend, DType, QuantizedMatrix};

// A backend that dequantizes is not asked: its products are those of `matmul`.
use crate::cases::{Random, on_every_backend, prompt, upload};
use crate::tolerances::{self, assert_close};

/// Where a matrix's scales and offsets come from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Factors {
    /// f16 scales, offsets a multiple of them (Q4_0, Q8_0).
    Zero(u8),
    /// f16 scales and offsets (Q4_1).
    Half,
    /// f32 scales and offsets.
    Full,
    /// f32 scales of either sign, offsets a multiple of them (Q6_K).
    FullZero(u8),
}

fn half(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

fn random_matrix(
    random: &mut Random,
    (rows, cols): (usize, usize),
    (bits, group_size): (u32, usize),
    factors: Factors,
) -> QuantizedMatrix {
    let groups = rows * cols / group_size;
    let values = (0..rows * cols).map(|_| (random.bits() >> (64 - bits)) as u8).collect();
    let unit = 1.0 / (1u32 << bits) as f32;
    let (mut scales, mut offsets) = (Vec::new(), Vec::new());
    for group in 0..groups {
        let scale = random.normal() * unit;
        let (scale, offset) = match factors {
            // A group of nothing, as blocks of zeros have it.
            _ if group % 7 == 3 => (0.0, 0.0),
            Factors::Zero(zero) => (half(scale), -f32::from(zero) * half(scale)),
            Factors::Half => (half(scale.abs()), half(random.normal())),
            Factors::Full => (scale.abs(), random.normal()),
            Factors::FullZero(zero) => (scale, -f32::from(zero) * scale),
        };
        scales.push(scale);
        offsets.push(offset);
    }
    QuantizedMatrix { rows, cols, bits, group_size, values, scales, offsets }
}

/// The matrix in f64, row after row.
fn plain(matrix: &QuantizedMatrix) -> Vec<f64> {
    let groups = matrix.cols / matrix.group_size;
    let weight = |index: usize| {
        let group = index / matrix.cols * groups + index % matrix.cols / matrix.group_size;
        f64::from(matrix.scales[group]) * f64::from(matrix.values[index]) + f64::from(matrix.offsets[group])
    };
    (0..matrix.rows * matrix.cols).map(weight).collect()
}

/// Every kind of matrix: bits, group size, scales and offsets.
fn kinds() -> Vec<(u32, usize, Factors)> {
    let mut kinds = Vec::new();
    for group_size in [16, 32, 64, 128] {
        for bits in 1..=8 {
            let zero = 1 << (bits - 1);
            let all = [Factors::Zero(zero), Factors::Half, Factors::Full, Factors::FullZero(zero)];
            kinds.extend(all.map(|factors| (bits, group_size, factors)));
        }
    }
    kinds
}

/// A batch of rows against a matrix of every kind.
fn agrees_with_plain_sums<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let mut random = Random(21);
    let shapes = [(32, 5), (96, 16), (576, 33), (1536, 17), (128, 100), (64, 48)];
    for (case, (bits, group_size, factors)) in kinds().into_iter().enumerate() {
        for (inputs, outputs) in [shapes[case % 6], shapes[(case + 3) % 6]] {
            if inputs % group_size != 0 {
                continue;
            }
            let rows = 1 + case % 25;
            let matrix = random_matrix(&mut random, (outputs, inputs), (bits, group_size), factors);
            let mut x = random.vector(rows * inputs);
            if case % 2 == 1 {
                // Outliers, as models have them.
                x.iter_mut().step_by(101).for_each(|x| *x *= 200.0);
            }
            let bias = (outputs % 2 == 1).then(|| random.vector(outputs));
            let what = format!("{rows} x {inputs} -> {outputs}, {bits} bits by {group_size}, {factors:?}");
            check(backend, &what, &x, &[matrix], bias.as_deref());
        }
    }
}

/// Packs the parts, multiplies and compares. Beside the largest activation of 32 the others lose bits: it counts for all of them.
fn check<B: Backend>(
    backend: &mut B,
    what: &str,
    x: &[f32],
    parts: &[QuantizedMatrix],
    bias: Option<&[f32]>,
) {
    let inputs = parts[0].cols;
    let outputs = parts.iter().map(|part| part.rows).sum();
    let packed = backend.quantized_linear(parts).unwrap();
    assert!(backend.linear_bytes(&packed) > 0);
    let input = upload(backend, x, inputs);
    let bias_vector = bias.map(|bias| backend.vector(bias.to_vec()).unwrap());
    let mut out = backend.buffer(x.len() / inputs, outputs, DType::F32).unwrap();
    backend.matmul(&input, &packed, bias_vector.as_ref(), &mut out).unwrap();
    let weight: Vec<f64> = parts.iter().flat_map(plain).collect();
    let (mut expected, mut magnitudes) = (Vec::new(), Vec::new());
    for row in x.chunks(inputs) {
        for (output, weights) in weight.chunks(inputs).enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            let products = row.iter().zip(weights).map(|(&a, &b)| f64::from(a) * b);
            expected.push(products.sum::<f64>() + bias);
            let groups = row.chunks(32).zip(weights.chunks(32)).map(|(row, weights)| {
                let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                f64::from(largest) * weights.iter().map(|weight| weight.abs()).sum::<f64>()
            });
            magnitudes.push(groups.sum::<f64>() + bias.abs());
        }
    }
    let found = backend.read(&out).unwrap();
    assert_close(what, &found, &expected, &magnitudes, tolerances::QUANTIZED_MATMUL);
}

#[test]
fn quantized_matmul_agrees_with_plain_sums() {
    on_every_backend!(agrees_with_plain_sums);
}

/// Queries and keys of Q4_K beside values of Q6_K, and other neighbours.
fn stacks_parts_of_any_kind<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let mut random = Random(22);
    let kinds = [
        [(4, 32, Factors::Full), (6, 16, Factors::FullZero(32))],
        [(4, 32, Factors::Zero(8)), (8, 32, Factors::Zero(128))],
        [(5, 32, Factors::Zero(16)), (4, 16, Factors::Half)],
        [(2, 16, Factors::Zero(0)), (4, 128, Factors::Zero(8))],
        [(8, 32, Factors::Zero(255)), (8, 32, Factors::Zero(0))],
    ];
    for pair in kinds {
        let part = |random: &mut Random, rows, (bits, group_size, factors)| {
            random_matrix(random, (rows, 384), (bits, group_size), factors)
        };
        let parts =
            [part(&mut random, 21, pair[0]), part(&mut random, 12, pair[1]), part(&mut random, 3, pair[0])];
        let x = random.vector(3 * 384);
        check(backend, &format!("{pair:?}"), &x, &parts, None);
    }
}

#[test]
fn quantized_linear_stacks_parts_of_any_kind() {
    on_every_backend!(stacks_parts_of_any_kind);
}

/// Rows of a table are what [`QuantizedMatrix::read_row`] says, to the rounding of a sum.
fn embeds<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let mut random = Random(23);
    for (bits, group_size, factors) in kinds() {
        let table = random_matrix(&mut random, (37, 128), (bits, group_size), factors);
        let packed = backend.quantized_linear(std::slice::from_ref(&table)).unwrap();
        let mut step = prompt(4);
        step.input_ids = vec![100, 136, 99, 137];
        backend.begin_step(&step).unwrap();
        let mut out = backend.buffer(4, 128, DType::F32).unwrap();
        backend.embed(&packed, 100, &mut out).unwrap();
        let mut expected = vec![0.0; 4 * 128];
        table.read_row(0, &mut expected[..128]);
        table.read_row(36, &mut expected[128..256]);
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let magnitude = vec![4.0; expected.len()];
        let what = format!("{bits} bits by {group_size}, {factors:?}");
        assert_close(&what, &backend.read(&out).unwrap(), &expected, &magnitude, tolerances::NORM);
    }
}

#[test]
fn embed_reads_quantized_rows() {
    on_every_backend!(embeds);
}

/// Activations far from 1, and none: a group's scale must neither overflow nor vanish. What is no number stays visible.
fn extreme_activations<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let mut random = Random(24);
    let matrix = random_matrix(&mut random, (16, 64), (8, 32), Factors::Zero(128));
    for factor in [0.0, 1e-37, 1e-20, 1e20, 1e34] {
        let x: Vec<f32> = random.vector(2 * 64).into_iter().map(|x| x * factor).collect();
        check(backend, &format!("activations of {factor}"), &x, std::slice::from_ref(&matrix), None);
    }
    let packed = backend.quantized_linear(&[matrix]).unwrap();
    let mut x = random.vector(64);
    x[40] = f32::NAN;
    let input = upload(backend, &x, 64);
    let mut out = backend.buffer(1, 16, DType::F32).unwrap();
    backend.matmul(&input, &packed, None, &mut out).unwrap();
    assert!(backend.read(&out).unwrap().iter().any(|x| x.is_nan()));
}

#[test]
fn quantized_matmul_of_extreme_activations() {
    on_every_backend!(extreme_activations);
}

fn refuses_bad_parts<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let good = random_matrix(&mut Random(25), (4, 64), (4, 32), Factors::Half);
    let refusal = |parts: &[QuantizedMatrix]| match backend.quantized_linear(parts) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(refusal(&[]).contains("no matrix was given"));
    let mut bad = random_matrix(&mut Random(25), (4, 96), (4, 32), Factors::Half);
    let text = refusal(&[good.clone(), bad.clone()]);
    assert!(text.contains("part 1 has 96 columns, the first has 64"), "{text}");
    bad.group_size = 48;
    let text = refusal(&[bad.clone()]);
    assert!(text.contains("groups of 48 in 96 columns"), "{text}");
    let mut bad = good.clone();
    bad.scales.pop();
    let text = refusal(&[bad]);
    assert!(text.contains("needs 256 values and 8 scales and offsets, has 256, 7 and 8"), "{text}");
    let mut bad = good;
    bad.values[77] = 16;
    let text = refusal(&[bad]);
    assert!(text.contains("values up to 16 in 4 bits"), "{text}");
}

#[test]
fn quantized_linear_refuses_parts_that_do_not_fit() {
    on_every_backend!(refuses_bad_parts);
}
