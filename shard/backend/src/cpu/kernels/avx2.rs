//! AVX2, FMA and F16C: sixteen lanes in two registers.

use std::arch::x86_64::*;

use super::compact::{CompactSimd, QUAD_EXPONENTS, SIGN_EXPONENT_MANTISSA, WINDOW};
use super::quantized::{IntegerDot, split_pairs};
use super::simd::{LANES, Simd};

/// Two registers of eight.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

type V = [__m256; 2];

/// Each body runs with AVX2, FMA and F16C, which the caller of a [`Simd`] function vouches for.
macro_rules! lanes {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the contract of `Simd`: instruction set present, pointers valid.
            unsafe { $body }
        }
    )*};
}

/// `f` on both halves. No closures anywhere here: one that is not inlined would lack the instruction set.
macro_rules! halves {
    ($f:ident, $a:expr, $b:expr) => {
        [$f($a[0], $b[0]), $f($a[1], $b[1])]
    };
}

/// `f` of both halves of one.
macro_rules! halves1 {
    ($f:ident, $a:expr) => {
        [$f($a[0]), $f($a[1])]
    };
}

impl Simd for Avx2 {
    type V = V;
    const MAX_TILE: usize = 4;

    lanes! {
        fn splat(x: f32) -> V { [_mm256_set1_ps(x); 2] }
        fn load(from: *const f32) -> V { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        fn load_bf16(from: *const u16) -> V {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
        fn load_f16(from: *const u16) -> V {
            [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))]
        }
        fn load_bf16_pairs(from: *const u32) -> (V, V) {
            widen_pairs([_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())])
        }
        fn store(to: *mut f32, v: V) {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
        fn add(a: V, b: V) -> V { halves!(_mm256_add_ps, a, b) }
        fn sub(a: V, b: V) -> V { halves!(_mm256_sub_ps, a, b) }
        fn mul(a: V, b: V) -> V { halves!(_mm256_mul_ps, a, b) }
        fn div(a: V, b: V) -> V { halves!(_mm256_div_ps, a, b) }
        fn fma(a: V, b: V, c: V) -> V { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        fn max(a: V, b: V) -> V { halves!(_mm256_max_ps, a, b) }
        fn min(a: V, b: V) -> V { halves!(_mm256_min_ps, a, b) }
        fn select_lt(a: V, b: V, x: V, y: V) -> V {
            let less = [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])];
            [_mm256_blendv_ps(y[0], x[0], less[0]), _mm256_blendv_ps(y[1], x[1], less[1])]
        }
        fn pow2_shifted(v: V) -> V {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(v[0]), bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(v[1]), bias));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
        fn sum(v: V) -> f32 {
            let mut lanes = [0.0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(v[0], v[1]));
            lanes.iter().sum()
        }
        fn max_lane(v: V) -> f32 {
            let mut lanes = [0.0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_max_ps(v[0], v[1]));
            lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
        }
        fn prefetch(from: *const u8) { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// Products of 16-bit pairs: the values of a step are widened to even and odd inputs. `maddubs` would be shorter, but its sums
/// saturate.
impl IntegerDot for Avx2 {
    /// Even inputs of outputs 0 to 7 and 8 to 15, then the odd ones.
    type Values = [__m256i; 4];
    type Sums = [__m256i; 2];
    const MAX_TOKENS: usize = 4;

    lanes! {
        fn load_bytes(from: *const u8) -> [__m256i; 4] {
            let [a, b] = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())];
            let even = _mm256_set1_epi16(0x00FF);
            [
                _mm256_and_si256(a, even),
                _mm256_and_si256(b, even),
                _mm256_srli_epi16::<8>(a),
                _mm256_srli_epi16::<8>(b),
            ]
        }
        fn load_nibbles(from: *const u8) -> [[__m256i; 4]; 2] {
            let [a, b] = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())];
            let nibble = _mm256_set1_epi16(0x000F);
            let first = [
                _mm256_and_si256(a, nibble),
                _mm256_and_si256(b, nibble),
                _mm256_and_si256(_mm256_srli_epi16::<8>(a), nibble),
                _mm256_and_si256(_mm256_srli_epi16::<8>(b), nibble),
            ];
            let second = [
                _mm256_and_si256(_mm256_srli_epi16::<4>(a), nibble),
                _mm256_and_si256(_mm256_srli_epi16::<4>(b), nibble),
                _mm256_srli_epi16::<12>(a),
                _mm256_srli_epi16::<12>(b),
            ];
            [first, second]
        }
        fn start(start: i32) -> [__m256i; 2] { [_mm256_set1_epi32(start); 2] }
        fn dot(sums: [__m256i; 2], values: [__m256i; 4], x: *const u32) -> [__m256i; 2] {
            let even = _mm256_set1_epi32(x.read().cast_signed());
            let odd = _mm256_set1_epi32(x.add(1).read().cast_signed());
            let a = _mm256_add_epi32(_mm256_madd_epi16(values[0], even), _mm256_madd_epi16(values[2], odd));
            let b = _mm256_add_epi32(_mm256_madd_epi16(values[1], even), _mm256_madd_epi16(values[3], odd));
            [_mm256_add_epi32(sums[0], a), _mm256_add_epi32(sums[1], b)]
        }
        fn finish(sums: [__m256i; 2]) -> V { [_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])] }
    }

    #[inline(always)]
    unsafe fn split(x: &[i32; LANES]) -> [[u32; 2]; 4] {
        split_pairs(x)
    }
}

