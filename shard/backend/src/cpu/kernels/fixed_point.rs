//! Products of many rows with bf16 weights in 16-bit fixed point: one `vpdpwssd` a weight vector and row, where two bf16 parts
//! of the activations take two `vdpbf16ps`. Only for processors with AVX512-VNNI; the others' instructions gain nothing by it.
//!
//! Sixty-four inputs make a group. Of a row of activations or of an output's weights, a group has one scale, chosen by its
//! Euclidean norm: 2^15 for weights and 65,000 for activations. By Cauchy and Schwarz no sum of products leaves 32 bits then,
//! in whatever order, and typical groups keep 14 to 15 bits. Weights' scales are powers of two, so that nearly all weights
//! (8 bits of mantissa) stay exact.
//!
//! Weights are stored as bf16, as decoding wants them, with their groups' scales beside. A few rows take them converted in
//! registers; for more rows a few panels at a time are converted into memory of the second level cache.

use std::arch::x86_64::*;

use super::FixedKernels;
use super::avx512::Avx512;
use super::compact::{CompactPanels, CompactSimd, QUAD_BYTES, prefetch_quad};
use super::matmul::{MatmulArgs, PackArgs, Place};
use super::simd::LANES;

/// Inputs that share a scale.
const GROUP: usize = 64;

/// Steps of two inputs of a group.
const STEPS: usize = GROUP / 2;

/// 32-bit elements of a converted panel's group: sixteen scales, then its steps.
const GROUP_ELEMENTS: usize = (1 + STEPS) * LANES;

/// 32-bit elements of a row's packed group: its steps and its scale.
const ROW_ELEMENTS: usize = STEPS + 1;

/// Largest Euclidean norm of a group of activations as integers. Half a unit more for each of 64 of them, and of weights
/// whose norm is 2^15, still keeps the product of the norms below 2^31.
const ROW_NORM: f32 = 65_000.0;

/// Largest integer.
const LARGEST: f32 = 32_767.0;

/// Groups whose largest activation is below this count as zero, since its reciprocal might not be finite.
const NEGLIGIBLE: f32 = 1e-30;

/// Bytes of a step of stored weights.
const STEP_BYTES: usize = 4 * LANES;

/// The exponent of a group with a weight that is no finite number.
const NOT_FINITE: f32 = -128.0;

/// How far ahead of the arithmetic a weight stream is asked for, as for other weights.
const PREFETCH_BYTES: usize = 2048;

/// Memory for converted panels: it shares a second level cache of 512 KiB or more with the activations that pass.
const SCRATCH_ELEMENTS: usize = (128 << 10) / 4;

/// The kernels. Unsafe for AVX-512 F, BW, VL and VNNI.
pub(super) static KERNELS: FixedKernels = FixedKernels {
    tile_tokens,
    padded: padded_fixed,
    row_elements,
    scratch_elements,
    exponents_len,
    exponents,
    pack,
    matmul: plain_panels,
    compact_matmul: compact_panels,
};

/// Largest tile of tokens: their sums and results, each in a register, leave room for the weights.
const MAX_TOKENS: usize = 12;

/// Rows up to which weights are converted in registers, by each tile anew: that goes on while memory is waited for.
const STREAMED_ROWS: usize = 2 * MAX_TOKENS;

/// Tokens of the tiles that so many rows are cut into: twelve, but where that would leave a small tile.
fn tile_tokens(rows: usize) -> usize {
    if (13..=16).contains(&rows) { 8 } else { MAX_TOKENS }
}

/// The number of tokens a tile of `n` is padded to.
fn padded_fixed(n: usize) -> usize {
    match n {
        5 | 6 => 6,
        _ => n.next_multiple_of(4),
    }
}

fn row_elements(in_features: usize) -> usize {
    in_features.div_ceil(GROUP) * ROW_ELEMENTS
}

fn scratch_elements(in_features: usize) -> usize {
    let panel = in_features.div_ceil(GROUP) * GROUP_ELEMENTS;
    if panel > SCRATCH_ELEMENTS { panel } else { SCRATCH_ELEMENTS / panel * panel }
}

