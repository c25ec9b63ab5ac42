//! Quantized weights times activations with integer dot products.
//!
//! Weights are panels of sixteen outputs as in [`super::matmul`]; a step is four inputs of each output, one byte each, so that
//! 64 bytes are a vector of four-byte dot products with an output a lane. 4-bit values lie two steps in 64 bytes. A group is its
//! sixteen scales, its sixteen offsets where there are any, and its values: memory is read in one straight line.
//!
//! Activations become 16-bit integers (`-32639..=32639`) with a scale for each group of inputs, as finely as the weights are
//! grouped. A group's sum of products is exact in 32 bits: at most `255 * 32639 * 32`.

use super::matmul::{MatmulArgs, PackArgs, Place};
use super::simd::{LANES, Simd};

/// The largest activation of a group becomes this: the high byte of `256 * high + low` then fits a signed byte even where the
/// low one is rounded up.
const LARGEST: f32 = 32_639.0;

/// Groups whose largest activation is below this count as zero, since its reciprocal might not be finite.
const NEGLIGIBLE: f32 = 1e-30;

/// How far ahead of the arithmetic a weight stream is asked for, as for other weights.
const PREFETCH_BYTES: usize = 2048;

/// Inputs of a step.
pub(in crate::cpu) const STEP: usize = 4;

/// Bytes of a step of 8-bit values, of two steps of 4-bit values.
pub(in crate::cpu) const STEP_BYTES: usize = STEP * LANES;

/// `1.5 * 2^23`: adding it to a small f32 rounds that to an integer, which is then in the low bits.
const ROUNDING: f32 = 12_582_912.0;

/// How the groups of a packed matrix lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cpu) struct GroupLayout {
    /// Bits of a stored value: 4 or 8.
    pub(in crate::cpu) bits: u32,
    /// Inputs of a group: 16 or 32.
    pub(in crate::cpu) group_size: usize,
    /// Groups of an output.
    pub(in crate::cpu) groups: usize,
    /// Scales and offsets are f32 rather than f16.
    pub(in crate::cpu) is_wide: bool,
    /// Groups have offsets; without, a weight is `scale * (value - zero)`.
    pub(in crate::cpu) has_offsets: bool,
    /// See `has_offsets`; 0 with them.
    pub(in crate::cpu) zero: i32,
}

impl GroupLayout {
    /// Bytes of sixteen scales or offsets.
    pub(in crate::cpu) const fn factor_bytes(&self) -> usize {
        if self.is_wide { 4 * LANES } else { 2 * LANES }
    }

    /// Bytes of a group's scales and offsets, which its values follow.
    pub(in crate::cpu) const fn value_offset(&self) -> usize {
        self.factor_bytes() * if self.has_offsets { 2 } else { 1 }
    }

    /// Bytes of a panel's group with everything.
    pub(in crate::cpu) const fn group_bytes(&self) -> usize {
        self.value_offset() + self.group_size * LANES * self.bits as usize / 8
    }

    /// Bytes of a panel.
    pub(in crate::cpu) const fn panel_bytes(&self) -> usize {
        self.group_bytes() * self.groups
    }

    /// 32-bit elements of one token's packed activations: of each group two a step, the sum, the scale and their product.
    pub(in crate::cpu) const fn row_elements(&self) -> usize {
        self.groups * group_elements(self.group_size / STEP)
    }
}

/// 32-bit elements of one token's group of `steps` steps.
const fn group_elements(steps: usize) -> usize {
    2 * steps + 3
}

/// Integer dot products of sixteen outputs.
///
/// # Safety
/// As for [`Simd`].
pub(in crate::cpu) trait IntegerDot: Simd {
    /// A step's values of sixteen outputs.
    type Values: Copy;
    /// Sixteen sums of products, possibly in parts.
    type Sums: Copy;
    /// Largest number of tokens whose sums fit in registers: 8 or less.
    const MAX_TOKENS: usize;

    /// Reads 64 bytes.
    unsafe fn load_bytes(from: *const u8) -> Self::Values;
    /// Reads 64 bytes of two steps: the low nibbles are the first.
    unsafe fn load_nibbles(from: *const u8) -> [Self::Values; 2];
    /// Sixteen times `start`.
    unsafe fn start(start: i32) -> Self::Sums;
    /// Adds the products with a step's activations, two elements.
    unsafe fn dot(sums: Self::Sums, values: Self::Values, x: *const u32) -> Self::Sums;
    /// The sums as f32.
    unsafe fn finish(sums: Self::Sums) -> Self::V;
    /// Four steps' activations as [`IntegerDot::dot`] wants them: two elements a step.
    unsafe fn split(x: &[i32; LANES]) -> [[u32; 2]; 4];
}

