//! Kernels that go once over a row: norms, activations, and the reductions of log-softmax.

use super::simd::{LANES, Simd, erf, exp, load_partial, store_partial, tanh};
use crate::Activation;

/// Runs the body for each vector of a row, with its offset and lanes; the last may have fewer than 16. Not a function with
/// a closure: a closure that is not inlined would lack the instruction set, and each operation in it become a call.
macro_rules! vectors {
    ($width:expr, |$at:ident, $lanes:ident| $body:block) => {
        let width = $width;
        let mut $at = 0;
        while $at + LANES <= width {
            let $lanes = LANES;
            $body
            $at += LANES;
        }
        if $at < width {
            let $lanes = width - $at;
            $body
        }
    };
}

#[inline(always)]
fn load<S: Simd>(x: &[f32], offset: usize, lanes: usize) -> S::V {
    let part = &x[offset..offset + lanes];
    // SAFETY: `part` has `lanes` elements.
    unsafe { if lanes == LANES { S::load(part.as_ptr()) } else { load_partial::<S>(part.as_ptr(), lanes) } }
}

#[inline(always)]
fn store<S: Simd>(x: &mut [f32], offset: usize, lanes: usize, v: S::V) {
    let part = &mut x[offset..offset + lanes];
    // SAFETY: `part` has `lanes` elements.
    unsafe {
        if lanes == LANES {
            S::store(part.as_mut_ptr(), v)
        } else {
            store_partial::<S>(part.as_mut_ptr(), v, lanes)
        }
    }
}

/// RMSNorm of one row.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: arithmetic, and loads bounded by `load` and `store`.
    unsafe {
        let factor = rms_factor::<S>(x, eps);
        vectors!(x.len(), |at, n| {
            let v = S::mul(load::<S>(x, at, n), factor);
            store::<S>(out, at, n, S::mul(v, load::<S>(weight, at, n)));
        });
    }
}

/// LayerNorm of one row.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn layer_norm<S: Simd>(
    x: &[f32],
    (weight, bias): (&[f32], &[f32]),
    eps: f32,
    out: &mut [f32],
) {
    out.copy_from_slice(x);
    // SAFETY: the caller's.
    unsafe { layer_norm_in_place::<S>(out, (weight, bias), eps) }
}

/// LayerNorm of one row in place.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn layer_norm_in_place<S: Simd>(x: &mut [f32], (weight, bias): (&[f32], &[f32]), eps: f32) {
    // SAFETY: arithmetic, and loads bounded by `load` and `store`.
    unsafe {
        let mut sum = S::splat(0.0);
        vectors!(x.len(), |at, n| {
            sum = S::add(sum, load::<S>(x, at, n));
        });
        let mean = S::splat(S::sum(sum) / x.len() as f32);
        // The differences first: the difference of two large sums would lose what matters.
        vectors!(x.len(), |at, n| {
            store::<S>(x, at, n, S::sub(load::<S>(x, at, n), mean));
        });
        let factor = rms_factor::<S>(x, eps);
        vectors!(x.len(), |at, n| {
            let v = S::mul(load::<S>(x, at, n), factor);
            store::<S>(x, at, n, S::fma(v, load::<S>(weight, at, n), load::<S>(bias, at, n)));
        });
    }
}

/// RMSNorm of one row in place.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn rms_norm_in_place<S: Simd>(x: &mut [f32], weight: &[f32], eps: f32) {
    // SAFETY: arithmetic, and loads bounded by `load` and `store`.
    unsafe {
        let factor = rms_factor::<S>(x, eps);
        vectors!(x.len(), |at, n| {
            let v = S::mul(load::<S>(x, at, n), factor);
            store::<S>(x, at, n, S::mul(v, load::<S>(weight, at, n)));
        });
    }
}

/// What RMSNorm multiplies a row by, in every lane.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn rms_factor<S: Simd>(x: &[f32], eps: f32) -> S::V {
    // SAFETY: arithmetic, and loads bounded by `load`.
    unsafe {
        let mut squares = S::splat(0.0);
        vectors!(x.len(), |at, n| {
            let v = load::<S>(x, at, n);
            squares = S::fma(v, v, squares);
        });
        S::splat(1.0 / (S::sum(squares) / x.len() as f32 + eps).sqrt())
    }
}