/// Packs one tile of activations: of each group `[tokens][STEPS]` pairs of 16 bits, then `[tokens]` scales.
///
/// # Safety
/// The processor has the instruction set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack(args: PackArgs<'_>) {
    let tokens = padded_fixed(args.rows);
    if args.rows < tokens {
        args.out.fill(0);
    }
    for (token, row) in args.x.chunks_exact(args.width).take(args.rows).enumerate() {
        let groups = args.out.chunks_exact_mut(tokens * ROW_ELEMENTS);
        for (inputs, out) in row.chunks(GROUP).zip(groups) {
            let pairs = &mut out[token * STEPS..(token + 1) * STEPS];
            let scale = match inputs.try_into() {
                // SAFETY: the function enables the instruction set.
                Ok(inputs) => unsafe { pack_group(inputs, pairs) },
                Err(_) => {
                    let mut padded = [0.0; GROUP];
                    padded[..inputs.len()].copy_from_slice(inputs);
                    // SAFETY: the function enables the instruction set.
                    unsafe { pack_group(&padded, pairs) }
                }
            };
            out[tokens * STEPS + token] = scale.to_bits();
        }
    }
}

/// One row's group; returns its scale. What is not finite ends up in the scale, and so in the results.
///
/// # Safety
/// The processor has the instruction set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_group(inputs: &[f32; GROUP], pairs: &mut [u32]) -> f32 {
    assert_eq!(pairs.len(), STEPS);
    // SAFETY: four loads of sixteen inputs, four stores of eight pairs.
    unsafe {
        let x: [__m512; 4] = std::array::from_fn(|i| _mm512_loadu_ps(inputs.as_ptr().add(i * LANES)));
        // Bits of positive numbers are ordered as the numbers are, and what is no number comes last.
        let bits = x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFF_FFFF)));
        let largest =
            _mm512_max_epu32(_mm512_max_epu32(bits[0], bits[1]), _mm512_max_epu32(bits[2], bits[3]));
        let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
        let (scale, inverse) = if !largest.is_finite() {
            (largest, 0.0)
        } else if largest < NEGLIGIBLE {
            (0.0, 0.0)
        } else {
            let relative = _mm512_set1_ps(1.0 / largest);
            let mut squares = _mm512_setzero_ps();
            for x in x {
                let x = _mm512_mul_ps(x, relative);
                squares = _mm512_fmadd_ps(x, x, squares);
            }
            let factor = (ROW_NORM / _mm512_reduce_add_ps(squares).sqrt()).min(LARGEST);
            (largest / factor, factor / largest)
        };
        for (i, x) in x.into_iter().enumerate() {
            let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
            let to = pairs.as_mut_ptr().add(i * LANES / 2);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(rounded));
        }
        scale
    }
}

/// Bytes of a panel's exponents.
fn exponents_len(steps: usize) -> usize {
    steps.div_ceil(STEPS) * LANES
}

/// Of a panel of `steps` steps of bf16 pairs, the powers of two that its groups are multiplied with to become integers, sixteen
/// a group; [`NOT_FINITE`] where there is none.
///
/// # Safety
/// The processor has the instruction set.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn exponents(panel: &[u8], out: &mut [u8]) {
    let groups = panel.chunks(STEPS * STEP_BYTES);
    for (group, out) in groups.zip(out.as_chunks_mut::<LANES>().0) {
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), group_exponents(group)) };
    }
}

/// Those of one group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn group_exponents(group: &[u8]) -> __m128i {
    let steps = || {
        let steps = group.as_chunks::<STEP_BYTES>().0.iter();
        // SAFETY: 64 bytes.
        steps.map(|step| unsafe { _mm512_loadu_si512(step.as_ptr().cast()) })
    };
    let mut largest = _mm512_setzero_si512();
    for pairs in steps() {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7FFF)));
    }
    let largest = _mm512_max_epu32(largest, _mm512_slli_epi32::<16>(largest));
    let is_finite = _mm512_cmplt_epu32_mask(largest, _mm512_set1_epi32(0x7F80_0000));
    // Zeros have minus infinity, which no power below may meet.
    let exponent = _mm512_max_ps(_mm512_getexp_ps(_mm512_castsi512_ps(largest)), _mm512_set1_ps(-100.0));
    let one = _mm512_set1_ps(1.0);
    // Relative to the largest, so that no square is too large or too small.
    let relative = _mm512_scalef_ps(one, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
    let mut squares = [_mm512_setzero_ps(); 2];
    for pairs in steps() {
        for (squares, w) in squares.iter_mut().zip(widen(pairs)) {
            let w = _mm512_mul_ps(w, relative);
            *squares = _mm512_fmadd_ps(w, w, *squares);
        }
    }
    let squares = _mm512_max_ps(_mm512_add_ps(squares[0], squares[1]), one);
    // The norm is below 2^(exponent + half), half being half the squares' exponent plus one, rounded up.
    let half = _mm512_mul_ps(_mm512_add_ps(_mm512_getexp_ps(squares), one), _mm512_set1_ps(0.5));
    let half = _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(half);
    let power = _mm512_sub_ps(_mm512_set1_ps(15.0), _mm512_add_ps(exponent, half));
    let power = _mm512_mask_blend_ps(is_finite, _mm512_set1_ps(NOT_FINITE), power);
    _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(power))
}

