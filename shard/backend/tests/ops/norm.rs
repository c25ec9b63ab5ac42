//! RMSNorm and LayerNorm, alone and with the residual.

use backend::{Backend, DType, SplitNorm};

use crate::cases::{Random, activation_types, on_every_backend, random_as, rounded, upload, upload_as};
use crate::tolerances::{NORM, assert_close};

fn reference(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let factor = 1.0 / (squares / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * factor * f64::from(w)).collect()
}

/// Sizes of rows: also some that no vector divides, and one that is too wide to be kept in registers.
const SIZES: [(usize, usize); 9] =
    [(1, 576), (3, 17), (17, 63), (65, 128), (1, 1), (2, 4096), (129, 264), (1, 16_384), (2, 20_000)];

fn agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(4);
    for &dtype in activation_types(backend) {
        for (rows, width) in SIZES {
            let x = random.vector(rows * width);
            let (delta, weight) = (random_as(&mut random, rows * width, dtype), random.vector(width));
            let norm = backend.vector(weight.clone()).unwrap();
            let expected = |x: &[f32]| -> Vec<f64> {
                x.chunks(width).flat_map(|row| reference(row, &weight, 1e-5)).collect()
            };
            let tolerance = NORM.stored_as(dtype);
            let mut out = backend.buffer(rows, width, dtype).unwrap();
            let mut residual = upload(backend, &x, width);
            backend.rms_norm(&residual, &norm, 1e-5, &mut out).unwrap();
            let normed = expected(&x);
            let what = format!("rms_norm {rows} x {width} into {dtype}");
            assert_close(&what, &backend.read(&out).unwrap(), &normed, &normed, tolerance);

            let mut addend = upload_as(backend, &delta, width, dtype);
            backend.add_rms_norm(&mut residual, &addend, (&norm, 1e-5), &mut out).unwrap();
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            assert_eq!(backend.read(&residual).unwrap(), sum, "the residual is the sum");
            let normed = expected(&sum);
            assert_close("add_rms_norm", &backend.read(&out).unwrap(), &normed, &normed, tolerance);

            let normed = expected(&delta);
            let mut wide = backend.buffer(rows, width, DType::F32).unwrap();
            backend.rms_norm(&addend, &norm, 1e-5, &mut wide).unwrap();
            let what = format!("rms_norm of {dtype}");
            assert_close(&what, &backend.read(&wide).unwrap(), &normed, &normed, NORM);
            backend.rms_norm_in_place(&mut addend, &norm, 1e-5).unwrap();
            let what = format!("rms_norm of {dtype} in place");
            assert_close(&what, &backend.read(&addend).unwrap(), &normed, &normed, tolerance);
        }
    }
}

fn layer_reference(x: &[f32], (weight, bias): (&[f32], &[f32]), eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (variance + eps).sqrt();
    let affine = weight.iter().zip(bias);
    x.iter()
        .zip(affine)
        .map(|(&x, (&w, &b))| (f64::from(x) - mean) * factor * f64::from(w) + f64::from(b))
        .collect()
}

fn layers_agree<B: Backend>(backend: &mut B) {
    let mut random = Random(24);
    for &dtype in activation_types(backend) {
        for (rows, width) in SIZES.into_iter().filter(|&(_, width)| width > 1) {
            // A mean of its own, which has to go.
            let x: Vec<f32> = random.vector(rows * width).iter().map(|x| x + 2.0).collect();
            let delta = random_as(&mut random, rows * width, dtype);
            let (weight, bias) = (random.vector(width), random.vector(width));
            let (w, b) = (backend.vector(weight.clone()).unwrap(), backend.vector(bias.clone()).unwrap());
            let expected = |x: &[f32]| -> Vec<f64> {
                x.chunks(width).flat_map(|row| layer_reference(row, (&weight, &bias), 1e-5)).collect()
            };
            let magnitude = vec![4.0; rows * width];
            let tolerance = NORM.stored_as(dtype);
            let mut out = backend.buffer(rows, width, dtype).unwrap();
            let mut residual = upload(backend, &x, width);
            backend.layer_norm(&residual, (&w, &b), 1e-5, &mut out).unwrap();
            let what = format!("layer_norm {rows} x {width} into {dtype}");
            assert_close(&what, &backend.read(&out).unwrap(), &expected(&x), &magnitude, tolerance);

            let mut addend = upload_as(backend, &delta, width, dtype);
            backend.add_layer_norm(&mut residual, &addend, (&w, &b, 1e-5), &mut out).unwrap();
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            assert_eq!(backend.read(&residual).unwrap(), sum, "the residual is the sum");
            let found = backend.read(&out).unwrap();
            assert_close("add_layer_norm", &found, &expected(&sum), &magnitude, tolerance);

            let normed = expected(&delta);
            backend.layer_norm_in_place(&mut addend, (&w, &b), 1e-5).unwrap();
            let what = format!("layer_norm of {dtype} in place");
            assert_close(&what, &backend.read(&addend).unwrap(), &normed, &magnitude, tolerance);
        }
    }
}

