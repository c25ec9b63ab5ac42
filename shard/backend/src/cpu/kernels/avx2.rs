//! AVX2, FMA and F16C: sixteen lanes in two registers.

use std::arch::x86_64::*;

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
            let [a, b] = [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())];
            let upper = _mm256_castsi256_ps(_mm256_set1_epi32(0xFFFF_0000u32.cast_signed()));
            let first = [_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b)];
            let second = [_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)];
            (
                [_mm256_castsi256_ps(first[0]), _mm256_castsi256_ps(first[1])],
                halves!(_mm256_and_ps, second, [upper; 2]),
            )
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
