//! AVX-512F: sixteen lanes in one register. With AVX512-BF16 also [`Bf16Dot`], a dot product of pairs; with AVX512-VNNI
//! [`IntegerDot`], a dot product of four bytes.

use std::arch::x86_64::*;

use super::compact::{CompactSimd, CompactWeight, QUAD_EXPONENTS, SIGN_EXPONENT_MANTISSA, WINDOW};
use super::matmul::Weight;
use super::quantized::IntegerDot;
use super::simd::{LANES, Simd};

/// One register.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

type V = __m512;

/// Each body runs with AVX-512F, which the caller of a [`Simd`] function vouches for.
macro_rules! lanes {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the contract of `Simd`: instruction set present, pointers valid.
            unsafe { $body }
        }
    )*};
}

impl Simd for Avx512 {
    type V = V;
    const MAX_TILE: usize = 24;

    lanes! {
        fn splat(x: f32) -> V { _mm512_set1_ps(x) }
        fn load(from: *const f32) -> V { _mm512_loadu_ps(from) }
        fn load_bf16(from: *const u16) -> V {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
        }
        fn load_f16(from: *const u16) -> V { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        fn load_bf16_pairs(from: *const u32) -> (V, V) {
            let raw = _mm512_loadu_si512(from.cast());
            let upper = _mm512_set1_epi32(0xFFFF_0000u32.cast_signed());
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw)), _mm512_castsi512_ps(_mm512_and_si512(raw, upper)))
        }
        fn store(to: *mut f32, v: V) { _mm512_storeu_ps(to, v) }
        fn add(a: V, b: V) -> V { _mm512_add_ps(a, b) }
        fn sub(a: V, b: V) -> V { _mm512_sub_ps(a, b) }
        fn mul(a: V, b: V) -> V { _mm512_mul_ps(a, b) }
        fn div(a: V, b: V) -> V { _mm512_div_ps(a, b) }
        fn fma(a: V, b: V, c: V) -> V { _mm512_fmadd_ps(a, b, c) }
        fn max(a: V, b: V) -> V { _mm512_max_ps(a, b) }
        fn min(a: V, b: V) -> V { _mm512_min_ps(a, b) }
        fn select_lt(a: V, b: V, x: V, y: V) -> V {
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x)
        }
        fn pow2_shifted(v: V) -> V {
            let n = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
        fn sum(v: V) -> f32 { _mm512_reduce_add_ps(v) }
        fn max_lane(v: V) -> f32 { _mm512_reduce_max_ps(v) }
        fn prefetch(from: *const u8) { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// bf16 weights times activations split into two bf16, which keeps 16 bits of their mantissa: two dot products of pairs
/// a weight vector. Decode waits for memory anyway, and the two parts cost no more than converting weights to f32.
pub(super) struct Bf16Dot;

impl Weight<Avx512> for Bf16Dot {
    type Loaded = __m512bh;
    const STEP_INPUTS: usize = 2;
    const STEP_BYTES: usize = 64;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512bh {
        // SAFETY: the contract of `Weight`: 64 bytes.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(acc: V, w: __m512bh, x: *const u32) -> V {
        // SAFETY: the contract of `Weight`: two elements.
        unsafe {
            let high = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.read().cast_signed()));
            let low =
                std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.add(1).read().cast_signed()));
            _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc, w, high), w, low)
        }
    }

    #[inline(always)]
    fn pack(x: [f32; 2]) -> [u32; 2] {
        let high = x.map(bf16_nearest);
        let low = [0, 1].map(|i| bf16_nearest(x[i] - f32::from_bits(high[i] << 16)));
        [high[0] | high[1] << 16, low[0] | low[1] << 16]
    }
}

impl CompactWeight<Avx512> for Bf16Dot {
    #[inline(always)]
    unsafe fn from_step(step: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes of any bits.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(step) }
    }
    #[inline(always)]
    unsafe fn activation(x: *const u32, input: usize) -> f32 {
        // SAFETY: the contract of `Weight`: two elements, the two parts of both inputs.
        let parts = unsafe { [x.read(), x.add(1).read()] };
        let [high, low] =
            parts.map(|part| f32::from_bits(if input == 0 { part << 16 } else { part & 0xFFFF_0000 }));
        high + low
    }
}

