//! Products with bf16 weights that may be stored in 12 bits: all numbers of rows, odd sizes, weights out of the reach of four bits of
//! exponent.

use backend::cpu::Isa;
use backend::{Backend, DType};

use crate::cases::{Random, cpu, matrix, on_every_backend, prompt};
use crate::many_rows::{check, keeps_activations};

/// About normally distributed, with outliers, weights far below the others, zeros of both signs and a denormal.
fn weights(random: &mut Random, len: usize) -> Vec<f32> {
    let mut values: Vec<f32> = random.vector(len).into_iter().map(|x| x * 0.02).collect();
    values.iter_mut().step_by(53).for_each(|value| *value *= 30.0);
    values.iter_mut().skip(11).step_by(1201).for_each(|value| *value *= 1e-7);
    values.iter_mut().skip(7).step_by(97).for_each(|value| *value = 0.0);
    values.iter_mut().skip(9).step_by(131).for_each(|value| *value = -0.0);
    values.iter_mut().skip(500).step_by(4001).for_each(|value| *value = -1e-39);
    values
}

fn any_rows<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(41);
    for rows in 1..=40 {
        let (inputs, outputs) =
            [(576, 40), (64, 16), (65, 31), (200, 33), (1, 1), (7, 50), (130, 17)][rows % 7];
        let (x, values) = (random.vector(rows * inputs), weights(&mut random, outputs * inputs));
        check(backend, &format!("{rows} x {inputs} -> {outputs}"), &x, &values, inputs);
    }
}

#[test]
fn any_number_of_rows_agrees_with_plain_sums() {
    on_every_backend!(any_rows);
}

/// The largest weight of each group is so large that another weight counts only by itself.
fn lonely_weights<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let (inputs, outputs) = (640, 48);
    for rows in [1, 3, 8, 30] {
        let mut values = vec![0.0; inputs * outputs];
        values.iter_mut().step_by(64).for_each(|value| *value = 1.0);
        values.iter_mut().skip(37).step_by(640).for_each(|value| *value = 1.9e-5);
        let mut x = vec![0.0; inputs * rows];
        x.iter_mut().skip(37).step_by(640).for_each(|x| *x = 3.0);
        let found = check(backend, &format!("one of few weights, {rows} rows"), &x, &values, inputs);
        if rows < 5 {
            let expected = 3.0 * half::bf16::from_f32(1.9e-5).to_f32();
            assert!(found.iter().all(|found| (found / expected - 1.0).abs() < 1e-5), "{found:?}");
        }
    }
}

#[test]
fn a_weight_far_below_its_group_is_not_lost() {
    on_every_backend!(lonely_weights);
}

/// A weight that is no number shows in its output's results alone, an activation in its row's.
fn not_a_number<B: Backend>(backend: &mut B) {
    if !keeps_activations(backend) {
        return;
    }
    let mut random = Random(42);
    let (inputs, outputs) = (192, 20);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for rows in [1, 2, 4, 6, 30] {
            let (mut x, mut values) = (random.vector(rows * inputs), random.vector(outputs * inputs));
            values[11 * inputs + 100] = bad;
            if rows > 1 {
                x[inputs + 70] = bad;
            }
            let input = crate::cases::upload(backend, &x, inputs);
            let packed =
                backend.linear(&[matrix(&values, outputs, inputs, DType::BF16)], DType::BF16).unwrap();
            let mut out = backend.buffer(rows, outputs, DType::F32).unwrap();
            backend.matmul(&input, &packed, None, &mut out).unwrap();
            for (index, found) in backend.read(&out).unwrap().into_iter().enumerate() {
                let is_bad = (rows > 1 && index / outputs == 1) || index % outputs == 11;
                assert_eq!(found.is_finite(), !is_bad, "{bad}, {rows} rows: element {index} is {found}");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_visible() {
    on_every_backend!(not_a_number);
}

/// Rows are read back to the last bit but the sign of zero, and take three quarters of the memory where the kernels have 12 bits.
#[test]
fn rows_are_what_was_packed() {
    for isa in [Isa::Avx2, Isa::Avx512Bf16].into_iter().filter(|isa| isa.is_available()) {
        let mut backend = cpu(isa, 2);
        let mut random = Random(43);
        let (rows, width) = (60, 601);
        for is_usual in [true, false] {
            let mut values = weights(&mut random, rows * width);
            if !is_usual {
                values.iter_mut().for_each(|value| *value *= 2f32.powi(random.below(60) as i32 - 30));
            }
            let table = backend.linear(&[matrix(&values, rows, width, DType::BF16)], DType::BF16).unwrap();
            let padded = 64 * 608 * 2;
            let bytes = backend.linear_bytes(&table);
            assert_eq!(bytes < padded * 4 / 5, is_usual, "{isa}: {bytes} of {padded}");
            let mut step = prompt(rows);
            step.input_ids = (0..rows as u32).collect();
            backend.begin_step(&step).unwrap();
            let mut out = backend.buffer(rows, width, DType::F32).unwrap();
            backend.embed(&table, 0, &mut out).unwrap();
            let expected: Vec<f32> = values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
            assert_eq!(backend.read(&out).unwrap(), expected, "{isa}");
        }
    }
}