/// A group's factors, from its exponents.
#[derive(Clone, Copy)]
struct Factors {
    /// What turns weights into integers.
    inverse: __m512,
    /// What turns integers into weights: infinite for [`NOT_FINITE`].
    scale: __m512,
}

impl Factors {
    /// # Safety
    /// `from` is valid for sixteen bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the caller says.
        let power = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) });
        let bias = _mm512_set1_epi32(127);
        let power_of_two = |biased| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased));
        Factors {
            inverse: power_of_two(_mm512_add_epi32(bias, power)),
            scale: power_of_two(_mm512_sub_epi32(bias, power)),
        }
    }

    /// A step's weights as pairs of integers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn convert(self, pairs: __m512i) -> __m512i {
        let [even, odd] = widen(pairs);
        let even = _mm512_cvtps_epi32(_mm512_mul_ps(even, self.inverse));
        let odd = _mm512_cvtps_epi32(_mm512_mul_ps(odd, self.inverse));
        // `low & even | odd << 16`: a blend by mask would load its mask anew for each step.
        let low = _mm512_set1_epi32(0xFFFF);
        _mm512_ternarylogic_epi32::<0xEA>(low, even, _mm512_slli_epi32::<16>(odd))
    }
}

/// Steps that are converted at a time.
const STEPS_AT_ONCE: usize = 4;

/// How bf16 weights lie in memory.
///
/// # Safety
/// Of every function: the processor has the instruction set, the panel lies within the weights of `args`.
trait Stored: Copy {
    /// What a group's weights need beside them.
    type Group: Copy;
    /// Where a panel begins.
    unsafe fn panel(self, args: &MatmulArgs<'_>, panel: usize) -> *const u8;
    /// Of group `group` of a panel.
    unsafe fn group(self, args: &MatmulArgs<'_>, panel: usize, group: usize) -> Self::Group;
    /// The next steps as bf16 pairs, of which `count` exist; moves `from` behind them.
    unsafe fn next(from: &mut *const u8, count: usize, group: Self::Group) -> [__m512i; STEPS_AT_ONCE];
}

/// As bf16 pairs, step by step.
#[derive(Clone, Copy)]
struct Plain;

impl Stored for Plain {
    type Group = ();
    #[inline(always)]
    unsafe fn panel(self, args: &MatmulArgs<'_>, panel: usize) -> *const u8 {
        // SAFETY: as the caller says.
        unsafe { args.weights.add(panel * args.steps * STEP_BYTES) }
    }
    #[inline(always)]
    unsafe fn group(self, _args: &MatmulArgs<'_>, _panel: usize, _group: usize) {}
    #[inline(always)]
    unsafe fn next(from: &mut *const u8, count: usize, (): ()) -> [__m512i; STEPS_AT_ONCE] {
        // SAFETY: only steps that exist are read; a prefetch may point anywhere.
        unsafe {
            let mut steps = [_mm512_setzero_si512(); STEPS_AT_ONCE];
            for step in &mut steps[..count] {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PREFETCH_BYTES).cast());
                *step = _mm512_loadu_si512(from.cast());
                *from = from.add(STEP_BYTES);
            }
            steps
        }
    }
}

/// In 12 bits.
#[derive(Clone, Copy)]
struct Compact<'a>(&'a CompactPanels<'a>);

impl Stored for Compact<'_> {
    type Group = __m512i;
    #[inline(always)]
    unsafe fn panel(self, args: &MatmulArgs<'_>, panel: usize) -> *const u8 {
        // SAFETY: as the caller says.
        unsafe { args.weights.add(panel * args.steps / STEPS_AT_ONCE * QUAD_BYTES) }
    }
    #[inline(always)]
    unsafe fn group(self, args: &MatmulArgs<'_>, panel: usize, group: usize) -> __m512i {
        let bases = &self.0.bases(panel, args.steps / STEPS_AT_ONCE)[group * LANES..][..LANES];
        // SAFETY: sixteen bytes.
        unsafe { Avx512::bases(bases.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn next(from: &mut *const u8, _count: usize, bases: __m512i) -> [__m512i; STEPS_AT_ONCE] {
        // SAFETY: steps are whole quads; a prefetch may point anywhere.
        unsafe {
            prefetch_quad::<Avx512>(*from);
            let steps = Avx512::quad(*from, bases);
            *from = from.add(QUAD_BYTES);
            steps
        }
    }
}

/// Computes some panels for all tokens.
///
/// # Safety
/// As for [`super::matmul::panels`] with bf16 pairs as weights; the exponents are those of all panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn plain_panels(args: &MatmulArgs<'_>, exponents: &[u8], scratch: &mut [u32]) {
    // SAFETY: the caller's contract.
    unsafe { panels(args, Plain, exponents, scratch) }
}

/// The same of compact weights.
///
/// # Safety
/// As for [`plain_panels`], `args.steps` whole quads.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn compact_panels(
    args: &MatmulArgs<'_>,
    compact: &CompactPanels<'_>,
    exponents: &[u8],
    scratch: &mut [u32],
) {
    // SAFETY: the caller's contract.
    unsafe { panels(args, Compact(compact), exponents, scratch) }
}

/// # Safety
/// As for [`plain_panels`] and [`compact_panels`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panels<P: Stored>(args: &MatmulArgs<'_>, stored: P, exponents: &[u8], scratch: &mut [u32]) {
    if args.rows > STREAMED_ROWS {
        // SAFETY: the caller's contract.
        return unsafe { converted_panels(args, stored, exponents, scratch) };
    }
    let row_elements = args.steps.div_ceil(STEPS) * ROW_ELEMENTS;
    for panel in args.panels.clone() {
        let exponents = &exponents[panel * exponents_len(args.steps)..][..exponents_len(args.steps)];
        for row in (0..args.rows).step_by(tile_tokens(args.rows)) {
            let count = (args.rows - row).min(tile_tokens(args.rows));
            let place = Place { args, panel, row, count };
            // SAFETY: the panel and the tile lie within what the caller gave.
            unsafe {
                let x = args.x.add(row * row_elements);
                let from = (args, stored, panel);
                match padded_fixed(count) {
                    4 => place.store::<Avx512, 4>(streamed_tile::<P, 4>(from, exponents, x)),
                    6 => place.store::<Avx512, 6>(streamed_tile::<P, 6>(from, exponents, x)),
                    8 => place.store::<Avx512, 8>(streamed_tile::<P, 8>(from, exponents, x)),
                    _ => place.store::<Avx512, 12>(streamed_tile::<P, 12>(from, exponents, x)),
                }
            }
        }
    }
}