/// The words of a step in two registers, of eight pairs each.
impl CompactSimd for Avx2 {
    type Bases = [__m256i; 2];
    type Step = [__m256i; 2];

    lanes! {
        fn bases(from: *const u8) -> [__m256i; 2] {
            let bytes = _mm_loadu_si128(from.cast());
            let bases = [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))];
            let lowest = halves!(_mm256_sub_epi32, bases, [_mm256_set1_epi32(i32::from(WINDOW)); 2]);
            let first = [_mm256_slli_epi32::<7>(lowest[0]), _mm256_slli_epi32::<7>(lowest[1])];
            let second = [_mm256_slli_epi32::<23>(lowest[0]), _mm256_slli_epi32::<23>(lowest[1])];
            halves!(_mm256_or_si256, first, second)
        }
        fn quad(from: *const u8, bases: [__m256i; 2]) -> [[__m256i; 2]; 4] {
            let exponents = from.add(QUAD_EXPONENTS);
            let [a, b] = [_mm256_loadu_si256(exponents.cast()), _mm256_loadu_si256(exponents.add(32).cast())];
            [
                compact_step(from, [_mm256_slli_epi16::<7>(a), _mm256_slli_epi16::<7>(b)], bases),
                compact_step(from.add(32), [_mm256_slli_epi16::<3>(a), _mm256_slli_epi16::<3>(b)], bases),
                compact_step(from.add(64), [_mm256_srli_epi16::<1>(a), _mm256_srli_epi16::<1>(b)], bases),
                compact_step(from.add(96), [_mm256_srli_epi16::<5>(a), _mm256_srli_epi16::<5>(b)], bases),
            ]
        }
        fn widen(step: [__m256i; 2]) -> (V, V) { widen_pairs(step) }
        fn store_step(to: *mut u32, step: [__m256i; 2]) {
            _mm256_storeu_si256(to.cast(), step[0]);
            _mm256_storeu_si256(to.add(8).cast(), step[1]);
        }
    }
}

lanes! {
    fn compact_step(from: *const u8, exponents: [__m256i; 2], bases: [__m256i; 2]) -> [__m256i; 2] {
        let bytes = [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast())];
        let bytes = [_mm256_cvtepi8_epi16(bytes[0]), _mm256_cvtepi8_epi16(bytes[1])];
        let mask = _mm256_set1_epi16(SIGN_EXPONENT_MANTISSA.cast_signed());
        let bits = halves!(_mm256_and_si256, halves!(_mm256_xor_si256, bytes, exponents), [mask; 2]);
        let is_zero = halves!(_mm256_cmpeq_epi16, bits, [_mm256_setzero_si256(); 2]);
        halves!(_mm256_add_epi16, bits, halves!(_mm256_andnot_si256, is_zero, bases))
    }
    fn widen_pairs(pairs: [__m256i; 2]) -> (V, V) {
        let upper = _mm256_set1_epi32(0xFFFF_0000u32.cast_signed());
        let first = [_mm256_slli_epi32::<16>(pairs[0]), _mm256_slli_epi32::<16>(pairs[1])];
        let second = halves!(_mm256_and_si256, pairs, [upper; 2]);
        (halves1!(_mm256_castsi256_ps, first), halves1!(_mm256_castsi256_ps, second))
    }
}
