//! Sixteen lanes of f32, whatever the processor has: what the kernels are written in.
//!
//! Kernels are generic over [`Simd`], always inlined, and instantiated once for each instruction set inside a function
//! that enables it (see the `kernels!` macro). Sixteen is the panel width of packed weights, so that a lane is an output.

/// Lanes of a vector, rows of a weight panel, tokens of a key group.
pub(in crate::cpu) const LANES: usize = 16;

/// `1.5 * 2^23`: adding it to a small f32 rounds that to an integer, which is then in the low bits.
const ROUNDING: f32 = 12_582_912.0;

/// One instruction set's sixteen-lane arithmetic.
///
/// # Safety
/// Of every function: the processor must have the instruction set; pointers must be valid for the bytes their function
/// says, unaligned.
pub(in crate::cpu) trait Simd: Copy + 'static {
    /// Sixteen f32.
    type V: Copy;
    /// Largest number of tokens whose accumulators fit in registers: 24, 16, 8 or 4.
    const MAX_TILE: usize;

    unsafe fn splat(x: f32) -> Self::V;
    /// Reads 64 bytes.
    unsafe fn load(from: *const f32) -> Self::V;
    /// Reads 32 bytes of bf16.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// Reads 32 bytes of f16.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    /// Reads 16 pairs of bf16: the first of each pair, then the second.
    unsafe fn load_bf16_pairs(from: *const u32) -> (Self::V, Self::V);
    /// Writes 64 bytes.
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? x : y`, lane by lane.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `2^n` where `v = n + ROUNDING` and `-126 <= n <= 127`.
    unsafe fn pow2_shifted(v: Self::V) -> Self::V;
    unsafe fn sum(v: Self::V) -> f32;
    unsafe fn max_lane(v: Self::V) -> f32;
    /// Asks for the cache line at `from`, which need not be mapped.
    unsafe fn prefetch(from: *const u8);
}

/// Reads the first `n` lanes, zeros for the others.
///
/// # Safety
/// `from` valid for `n <= 16` f32.
#[inline(always)]
pub(super) unsafe fn load_partial<S: Simd>(from: *const f32, n: usize) -> S::V {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: the caller's contract; `lanes` has 16 f32.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
        S::load(lanes.as_ptr())
    }
}

/// Writes the first `n` lanes.
///
/// # Safety
/// `to` valid for `n <= 16` f32.
#[inline(always)]
pub(super) unsafe fn store_partial<S: Simd>(to: *mut f32, v: S::V, n: usize) {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: the caller's contract; `lanes` has 16 f32.
    unsafe {
        S::store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
    }
}

/// `e^x` to about 1e-7 relative; 0 below -87 (also for minus infinity), the largest power for what would overflow.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let lowest = S::splat(-87.0);
        let clamped = S::min(S::max(x, lowest), S::splat(88.0));
        let shifted = S::fma(clamped, S::splat(std::f32::consts::LOG2_E), S::splat(ROUNDING));
        let n = S::sub(shifted, S::splat(ROUNDING));
        // ln 2 in two parts (Cody and Waite), the first exact in 12 bits.
        let r = S::fma(n, S::splat(-0.693_359_4), clamped);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        // Taylor up to the sixth power: |r| <= ln(2)/2 leaves 1.2e-7 of relative error.
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        S::select_lt(x, lowest, S::splat(0.0), S::mul(p, S::pow2_shifted(shifted)))
    }
}

/// `tanh x` to about 1e-7 absolute.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let bounded = S::min(S::max(x, S::splat(-20.0)), S::splat(20.0));
        let e = exp::<S>(S::add(bounded, bounded));
        S::div(S::sub(e, S::splat(1.0)), S::add(e, S::splat(1.0)))
    }
}

/// `erf x` to 1.5e-7 absolute: Abramowitz and Stegun, 7.1.26.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn erf<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic only.
    unsafe {
        let zero = S::splat(0.0);
        let positive = S::max(x, S::sub(zero, x));
        let t = S::div(S::splat(1.0), S::fma(positive, S::splat(0.327_591_1), S::splat(1.0)));
        let mut p = S::splat(1.061_405_4);
        for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            p = S::fma(p, t, S::splat(c));
        }
        let tail = S::mul(S::mul(p, t), exp::<S>(S::sub(zero, S::mul(x, x))));
        let value = S::sub(S::splat(1.0), tail);
        S::select_lt(x, zero, S::sub(zero, value), value)
    }
}
