//! A matrix for each head, and copies of heads.

use backend::{Backend, DType, HeadColumns};

use crate::cases::{
    Random, activation_types, activations_beside, matrix, on_every_backend, random_as, rounded, upload_as,
};
use crate::tolerances::{self, assert_close};

/// Rows, heads, and what each takes and gives: more rows than a tile, more heads than a launch.
const SIZES: [(usize, usize, usize, usize); 9] = [
    (1, 3, 16, 12),
    (1, 1, 33, 70),
    (2, 5, 7, 16),
    (50, 4, 24, 37),
    (27, 2, 40, 5),
    (1, 16, 128, 512),
    (130, 3, 512, 128),
    (33, 2, 72, 130),
    (3, 70, 8, 9),
];

fn multiplies<B: Backend>(backend: &mut B) {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (rows, heads, inputs, outputs) in SIZES {
            let mut random = Random((rows + heads) as u64);
            // Whole vectors where the heads are some, so that both ways of loading rows are taken.
            let (first, gap) = if inputs % 8 == 0 { (8, 16) } else { (3, 2) };
            let from = HeadColumns { first, stride: inputs + gap, width: inputs };
            let to = HeadColumns { first: 1, stride: outputs + 4, width: outputs };
            let (x_width, out_width) = (from.first + heads * from.stride, to.first + heads * to.stride + 1);
            let activations = activations_beside(backend, dtype);
            let x = random_as(&mut random, rows * x_width, activations);
            let before = random_as(&mut random, rows * out_width, activations);
            let weights: Vec<Vec<f32>> = (0..heads).map(|_| random.vector(outputs * inputs)).collect();
            let packed: Vec<_> = weights
                .iter()
                .map(|weight| backend.linear(&[matrix(weight, outputs, inputs, DType::F32)], dtype).unwrap())
                .collect();
            let input = upload_as(backend, &x, x_width, activations);
            let mut out = upload_as(backend, &before, out_width, activations);
            backend.matmul_heads((&input, from), &packed, (&mut out, to)).unwrap();
            let mut expected: Vec<f64> = before.iter().map(|&value| f64::from(value)).collect();
            let mut magnitudes = vec![0.0; expected.len()];
            for row in 0..rows {
                for head in 0..heads {
                    let x = &x[row * x_width + from.first + head * from.stride..][..inputs];
                    for output in 0..outputs {
                        let weight = &weights[head][output * inputs..(output + 1) * inputs];
                        let products =
                            x.iter().zip(weight).map(|(&a, &b)| f64::from(a) * f64::from(rounded(b, dtype)));
                        let place = row * out_width + to.first + head * to.stride + output;
                        magnitudes[place] = products.clone().map(f64::abs).sum();
                        expected[place] = products.sum();
                    }
                }
            }
            assert_close(
                &format!("{rows} rows of {heads} heads {inputs} -> {outputs}, {dtype}"),
                &backend.read(&out).unwrap(),
                &expected,
                &magnitudes,
                tolerances::matmul(dtype).stored_as(activations),
            );
        }
    }
}

#[test]
fn each_head_is_multiplied_with_its_matrix() {
    on_every_backend!(multiplies);
}

fn copies<B: Backend>(backend: &mut B) {
    let mut random = Random(8);
    // In units of one element, and of eight.
    let cases = activation_types(backend).iter().flat_map(|&dtype| [(dtype, 1), (dtype, 8)]);
    for (dtype, unit) in cases {
        let (x_width, out_width) = (20 * unit, 17 * unit);
        let x = random_as(&mut random, 3 * x_width, dtype);
        let before = random_as(&mut random, 3 * out_width, dtype);
        let input = upload_as(backend, &x, x_width, dtype);
        let mut out = upload_as(backend, &before, out_width, dtype);
        let from = HeadColumns { first: 2 * unit, stride: 7 * unit, width: 4 * unit };
        let to = HeadColumns { first: unit, stride: 5 * unit, width: 4 * unit };
        backend.copy_heads((&input, from), 2, (&mut out, to)).unwrap();
        let mut expected = before;
        for row in 0..3 {
            for head in 0..2 {
                for column in 0..from.width {
                    expected[row * out_width + to.first + head * to.stride + column] =
                        x[row * x_width + from.first + head * from.stride + column];
                }
            }
        }
        assert_eq!(backend.read(&out).unwrap(), expected, "{dtype}, {unit} elements");
    }
}

#[test]
fn heads_are_copied_and_the_rest_stays() {
    on_every_backend!(copies);
}