/// Only for kernels compiled with AVX512-BW.
impl CompactSimd for Avx512 {
    type Bases = __m512i;
    type Step = __m512i;

    lanes! {
        fn bases(from: *const u8) -> __m512i {
            let bases = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let lowest = _mm512_sub_epi32(bases, _mm512_set1_epi32(i32::from(WINDOW)));
            _mm512_or_si512(_mm512_slli_epi32::<7>(lowest), _mm512_slli_epi32::<23>(lowest))
        }
        fn quad(from: *const u8, bases: __m512i) -> [__m512i; 4] {
            let exponents = _mm512_loadu_si512(from.add(QUAD_EXPONENTS).cast());
            [
                compact_step(from, _mm512_slli_epi16::<7>(exponents), bases),
                compact_step(from.add(32), _mm512_slli_epi16::<3>(exponents), bases),
                compact_step(from.add(64), _mm512_srli_epi16::<1>(exponents), bases),
                compact_step(from.add(96), _mm512_srli_epi16::<5>(exponents), bases),
            ]
        }
        fn widen(step: __m512i) -> (V, V) {
            let upper = _mm512_set1_epi32(0xFFFF_0000u32.cast_signed());
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(step)), _mm512_castsi512_ps(_mm512_and_si512(step, upper)))
        }
        fn store_step(to: *mut u32, step: __m512i) { _mm512_storeu_si512(to.cast(), step) }
    }
}

lanes! {
    fn compact_step(from: *const u8, exponents: __m512i, bases: __m512i) -> __m512i {
        let bytes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.cast()));
        // `(bytes ^ exponents) & mask`.
        let mask = _mm512_set1_epi16(SIGN_EXPONENT_MANTISSA.cast_signed());
        let bits = _mm512_ternarylogic_epi32::<0x28>(bytes, exponents, mask);
        _mm512_mask_add_epi16(bits, _mm512_test_epi16_mask(bits, bits), bits, bases)
    }
}

/// Rounds to the nearest bf16, ties to even. Finite values only: not-a-number may become infinite.
#[inline(always)]
fn bf16_nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16
}

/// Activations split into a high and a low byte, each with sums of its own: `256 * high + low`. Only for kernels compiled with
/// AVX512-VNNI.
impl IntegerDot for Avx512 {
    type Values = __m512i;
    type Sums = [__m512i; 2];
    const MAX_TOKENS: usize = 8;

    lanes! {
        fn load_bytes(from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn load_nibbles(from: *const u8) -> [__m512i; 2] {
            let raw = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi32(0x0F0F_0F0F);
            [_mm512_and_si512(raw, mask), _mm512_and_si512(_mm512_srli_epi32::<4>(raw), mask)]
        }
        fn start(start: i32) -> [__m512i; 2] { [_mm512_setzero_si512(), _mm512_set1_epi32(start)] }
        fn dot(sums: [__m512i; 2], values: __m512i, x: *const u32) -> [__m512i; 2] {
            let high = _mm512_set1_epi32(x.read().cast_signed());
            let low = _mm512_set1_epi32(x.add(1).read().cast_signed());
            [_mm512_dpbusd_epi32(sums[0], values, high), _mm512_dpbusd_epi32(sums[1], values, low)]
        }
        fn finish(sums: [__m512i; 2]) -> V {
            _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1]))
        }
        fn split(x: &[i32; LANES]) -> [[u32; 2]; 4] {
            let x = _mm512_loadu_si512(x.as_ptr().cast());
            let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
            // The low byte of `x` is that of `x - 256 * high` too.
            let (high, low) = (_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(x));
            let halves = [_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)];
            std::mem::transmute::<[__m128i; 2], [[u32; 2]; 4]>(halves)
        }
    }
}