/// [`panels`] of many rows, a few panels at a time: each tile of tokens meets all of them while it is in the cache.
///
/// # Safety
/// As for [`panels`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn converted_panels<P: Stored>(
    args: &MatmulArgs<'_>,
    stored: P,
    exponents: &[u8],
    scratch: &mut [u32],
) {
    let groups = args.steps.div_ceil(STEPS);
    let panel_elements = groups * GROUP_ELEMENTS;
    let at_once = scratch.len() / panel_elements;
    for first in args.panels.clone().step_by(at_once) {
        let panels = first..(first + at_once).min(args.panels.end);
        for (panel, out) in panels.clone().zip(scratch.chunks_exact_mut(panel_elements)) {
            let exponents = &exponents[panel * groups * LANES..][..groups * LANES];
            // SAFETY: the panel lies within the weights.
            unsafe { convert((args, stored, panel), exponents, out) };
        }
        let mut row = 0;
        while row < args.rows {
            let count = (args.rows - row).min(tile_tokens(args.rows));
            for (panel, w) in panels.clone().zip(scratch.chunks_exact(panel_elements)) {
                // SAFETY: the tile lies within what the caller gave, the panel was converted above.
                unsafe {
                    let (w, x) = (w.as_ptr(), args.x.add(row * groups * ROW_ELEMENTS));
                    let place = Place { args, panel, row, count };
                    match padded_fixed(count) {
                        4 => place.store::<Avx512, 4>(tile::<4>(w, x, groups)),
                        6 => place.store::<Avx512, 6>(tile::<6>(w, x, groups)),
                        8 => place.store::<Avx512, 8>(tile::<8>(w, x, groups)),
                        _ => place.store::<Avx512, 12>(tile::<12>(w, x, groups)),
                    }
                }
            }
            row += count;
        }
    }
}

