//! Plain Rust: every processor, and what the others are compared with.

use super::quantized::{IntegerDot, split_pairs};
use super::simd::{LANES, Simd};

/// Sixteen f32 in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// As [`Simd`] says; plain Rust needs no instruction set.
impl Simd for Portable {
    type V = V;
    const MAX_TILE: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: the caller gives 64 bytes.
        unsafe { from.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> V {
        // SAFETY: the caller gives 32 bytes.
        let raw = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> V {
        // SAFETY: the caller gives 32 bytes.
        let raw = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        raw.map(|x| half::f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u32) -> (V, V) {
        // SAFETY: the caller gives 64 bytes.
        let raw = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        (raw.map(|x| f32::from_bits(x << 16)), raw.map(|x| f32::from_bits(x & 0xFFFF_0000)))
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: the caller gives 64 bytes.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // Not `mul_add`, which is a slow library call where the processor has no such instruction.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn select_lt(a: V, b: V, x: V, y: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn pow2_shifted(v: V) -> V {
        v.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23))
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        v.iter().sum()
    }
    #[inline(always)]
    unsafe fn max_lane(v: V) -> f32 {
        v.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
    }
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}

/// Products of 16-bit pairs, as with AVX2.
impl IntegerDot for Portable {
    type Values = [[u8; 4]; LANES];
    type Sums = [i32; LANES];
    const MAX_TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Values {
        // SAFETY: the caller gives 64 bytes.
        unsafe { from.cast::<Self::Values>().read() }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> [Self::Values; 2] {
        // SAFETY: the caller gives 64 bytes.
        let raw = unsafe { from.cast::<Self::Values>().read() };
        [raw.map(|lane| lane.map(|x| x & 0x0F)), raw.map(|lane| lane.map(|x| x >> 4))]
    }
    #[inline(always)]
    unsafe fn start(start: i32) -> Self::Sums {
        [start; LANES]
    }
    #[inline(always)]
    unsafe fn dot(sums: Self::Sums, values: Self::Values, x: *const u32) -> Self::Sums {
        // SAFETY: the caller gives two elements.
        let [even, odd] = unsafe { x.cast::<[u32; 2]>().read() };
        let low = |pair: u32| i32::from((pair as u16).cast_signed());
        let high = |pair: u32| pair.cast_signed() >> 16;
        let x = [low(even), low(odd), high(even), high(odd)];
        std::array::from_fn(|lane| {
            let products: [i32; 4] = std::array::from_fn(|i| i32::from(values[lane][i]) * x[i]);
            sums[lane] + products[0] + products[1] + products[2] + products[3]
        })
    }
    #[inline(always)]
    unsafe fn finish(sums: Self::Sums) -> V {
        sums.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn split(x: &[i32; LANES]) -> [[u32; 2]; 4] {
        split_pairs(x)
    }
}