/// `x *= factor`.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn scale<S: Simd>(x: &mut [f32], factor: f32) {
    vectors!(x.len(), |at, n| {
        // SAFETY: arithmetic only.
        let product = unsafe { S::mul(load::<S>(x, at, n), S::splat(factor)) };
        store::<S>(x, at, n, product);
    });
}

/// `x = cap * tanh(x / cap)`.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn soft_cap<S: Simd>(x: &mut [f32], cap: f32) {
    vectors!(x.len(), |at, n| {
        // SAFETY: arithmetic only.
        let capped = unsafe {
            let cap = S::splat(cap);
            S::mul(tanh::<S>(S::div(load::<S>(x, at, n), cap)), cap)
        };
        store::<S>(x, at, n, capped);
    });
}

/// `x += y`.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn add<S: Simd>(x: &mut [f32], y: &[f32]) {
    vectors!(x.len(), |at, n| {
        // SAFETY: arithmetic only.
        let sum = unsafe { S::add(load::<S>(x, at, n), load::<S>(y, at, n)) };
        store::<S>(x, at, n, sum);
    });
}

/// `out = activation(gate) * up` of one row.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn gated<S: Simd>(gate_up: &[f32], activation: Activation, out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    // SAFETY: arithmetic, and loads bounded by `load` and `store`.
    unsafe {
        vectors!(out.len(), |at, n| {
            let activated = activated::<S>(load::<S>(gate, at, n), activation);
            store::<S>(out, at, n, S::mul(activated, load::<S>(up, at, n)));
        });
    }
}

/// `x = activation(x)` of one row.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn activate<S: Simd>(x: &mut [f32], activation: Activation) {
    // SAFETY: arithmetic, and loads bounded by `load` and `store`.
    unsafe {
        vectors!(x.len(), |at, n| {
            let activated = activated::<S>(load::<S>(x, at, n), activation);
            store::<S>(x, at, n, activated);
        });
    }
}

/// The activation of sixteen elements.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
unsafe fn activated<S: Simd>(x: S::V, activation: Activation) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let zero = S::splat(0.0);
        let half = S::splat(0.5);
        let one = S::splat(1.0);
        match activation {
            Activation::Silu => S::div(x, S::add(one, exp::<S>(S::sub(zero, x)))),
            Activation::GeluTanh => {
                let cubed = S::mul(S::mul(x, x), x);
                let inner = S::mul(S::fma(cubed, S::splat(0.044_715), x), S::splat(0.797_884_6));
                S::mul(S::mul(x, half), S::add(one, tanh::<S>(inner)))
            }
            Activation::Gelu => {
                let scaled = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
                S::mul(S::mul(x, half), S::add(one, erf::<S>(scaled)))
            }
            Activation::Relu => S::max(x, zero),
        }
    }
}

/// The largest element, minus infinity of none.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn maximum<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: arithmetic; the chunks have 16 elements.
    unsafe {
        let (whole, rest) = x.as_chunks::<LANES>();
        let mut best = S::splat(f32::NEG_INFINITY);
        for chunk in whole {
            // In this order a lane that is not a number is passed over: `max(a, b)` is `b` then.
            best = S::max(S::load(chunk.as_ptr()), best);
        }
        rest.iter().fold(S::max_lane(best), |a, &b| if b > a { b } else { a })
    }
}

/// The sum of `exp(x - shift)`; each 4096 elements are added up in f32, those sums in f64.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn sum_exp<S: Simd>(x: &[f32], shift: f32) -> f64 {
    // SAFETY: arithmetic; the chunks have 16 elements.
    unsafe {
        let mut total = 0.0f64;
        for part in x.chunks(4096) {
            let (whole, rest) = part.as_chunks::<LANES>();
            let mut sum = S::splat(0.0);
            for chunk in whole {
                sum = S::add(sum, exp::<S>(S::sub(S::load(chunk.as_ptr()), S::splat(shift))));
            }
            total += f64::from(S::sum(sum));
            total += rest.iter().map(|&v| f64::from((v - shift).exp())).sum::<f64>();
        }
        total
    }
}