/// Converts a panel.
///
/// # Safety
/// The processor has the instruction set; the panel lies within the weights of the arguments.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn convert<P: Stored>(
    (args, stored, panel): (&MatmulArgs<'_>, P, usize),
    exponents: &[u8],
    out: &mut [u32],
) {
    // SAFETY: the panel lies within the weights.
    let mut from = unsafe { stored.panel(args, panel) };
    let groups = out.chunks_exact_mut(GROUP_ELEMENTS).zip(exponents.as_chunks::<LANES>().0);
    for (group, (out, exponents)) in groups.enumerate() {
        let (scales, values) = out.split_at_mut(LANES);
        let (values, padding) = values.split_at_mut((args.steps - group * STEPS).min(STEPS) * LANES);
        padding.fill(0);
        // SAFETY: the group's steps lie within the panel; each is stored to its sixteen elements.
        unsafe {
            let factors = Factors::load(exponents.as_ptr());
            _mm512_storeu_ps(scales.as_mut_ptr().cast(), factors.scale);
            let stored = stored.group(args, panel, group);
            for out in values.chunks_mut(STEPS_AT_ONCE * LANES) {
                let steps = P::next(&mut from, out.len() / LANES, stored);
                for (out, pairs) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(steps) {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), factors.convert(pairs));
                }
            }
        }
    }
}

/// The first and the second of sixteen pairs of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(pairs: __m512i) -> [__m512; 2] {
    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000u32.cast_signed()));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd)]
}

/// `T` tokens times one converted panel.
///
/// # Safety
/// The processor has the instruction set; `w` is valid for `groups` groups, `x` for `T` tokens' packed activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
unsafe fn tile<const T: usize>(mut w: *const u32, mut x: *const u32, groups: usize) -> [__m512; T] {
    // SAFETY: all offsets are below the sizes the caller vouches for.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); T];
        for _ in 0..groups {
            let mut sums = [_mm512_setzero_si512(); T];
            for step in 0..STEPS {
                let weights = _mm512_loadu_si512(w.add((1 + step) * LANES).cast());
                for t in 0..T {
                    let pair = _mm512_set1_epi32(x.add(t * STEPS + step).read().cast_signed());
                    sums[t] = _mm512_dpwssd_epi32(sums[t], weights, pair);
                }
            }
            let scales = _mm512_loadu_ps(w.cast());
            for t in 0..T {
                let scale = _mm512_set1_ps(x.add(T * STEPS + t).cast::<f32>().read());
                acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), _mm512_mul_ps(scales, scale), acc[t]);
            }
            w = w.add(GROUP_ELEMENTS);
            x = x.add(T * ROW_ELEMENTS);
        }
        acc
    }
}

/// `T` tokens times one panel as it is stored, converted in registers.
///
/// # Safety
/// The processor has the instruction set; the panel lies within the weights of the arguments, `x` is valid for `T` tokens' packed
/// activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
unsafe fn streamed_tile<P: Stored, const T: usize>(
    (args, stored, panel): (&MatmulArgs<'_>, P, usize),
    exponents: &[u8],
    mut x: *const u32,
) -> [__m512; T] {
    // SAFETY: all offsets are below the sizes the caller vouches for.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); T];
        let mut w = stored.panel(args, panel);
        for (group, exponents) in exponents.as_chunks::<LANES>().0.iter().enumerate() {
            let factors = Factors::load(exponents.as_ptr());
            let stored = stored.group(args, panel, group);
            let mut sums = [_mm512_setzero_si512(); T];
            let steps = (args.steps - group * STEPS).min(STEPS);
            for first in (0..steps).step_by(STEPS_AT_ONCE) {
                let count = (steps - first).min(STEPS_AT_ONCE);
                let pairs = P::next(&mut w, count, stored);
                for step in 0..STEPS_AT_ONCE {
                    if step >= count {
                        break;
                    }
                    let weights = factors.convert(pairs[step]);
                    for t in 0..T {
                        let pair = _mm512_set1_epi32(x.add(t * STEPS + first + step).read().cast_signed());
                        sums[t] = _mm512_dpwssd_epi32(sums[t], weights, pair);
                    }
                }
            }
            for t in 0..T {
                let scale = _mm512_set1_ps(x.add(T * STEPS + t).cast::<f32>().read());
                let scale = _mm512_mul_ps(factors.scale, scale);
                acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), scale, acc[t]);
            }
            x = x.add(T * ROW_ELEMENTS);
        }
        acc
    }
}
