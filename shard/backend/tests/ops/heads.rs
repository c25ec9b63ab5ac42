//! A matrix for each head, and copies of heads.

use backend::{Backend, DType, HeadColumns};

use crate::cases::{Random, matrix, on_every_backend, rounded, upload};
use crate::tolerances::{self, assert_close};

fn multiplies<B: Backend>(backend: &mut B) {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (rows, heads, inputs, outputs) in
            [(1, 3, 16, 12), (1, 1, 33, 70), (2, 5, 7, 16), (50, 4, 24, 37), (27, 2, 40, 5)]
        {
            let mut random = Random((rows + heads) as u64);
            let from = HeadColumns { first: 3, stride: inputs + 2, width: inputs };
            let to = HeadColumns { first: 1, stride: outputs + 4, width: outputs };
            let (x_width, out_width) = (from.first + heads * from.stride, to.first + heads * to.stride + 1);
            let x = random.vector(rows * x_width);
            let before = random.vector(rows * out_width);
            let weights: Vec<Vec<f32>> = (0..heads).map(|_| random.vector(outputs * inputs)).collect();
            let packed: Vec<_> = weights
                .iter()
                .map(|weight| backend.linear(&[matrix(weight, outputs, inputs, DType::F32)], dtype).unwrap())
                .collect();
            let input = upload(backend, &x, x_width);
            let mut out = upload(backend, &before, out_width);
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
                tolerances::matmul(dtype),
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
    let (x, before) = (random.vector(3 * 20), random.vector(3 * 17));
    let input = upload(backend, &x, 20);
    let mut out = upload(backend, &before, 17);
    let from = HeadColumns { first: 2, stride: 7, width: 4 };
    let to = HeadColumns { first: 1, stride: 5, width: 4 };
    backend.copy_heads((&input, from), 2, (&mut out, to)).unwrap();
    let mut expected = before;
    for row in 0..3 {
        for head in 0..2 {
            for column in 0..4 {
                expected[row * 17 + 1 + head * 5 + column] = x[row * 20 + 2 + head * 7 + column];
            }
        }
    }
    assert_eq!(backend.read(&out).unwrap(), expected);
}

#[test]
fn heads_are_copied_and_the_rest_stays() {
    on_every_backend!(copies);
}
