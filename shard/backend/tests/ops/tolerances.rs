//! How far results may be from f64 arithmetic on the same (rounded) weights. Measured, then doubled; never widened to
//! make a test pass.

use backend::DType;

/// `|found - expected| <= absolute + relative * magnitude`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) absolute: f64,
    pub(crate) relative: f64,
}

const fn tolerance(absolute: f64, relative: f64) -> Tolerance {
    Tolerance { absolute, relative }
}

impl Tolerance {
    /// The same for results that are stored as `dtype`: half a unit in the last place, doubled.
    pub(crate) const fn stored_as(self, dtype: DType) -> Self {
        let (absolute, relative) = match dtype {
            DType::F32 => (0.0, 0.0),
            // What is below the smallest normal number is rounded to a multiple of 2^-24.
            DType::F16 => (1.2e-7, 1.0 / 1024.0),
            DType::BF16 => (0.0, 1.0 / 128.0),
        };
        tolerance(self.absolute + absolute, self.relative + relative)
    }
}

/// Matrix product with weights of `dtype`; the magnitude is the sum of the products' absolute values. With bf16 weights
/// activations keep 16 bits.
pub(crate) const fn matmul(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 | DType::F16 => tolerance(1e-6, 1e-6),
        DType::BF16 => tolerance(1e-6, 8e-6),
    }
}

/// Matrix product of many rows with bf16 weights, where a backend computes it in 16-bit fixed point. Activations are rounded by
/// at most 1/130000 of their group's Euclidean norm (1/65534 of its largest, if that is more), small weights by 1/32768 of
/// theirs; the magnitude is the sum over the groups of 64 inputs of the products of both norms.
pub(crate) const MANY_ROWS: Tolerance = tolerance(1e-6, 8e-5);

/// Matrix product with quantized weights. Activations are rounded by at most 1/65278 of their group's largest; the magnitude is
/// as for [`matmul`] with each activation replaced by that.
pub(crate) const QUANTIZED_MATMUL: Tolerance = tolerance(1e-6, 1.6e-5);

/// Matrix product whose activations and weights both have eight bits; the magnitude is as for [`matmul`], of the rounded
/// activations. Hopper's tensor cores add products of eight bits with 14 bits before the sum goes to float32.
#[cfg(feature = "cuda")]
pub(crate) const FP8_MATMUL: Tolerance = tolerance(1e-6, 4e-4);

/// Attention over a cache of `dtype`, whose rounding the expected values do not have; magnitude 1.
pub(crate) const fn attention(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 => tolerance(2e-6, 0.0),
        DType::F16 => tolerance(2e-3, 0.0),
        DType::BF16 => tolerance(2e-2, 0.0),
    }
}

/// Attention of activations of `dtype` over a cache that holds what the expected values are made of; the magnitude is the
/// result's. The weights of the values are rounded as well as the result.
pub(crate) const fn attention_of(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 => tolerance(2e-6, 0.0),
        DType::F16 => tolerance(5e-4, 5e-4),
        DType::BF16 => tolerance(4e-3, 4e-3),
    }
}

/// A mixture of experts with weights of `dtype`; the magnitude is that of the projections out of products of the absolute sums
/// of the projections in.
pub(crate) const fn experts(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 | DType::F16 => tolerance(1e-6, 1e-6),
        DType::BF16 => tolerance(1e-6, 8e-6),
    }
}

/// The same with quantized weights, beside which activations are rounded as in [`QUANTIZED_MATMUL`].
pub(crate) const QUANTIZED_EXPERTS: Tolerance = tolerance(1e-6, 1.6e-5);

/// RMSNorm.
pub(crate) const NORM: Tolerance = tolerance(1e-6, 1e-6);
/// Rotary embedding: the angle is rounded to f32 on both sides.
pub(crate) const ROPE: Tolerance = tolerance(1e-6, 1e-6);
/// The same of activations of `dtype`, whose rounding the result has.
pub(crate) const fn rope_of(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 => ROPE,
        DType::F16 => tolerance(1e-6, 5e-4),
        DType::BF16 => tolerance(1e-6, 4e-3),
    }
}
/// Gated activations.
pub(crate) const ACTIVATION: Tolerance = tolerance(2e-6, 2e-6);
/// Log-probabilities.
pub(crate) const LOGPROB: Tolerance = tolerance(4e-6, 1e-6);

/// Fails with the place of the worst element. `magnitude` says what the relative part refers to.
pub(crate) fn assert_close(
    what: &str,
    found: &[f32],
    expected: &[f64],
    magnitude: &[f64],
    tolerance: Tolerance,
) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let allowed = tolerance.absolute + tolerance.relative * magnitude[index].abs();
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= allowed,
            "{what}: element {index} is {found}, expected {expected}, off by {error:e} > {allowed:e}"
        );
    }
}