/// Steps' activations as pairs of 16 bits: the even inputs, then the odd ones.
#[inline(always)]
pub(super) fn split_pairs(x: &[i32; LANES]) -> [[u32; 2]; 4] {
    let pair = |low: i32, high: i32| u32::from(low as u16) | (high as u32) << 16;
    std::array::from_fn(|step| {
        let x = &x[4 * step..4 * step + 4];
        [pair(x[0], x[2]), pair(x[1], x[3])]
    })
}

/// The number of tokens a tile of `n` is padded to.
pub(in crate::cpu) const fn padded_tokens(n: usize) -> usize {
    match n {
        0..=4 | 6 => n,
        5 => 6,
        _ => 8,
    }
}

/// Packs one tile of activations: of each group `[steps][tokens][2]`, then the sums that the products start from, the scales
/// and the sums as f32, each `[tokens]`.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn pack<S: IntegerDot>(args: PackArgs<'_>, layout: &GroupLayout) {
    let tokens = padded_tokens(args.rows);
    let steps = layout.group_size / STEP;
    if args.rows < tokens {
        args.out.fill(0);
    }
    for (token, row) in args.x.chunks_exact(args.width).take(args.rows).enumerate() {
        let groups = args.out.chunks_exact_mut(tokens * group_elements(steps));
        for (inputs, out) in row.chunks_exact(layout.group_size).zip(groups) {
            let (products, rest) = out.split_at_mut(tokens * 2 * steps);
            let (scale, inverse) = scale_of(inputs);
            let mut sum = 0;
            for (part, sixteen) in inputs.as_chunks::<LANES>().0.iter().enumerate() {
                let rounded = sixteen.map(|x| nearest(x * inverse));
                sum += rounded.iter().sum::<i32>();
                // SAFETY: the processor has the instruction set.
                let split = unsafe { S::split(&rounded) };
                for (step, pair) in split.into_iter().enumerate() {
                    let place = ((part * 4 + step) * tokens + token) * 2;
                    products[place..place + 2].copy_from_slice(&pair);
                }
            }
            rest[token] = (-layout.zero * sum).cast_unsigned();
            rest[tokens + token] = scale.to_bits();
            rest[2 * tokens + token] = (scale * sum as f32).to_bits();
        }
    }
}

/// The scale of a group and its reciprocal. What is not finite ends up in the scale, and so in the results.
#[inline(always)]
fn scale_of(inputs: &[f32]) -> (f32, f32) {
    // Bits of positive numbers are ordered as the numbers are, and integers vectorize.
    let mut largest = [0u32; LANES];
    for sixteen in inputs.as_chunks::<LANES>().0 {
        for (largest, x) in largest.iter_mut().zip(sixteen) {
            *largest = (*largest).max(x.to_bits() & 0x7FFF_FFFF);
        }
    }
    let largest = f32::from_bits(largest.iter().fold(0, |a, &b| a.max(b)));
    if !largest.is_finite() {
        (largest, 0.0)
    } else if largest < NEGLIGIBLE {
        (0.0, 0.0)
    } else {
        (largest / LARGEST, LARGEST / largest)
    }
}

/// The nearest integer of a number below `2^22`.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    (x + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()).cast_signed()
}

/// Computes some panels for all tokens. A panel stays in the cache while the tiles of tokens pass.
///
/// # Safety
/// As for [`super::matmul::panels`]; the panels are as `layout` says.
#[inline(always)]
pub(super) unsafe fn panels<S: IntegerDot>(args: &MatmulArgs<'_>, layout: &GroupLayout) {
    // SAFETY: the caller's contract.
    unsafe {
        match (layout.bits, layout.group_size) {
            (4, 16) => panels_of::<S, 4, 4>(args, layout),
            (4, _) => panels_of::<S, 4, 8>(args, layout),
            (_, 16) => panels_of::<S, 8, 4>(args, layout),
            _ => panels_of::<S, 8, 8>(args, layout),
        }
    }
}

