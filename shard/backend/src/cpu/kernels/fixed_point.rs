//! Products of many rows with bf16 weights in 16-bit fixed point: one `vpdpwssd` a weight vector and row, where two bf16 parts
//! of the activations take two `vdpbf16ps`. Only for processors with AVX512-VNNI; the others' instructions gain nothing by it.
//!
//! Sixty-four inputs make a group. Of a row of activations or of an output's weights, a group has one scale, chosen by its
//! Euclidean norm: 2^15 for weights and 65,000 for activations. By Cauchy and Schwarz no sum of products leaves 32 bits then,
//! in whatever order, and typical groups keep 14 to 15 bits. Weights' scales are powers of two, so that nearly all weights
//! (8 bits of mantissa) stay exact.
//!
//! Weights are stored as bf16, as decoding wants them, and converted a few panels at a time into memory of the second level
//! cache. That costs about as much as the products of eight rows.

use std::arch::x86_64::*;

use super::FixedKernels;
use super::avx512::Avx512;
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

/// Memory for converted panels: it shares a second level cache of 512 KiB or more with the activations that pass.
const SCRATCH_ELEMENTS: usize = (128 << 10) / 4;

/// The kernels. Unsafe for AVX-512 F, BW, VL and VNNI.
pub(super) static KERNELS: FixedKernels = FixedKernels {
    max_tokens: MAX_TOKENS,
    padded: padded_fixed,
    row_elements,
    scratch_elements,
    pack,
    matmul: panels,
};

/// Largest tile of tokens: their sums and results, each in a register, leave room for the weights.
const MAX_TOKENS: usize = 12;

/// The number of tokens a tile of `n` is padded to.
fn padded_fixed(n: usize) -> usize {
    n.next_multiple_of(4)
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

/// Computes some panels for all tokens, a few panels at a time: each tile of tokens meets all of them while it is in the
/// cache.
///
/// # Safety
/// As for [`super::matmul::panels`] with bf16 pairs as weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panels(args: &MatmulArgs<'_>, scratch: &mut [u32]) {
    let groups = args.steps.div_ceil(STEPS);
    let panel_elements = groups * GROUP_ELEMENTS;
    let at_once = scratch.len() / panel_elements;
    for first in args.panels.clone().step_by(at_once) {
        let panels = first..(first + at_once).min(args.panels.end);
        for (panel, out) in panels.clone().zip(scratch.chunks_exact_mut(panel_elements)) {
            // SAFETY: the panel lies within the weights.
            unsafe { convert(args.weights.add(panel * args.steps * 4 * LANES), args.steps, out) };
        }
        let mut row = 0;
        while row < args.rows {
            let count = (args.rows - row).min(MAX_TOKENS);
            for (panel, w) in panels.clone().zip(scratch.chunks_exact(panel_elements)) {
                // SAFETY: the tile lies within what the caller gave, the panel was converted above.
                unsafe {
                    let (w, x) = (w.as_ptr(), args.x.add(row * groups * ROW_ELEMENTS));
                    let place = Place { args, panel, row, count };
                    match padded_fixed(count) {
                        4 => place.store::<Avx512, 4>(tile::<4>(w, x, groups)),
                        8 => place.store::<Avx512, 8>(tile::<8>(w, x, groups)),
                        _ => place.store::<Avx512, 12>(tile::<12>(w, x, groups)),
                    }
                }
            }
            row += count;
        }
    }
}

/// Converts a panel of `steps` steps of bf16 pairs.
///
/// # Safety
/// The processor has the instruction set; `from` is valid for the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn convert(from: *const u8, steps: usize, out: &mut [u32]) {
    for (group, out) in out.chunks_exact_mut(GROUP_ELEMENTS).enumerate() {
        let (scales, values) = out.split_at_mut(LANES);
        let count = (steps - group * STEPS).min(STEPS);
        let (values, padding) = values.split_at_mut(count * LANES);
        padding.fill(0);
        // SAFETY: the group's steps lie within the panel; each step is stored to its sixteen elements.
        unsafe {
            let from = from.add(group * STEPS * 4 * LANES);
            let load = |step: usize| _mm512_loadu_si512(from.add(step * 4 * LANES).cast());
            let (exponent, is_finite) = {
                let mut largest = _mm512_setzero_si512();
                let magnitude = _mm512_set1_epi16(0x7FFF);
                for step in 0..count {
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(load(step), magnitude));
                }
                let low = _mm512_slli_epi32::<16>(largest);
                let largest = _mm512_max_epu32(largest, low);
                let is_finite = _mm512_cmplt_epu32_mask(largest, _mm512_set1_epi32(0x7F80_0000));
                let exponent = _mm512_getexp_ps(_mm512_castsi512_ps(largest));
                // Zeros have minus infinity, which no power below may meet.
                (_mm512_max_ps(exponent, _mm512_set1_ps(-100.0)), is_finite)
            };
            let one = _mm512_set1_ps(1.0);
            let relative = _mm512_scalef_ps(one, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
            let mut squares = [_mm512_setzero_ps(); 2];
            for step in 0..count {
                for (squares, w) in squares.iter_mut().zip(widen(load(step))) {
                    let w = _mm512_mul_ps(w, relative);
                    *squares = _mm512_fmadd_ps(w, w, *squares);
                }
            }
            let squares = _mm512_max_ps(_mm512_add_ps(squares[0], squares[1]), one);
            // The norm is below 2^(exponent + half), half being half the squares' exponent plus one, rounded up.
            let half = _mm512_mul_ps(_mm512_add_ps(_mm512_getexp_ps(squares), one), _mm512_set1_ps(0.5));
            let half = _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(half);
            let scale = _mm512_sub_ps(_mm512_add_ps(exponent, half), _mm512_set1_ps(15.0));
            let inverse = _mm512_scalef_ps(one, _mm512_sub_ps(_mm512_setzero_ps(), scale));
            let scale = _mm512_scalef_ps(one, scale);
            let scale = _mm512_mask_blend_ps(is_finite, _mm512_set1_ps(f32::NAN), scale);
            _mm512_storeu_ps(scales.as_mut_ptr().cast(), scale);
            for (step, out) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let [even, odd] = widen(load(step)).map(|w| _mm512_cvtps_epi32(_mm512_mul_ps(w, inverse)));
                let pairs = _mm512_mask_blend_epi16(0xAAAA_AAAA, even, _mm512_slli_epi32::<16>(odd));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
            }
        }
    }
}

/// The first and the second of sixteen pairs of bf16.
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
