//! Products of many rows with bf16 weights, which some kernels compute in 16-bit fixed point: the magnitudes that errors are
//! relative to are those of `tolerances::MANY_ROWS`.

use backend::cpu::Isa;
use backend::{Backend, DType};

use crate::cases::{Random, cpu, matrix, on_every_backend, rounded, upload};
use crate::tolerances::{MANY_ROWS, assert_close};

/// Inputs that share a scale.
const GROUP: usize = 64;

/// `x weight^T` and for each result the sum over the groups of the products of the Euclidean norms.
fn reference(x: &[f32], weight: &[f32], inputs: usize) -> (Vec<f64>, Vec<f64>) {
    let norm = |values: &[f32]| values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let (mut sums, mut magnitudes) = (Vec::new(), Vec::new());
    for row in x.chunks(inputs) {
        for weights in weight.chunks(inputs) {
            sums.push(row.iter().zip(weights).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum());
            let groups = row.chunks(GROUP).zip(weights.chunks(GROUP));
            magnitudes.push(groups.map(|(a, b)| norm(a) * norm(b)).sum());
        }
    }
    (sums, magnitudes)
}

/// Whether float32 activations are multiplied as they are, to the accuracy of these tests; on a GPU they are rounded to the
/// weights' type first, and `matmul` has its products.
pub(crate) fn keeps_activations<B: Backend>(backend: &B) -> bool {
    backend.device().device_type == "cpu"
}

pub(crate) fn check<B: Backend>(
    backend: &mut B,
    what: &str,
    x: &[f32],
    values: &[f32],
    inputs: usize,
) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, values.len() / inputs);
    let weight: Vec<f32> = values.iter().map(|&x| rounded(x, DType::BF16)).collect();
    let input = upload(backend, x, inputs);
    let packed = backend.linear(&[matrix(values, outputs, inputs, DType::BF16)], DType::BF16).unwrap();
    let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
    backend.matmul(&input, &packed, None, &mut out).unwrap();
    let (expected, magnitudes) = reference(x, &weight, inputs);
    let found = backend.read(&out).unwrap();
    assert_close(what, &found, &expected, &magnitudes, MANY_ROWS);
    found
}

/// Sizes around those of groups, tiles and panels, and around the number of rows from which fixed point is used.
fn agrees_with_plain_sums<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(31);
    for (rows, inputs, outputs) in [
        (4, 64, 16),
        (5, 65, 31),
        (6, 576, 40),
        (8, 200, 33),
        (11, 1537, 16),
        (13, 130, 17),
        (16, 64, 16),
        (24, 200, 20),
        (25, 64, 16),
        (33, 1, 1),
        (36, 63, 17),
        (40, 65, 33),
        (41, 576, 40),
        (48, 130, 100),
        (64, 31, 200),
        (97, 1537, 21),
    ] {
        let what = format!("{rows} x {inputs} -> {outputs}");
        let (mut x, mut values) = (random.vector(rows * inputs), random.vector(outputs * inputs));
        check(backend, &what, &x, &values, inputs);
        // Outliers, as models have them.
        x.iter_mut().step_by(101).for_each(|x| *x *= 200.0);
        values.iter_mut().step_by(53).for_each(|value| *value *= 30.0);
        check(backend, &format!("{what} with outliers"), &x, &values, inputs);
    }
}

#[test]
fn many_rows_agree_with_plain_sums() {
    on_every_backend!(agrees_with_plain_sums);
}

/// Rows that are the weights themselves, and their negatives: no product is larger for its norms, and none may overflow.
fn parallel_rows<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(32);
    for (case, inputs) in [64, 128, 576].into_iter().enumerate() {
        let outputs = 36;
        let mut values = random.vector(outputs * inputs);
        match case {
            0 => values.iter_mut().for_each(|value| *value = value.signum()),
            1 => values.iter_mut().for_each(|value| *value = value.signum() * 1.992_187_5),
            _ => {}
        }
        let x: Vec<f32> = values.iter().map(|&x| rounded(x, DType::BF16) * -3.1).collect();
        check(backend, &format!("parallel rows of {inputs}"), &x, &values, inputs);
    }
}

#[test]
fn many_parallel_rows_do_not_overflow() {
    on_every_backend!(parallel_rows);
}

/// Groups far from 1, of nothing, and of one number alone.
fn extreme_groups<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(33);
    let (rows, inputs, outputs) = (34, 192, 18);
    for (large, small) in [(0.0, 1.0), (1e-20, 1.0), (1e15, 1.0), (1.0, 1e-15), (1e15, 1e15), (1e-12, 1e-12)]
    {
        let x: Vec<f32> = random.vector(rows * inputs).into_iter().map(|x| x * large).collect();
        let values: Vec<f32> = random.vector(outputs * inputs).into_iter().map(|x| x * small).collect();
        check(backend, &format!("activations of {large}, weights of {small}"), &x, &values, inputs);
    }
    let mut x = vec![0.0; rows * inputs];
    let mut values = vec![0.0; outputs * inputs];
    x.iter_mut().step_by(193).for_each(|x| *x = 5.0);
    values.iter_mut().step_by(191).for_each(|value| *value = -1.992_187_5);
    check(backend, "one number a row", &x, &values, inputs);
}

#[test]
fn many_rows_of_extreme_groups() {
    on_every_backend!(extreme_groups);
}

/// What is no number stays visible, and only where it belongs.
fn not_a_number<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(34);
    let (inputs, outputs) = (128, 20);
    for (bad, rows) in [(f32::NAN, 40), (f32::INFINITY, 40), (f32::NAN, 8), (f32::INFINITY, 8)] {
        let (mut x, mut values) = (random.vector(rows * inputs), random.vector(outputs * inputs));
        x[7 * inputs + 70] = bad;
        values[11 * inputs + 100] = bad;
        let input = upload(backend, &x, inputs);
        let packed = backend.linear(&[matrix(&values, outputs, inputs, DType::BF16)], DType::BF16).unwrap();
        let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
        backend.matmul(&input, &packed, None, &mut out).unwrap();
        for (index, found) in backend.read(&out).unwrap().into_iter().enumerate() {
            let is_bad = index / outputs == 7 || index % outputs == 11;
            assert_eq!(found.is_finite(), !is_bad, "{bad}: element {index} is {found}");
        }
    }
}

#[test]
fn many_rows_show_what_is_no_number() {
    on_every_backend!(not_a_number);
}

/// In fixed point a row's result does not depend on its place or its neighbours, to the last bit.
#[test]
fn many_rows_in_fixed_point_do_not_depend_on_one_another() {
    for isa in [Isa::Avx512Vnni, Isa::Avx512Bf16].into_iter().filter(|isa| isa.is_available()) {
        let mut backend = cpu(isa, 2);
        let mut random = Random(35);
        let (inputs, outputs) = (200, 50);
        let values = random.vector(outputs * inputs);
        let row = random.vector(inputs);
        let mut results: Vec<Vec<f32>> = Vec::new();
        for (rows, place) in [(5, 4), (8, 0), (12, 11), (14, 13), (30, 29), (64, 0), (65, 30), (50, 49)] {
            let mut x = random.vector(rows * inputs);
            x[place * inputs..(place + 1) * inputs].copy_from_slice(&row);
            let found = check(&mut backend, &format!("row {place} of {rows}"), &x, &values, inputs);
            results.push(found[place * outputs..(place + 1) * outputs].to_vec());
        }
        assert!(results.iter().all(|result| *result == results[0]), "{isa}");
    }
}
