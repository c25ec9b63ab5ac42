//! Gated activations, factors and soft caps.

use backend::{Activation, Backend, DType};

use crate::cases::{Random, activation_types, on_every_backend, random_as, rounded, upload_as};
use crate::tolerances::{ACTIVATION, assert_close};

/// The error function by its Taylor series, and 1 where that is within 1e-15.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.9 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn reference(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::Relu => x.max(0.0),
    }
}

/// Every activation with every type that values may have.
fn activations<B: Backend>(backend: &B) -> Vec<(Activation, DType)> {
    let all = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu];
    let pairs = |&dtype: &DType| all.map(|activation| (activation, dtype));
    activation_types(backend).iter().flat_map(pairs).collect()
}

fn agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(5);
    for (activation, dtype) in activations(backend) {
        for (rows, width) in [(1, 1536), (3, 17), (65, 130)] {
            let values = random.vector(rows * 2 * width);
            let mut x: Vec<f32> = values.iter().map(|x| rounded(x * 2.0, dtype)).collect();
            // Far out, where exponentials overflow.
            x[0] = 120.0;
            x[1] = -120.0;
            let input = upload_as(backend, &x, 2 * width, dtype);
            let mut out = backend.buffer(rows, width, dtype).unwrap();
            backend.gated_activation(&input, activation, &mut out).unwrap();
            let mut expected = Vec::new();
            let mut magnitude = Vec::new();
            for row in x.chunks(2 * width) {
                let (gate, up) = row.split_at(width);
                for (&gate, &up) in gate.iter().zip(up) {
                    expected.push(reference(f64::from(gate), activation) * f64::from(up));
                    magnitude.push(f64::from(gate) * f64::from(up));
                }
            }
            assert_close(
                &format!("{activation:?} of {dtype}"),
                &backend.read(&out).unwrap(),
                &expected,
                &magnitude,
                ACTIVATION.stored_as(dtype),
            );
        }
    }
}

fn elementwise_agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(15);
    let sizes = [(1, 17), (3, 130), (65, 300)];
    let cases = activation_types(backend).iter().flat_map(|&dtype| sizes.map(|size| (dtype, size)));
    for (dtype, (rows, width)) in cases {
        let x: Vec<f32> = random.vector(rows * width).iter().map(|x| rounded(x * 40.0, dtype)).collect();
        let mut scaled = upload_as(backend, &x, width, dtype);
        backend.scale(&mut scaled, 0.6).unwrap();
        let expected: Vec<f32> = x.iter().map(|x| rounded(x * 0.6, dtype)).collect();
        assert_eq!(backend.read(&scaled).unwrap(), expected, "one rounding");

        let mut capped = upload_as(backend, &x, width, dtype);
        backend.soft_cap(&mut capped, 30.0).unwrap();
        let expected: Vec<f64> = x.iter().map(|&x| 30.0 * (f64::from(x) / 30.0).tanh()).collect();
        let magnitude = vec![30.0; expected.len()];
        let found = backend.read(&capped).unwrap();
        assert_close("soft_cap", &found, &expected, &magnitude, ACTIVATION.stored_as(dtype));
    }
}

fn activations_alone_agree<B: Backend>(backend: &mut B) {
    let mut random = Random(33);
    for (activation, dtype) in activations(backend) {
        for (rows, width) in [(1, 1536), (3, 17), (65, 130)] {
            let x: Vec<f32> = random.vector(rows * width).iter().map(|x| rounded(x * 2.0, dtype)).collect();
            let mut buffer = upload_as(backend, &x, width, dtype);
            backend.activate(&mut buffer, activation).unwrap();
            let magnitude: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let expected: Vec<f64> = magnitude.iter().map(|&x| reference(x, activation)).collect();
            let found = backend.read(&buffer).unwrap();
            let what = format!("{activation:?} of {dtype} alone");
            assert_close(&what, &found, &expected, &magnitude, ACTIVATION.stored_as(dtype));
        }
    }
}

fn sums_and_limits_are_exact<B: Backend>(backend: &mut B) {
    let mut random = Random(34);
    let types = activation_types(backend);
    // The residual stream is f32, whatever is added.
    let pairs = types.iter().flat_map(|&dtype| [(dtype, dtype), (DType::F32, dtype)]);
    for ((dtype, added), (rows, width)) in
        pairs.flat_map(|pair| [(1, 33), (70, 130)].map(|size| (pair, size)))
    {
        let x = random_as(&mut random, rows * width, dtype);
        let y = random_as(&mut random, rows * width, added);
        let mut buffer = upload_as(backend, &x, width, dtype);
        let addend = upload_as(backend, &y, width, added);
        backend.add(&mut buffer, &addend).unwrap();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| rounded(x + y, dtype)).collect();
        assert_eq!(backend.read(&buffer).unwrap(), sum, "{added} added to {dtype}");
        backend.clamp(&mut buffer, 0.75).unwrap();
        let clamped: Vec<f32> = sum.iter().map(|x| x.clamp(-0.75, 0.75)).collect();
        assert_eq!(backend.read(&buffer).unwrap(), clamped);
    }
}

#[test]
fn activations_alone_sums_and_limits() {
    on_every_backend!(activations_alone_agree);
    on_every_backend!(sums_and_limits_are_exact);
}

#[test]
fn factors_and_soft_caps_agree_with_their_formulas() {
    on_every_backend!(elementwise_agrees);
}

#[test]
fn activations_agree_with_their_formulas() {
    on_every_backend!(agrees);
}
