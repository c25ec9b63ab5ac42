//! Gated activations, factors and soft caps.

use backend::{Activation, Backend};

use crate::cases::{Random, on_every_backend, upload};
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

fn agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(5);
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu] {
        for (rows, width) in [(1, 1536), (3, 17), (65, 130)] {
            let mut x: Vec<f32> = random.vector(rows * 2 * width).iter().map(|x| x * 2.0).collect();
            // Far out, where exponentials overflow.
            x[0] = 120.0;
            x[1] = -120.0;
            let input = upload(backend, &x, 2 * width);
            let mut out = backend.buffer(rows, width).unwrap();
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
                &format!("{activation:?}"),
                &backend.read(&out).unwrap(),
                &expected,
                &magnitude,
                ACTIVATION,
            );
        }
    }
}

fn elementwise_agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(15);
    for (rows, width) in [(1, 17), (3, 130), (65, 300)] {
        let x: Vec<f32> = random.vector(rows * width).iter().map(|x| x * 40.0).collect();
        let mut scaled = upload(backend, &x, width);
        backend.scale(&mut scaled, 0.6).unwrap();
        let expected: Vec<f32> = x.iter().map(|x| x * 0.6).collect();
        assert_eq!(backend.read(&scaled).unwrap(), expected, "one rounding");

        let mut capped = upload(backend, &x, width);
        backend.soft_cap(&mut capped, 30.0).unwrap();
        let expected: Vec<f64> = x.iter().map(|&x| 30.0 * (f64::from(x) / 30.0).tanh()).collect();
        let magnitude = vec![30.0; expected.len()];
        assert_close("soft_cap", &backend.read(&capped).unwrap(), &expected, &magnitude, ACTIVATION);
    }
}

#[test]
fn factors_and_soft_caps_agree_with_their_formulas() {
    on_every_backend!(elementwise_agrees);
}

#[test]
fn activations_agree_with_their_formulas() {
    on_every_backend!(agrees);
}