/// Panels of values of `BITS` bits with groups of `STEPS` steps.
///
/// # Safety
/// As for [`panels`].
#[inline(always)]
unsafe fn panels_of<S: IntegerDot, const BITS: u32, const STEPS: usize>(
    args: &MatmulArgs<'_>,
    layout: &GroupLayout,
) {
    for panel in args.panels.clone() {
        let mut row = 0;
        while row < args.rows {
            let count = (args.rows - row).min(S::MAX_TOKENS);
            // SAFETY: the panel and the tile lie within what the caller gave.
            unsafe {
                let w = args.weights.add(panel * layout.panel_bytes());
                let x = args.x.add(row * layout.row_elements());
                let place = Place { args, panel, row, count };
                match padded_tokens(count) {
                    1 => place.store::<S, 1>(tile::<S, BITS, STEPS, 1>(w, x, layout)),
                    2 => place.store::<S, 2>(tile::<S, BITS, STEPS, 2>(w, x, layout)),
                    3 if S::MAX_TOKENS >= 3 => place.store::<S, 3>(tile::<S, BITS, STEPS, 3>(w, x, layout)),
                    4 if S::MAX_TOKENS >= 4 => place.store::<S, 4>(tile::<S, BITS, STEPS, 4>(w, x, layout)),
                    6 if S::MAX_TOKENS >= 6 => place.store::<S, 6>(tile::<S, BITS, STEPS, 6>(w, x, layout)),
                    8 if S::MAX_TOKENS >= 8 => place.store::<S, 8>(tile::<S, BITS, STEPS, 8>(w, x, layout)),
                    _ => unreachable!("a tile has at most MAX_TOKENS tokens"),
                }
            }
            row += count;
        }
    }
}

/// `T` tokens times one panel. The chains of products of different groups do not wait for one another.
///
/// # Safety
/// `w` is valid for a panel, `x` for `T` tokens' activations.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
unsafe fn tile<S: IntegerDot, const BITS: u32, const STEPS: usize, const T: usize>(
    w: *const u8,
    x: *const u32,
    layout: &GroupLayout,
) -> [S::V; T] {
    let (group_bytes, factor_bytes, value_offset) =
        (layout.group_bytes(), layout.factor_bytes(), layout.value_offset());
    let (is_wide, has_offsets) = (layout.is_wide, layout.has_offsets);
    // SAFETY: all offsets are below the sizes the caller vouches for; a prefetch may point anywhere.
    unsafe {
        let mut acc = [S::splat(0.0); T];
        for group in 0..layout.groups {
            let w = w.add(group * group_bytes);
            let x = x.add(group * T * group_elements(STEPS));
            let rest = x.add(T * 2 * STEPS);
            // The branches come first: behind the products, the compiler would move those past them and spill what they read.
            S::prefetch(w.wrapping_add(PREFETCH_BYTES));
            let scale = load_factors::<S>(w, is_wide);
            if has_offsets {
                let offset = load_factors::<S>(w.add(factor_bytes), is_wide);
                for t in 0..T {
                    acc[t] = S::fma(offset, S::splat(rest.add(2 * T + t).cast::<f32>().read()), acc[t]);
                }
            }
            let w = w.add(value_offset);
            let mut sums = [S::start(0); T];
            for t in 0..T {
                sums[t] = S::start(rest.add(t).read().cast_signed());
            }
            for pair in 0..STEPS / 2 {
                let values = if BITS == 4 {
                    let from = w.add(pair * STEP_BYTES);
                    S::prefetch(from.wrapping_add(PREFETCH_BYTES));
                    S::load_nibbles(from)
                } else {
                    let from = w.add(2 * pair * STEP_BYTES);
                    S::prefetch(from.wrapping_add(PREFETCH_BYTES));
                    S::prefetch(from.wrapping_add(PREFETCH_BYTES + STEP_BYTES));
                    [S::load_bytes(from), S::load_bytes(from.add(STEP_BYTES))]
                };
                for half in 0..2 {
                    for t in 0..T {
                        sums[t] = S::dot(sums[t], values[half], x.add(((2 * pair + half) * T + t) * 2));
                    }
                }
            }
            for t in 0..T {
                let scale = S::mul(scale, S::splat(rest.add(T + t).cast::<f32>().read()));
                acc[t] = S::fma(S::finish(sums[t]), scale, acc[t]);
            }
        }
        acc
    }
}

/// Sixteen scales or offsets.
///
/// # Safety
/// `from` is valid for 64 bytes if they are wide, else 32.
#[inline(always)]
unsafe fn load_factors<S: Simd>(from: *const u8, is_wide: bool) -> S::V {
    // SAFETY: the caller's contract.
    unsafe { if is_wide { S::load(from.cast()) } else { S::load_f16(from.cast()) } }
}