#[test]
fn layer_norms_agree_with_plain_sums() {
    on_every_backend!(layers_agree);
}

fn heads_agree<B: Backend>(backend: &mut B) {
    let mut random = Random(14);
    for &dtype in activation_types(backend) {
        for (rows, head_dim, width, columns) in [
            (1, 64, 320, 0..192),
            (17, 20, 100, 60..100),
            (65, 128, 640, 128..512),
            (3, 6, 20, 2..14),
            (2, 256, 1024, 0..768),
            (1, 600, 1200, 0..1200),
        ] {
            let (x, weight) = (random_as(&mut random, rows * width, dtype), random.vector(head_dim));
            let norm = backend.vector(weight.clone()).unwrap();
            let mut found = upload_as(backend, &x, width, dtype);
            backend.rms_norm_heads(&mut found, columns.clone(), &norm, 1e-6).unwrap();
            let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for (row, x) in expected.chunks_mut(width).zip(x.chunks(width)) {
                let heads = x[columns.clone()].chunks(head_dim);
                for (out, head) in row[columns.clone()].chunks_mut(head_dim).zip(heads) {
                    out.copy_from_slice(&reference(head, &weight, 1e-6));
                }
            }
            let found = backend.read(&found).unwrap();
            assert_close("rms_norm_heads", &found, &expected, &expected, NORM.stored_as(dtype));
        }
    }
}

#[test]
fn heads_are_normalised_one_by_one() {
    on_every_backend!(heads_agree);
}

#[test]
fn norms_agree_with_plain_sums() {
    on_every_backend!(agrees);
}

fn heads_with_own_weights_agree<B: Backend>(backend: &mut B) {
    let mut random = Random(31);
    let sizes = [(1, 3, 64), (5, 2, 17), (40, 9, 32)];
    let cases = activation_types(backend).iter().flat_map(|&dtype| sizes.map(|size| (dtype, size)));
    for (dtype, (rows, heads, head_dim)) in cases {
        let (before, width) = (4, 4 + heads * head_dim + 3);
        let x: Vec<f32> = random.vector(rows * width).iter().map(|x| rounded(x + 1.0, dtype)).collect();
        let weight = random.vector(heads * head_dim);
        let norm = backend.vector(weight.clone()).unwrap();
        let mut buffer = upload_as(backend, &x, width, dtype);
        let columns = before..before + heads * head_dim;
        backend.layer_norm_heads(&mut buffer, columns.clone(), head_dim, (&norm, 1e-5)).unwrap();
        let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (row, expected) in x.chunks(width).zip(expected.chunks_mut(width)) {
            let heads = row[columns.clone()].chunks(head_dim).zip(weight.chunks(head_dim));
            let zeros = vec![0.0; head_dim];
            let normed = heads.flat_map(|(head, weight)| layer_reference(head, (weight, &zeros), 1e-5));
            expected[columns.clone()].iter_mut().zip(normed).for_each(|(place, value)| *place = value);
        }
        let magnitude = vec![4.0; expected.len()];
        let found = backend.read(&buffer).unwrap();
        assert_close("layer_norm_heads", &found, &expected, &magnitude, NORM.stored_as(dtype));
    }
}

/// On one rank; several are tested with whole models.
fn all_heads_together_agree<B: Backend>(backend: &mut B) {
    let mut random = Random(32);
    let sizes = [(1, 96, 0..64), (33, 70, 5..70)];
    let cases = activation_types(backend).iter().flat_map(|&dtype| sizes.clone().map(|size| (dtype, size)));
    for (dtype, (rows, width, columns)) in cases {
        let (x, weight) = (random_as(&mut random, rows * width, dtype), random.vector(columns.len()));
        let norm = backend.vector(weight.clone()).unwrap();
        let mut buffer = upload_as(backend, &x, width, dtype);
        let mut squares = backend.buffer(rows, 1, DType::F32).unwrap();
        // Two ranks with the same columns would bring half each; here half is missing.
        for copies in [1, 2] {
            let split = SplitNorm { weight: &norm, eps: 1e-5, total_width: columns.len(), copies };
            let input = backend.read(&buffer).unwrap();
            backend.rms_norm_across_ranks(&mut buffer, columns.clone(), split, &mut squares).unwrap();
            let mut expected: Vec<f64> = input.iter().map(|&x| f64::from(x)).collect();
            for (row, expected) in input.chunks(width).zip(expected.chunks_mut(width)) {
                let row = &row[columns.clone()];
                let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                let factor = 1.0 / (squares / copies as f64 / columns.len() as f64 + 1e-5).sqrt();
                let normed = row.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * factor * f64::from(w));
                expected[columns.clone()].iter_mut().zip(normed).for_each(|(place, value)| *place = value);
            }
            let found = backend.read(&buffer).unwrap();
            assert_close("rms_norm_across_ranks", &found, &expected, &expected, NORM.stored_as(dtype));
        }
    }
}

#[test]
fn norms_of_heads_match_their_references() {
    on_every_backend!(heads_with_own_weights_agree);
    on_every_backend!(all_heads_together_agree);
}
