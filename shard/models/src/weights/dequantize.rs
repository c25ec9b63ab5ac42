//! ggml's block formats to bfloat16.
//!
//! A block is 32 consecutive elements of a row with a scale, and in some formats an offset, of type f16. The product is
//! taken in f32 and rounded to nearest, ties to even.

use half::f16;
use hub::gguf::GgmlType;

/// Elements of a block in all formats here.
pub(super) const BLOCK: usize = 32;

/// Decodes one block into its elements.
pub(super) type BlockDecoder = fn(&[u8], &mut [u16; BLOCK]);

/// Bytes of a block and its decoder; none for formats that are not read.
pub(super) fn decoder(ggml_type: GgmlType) -> Option<(usize, BlockDecoder)> {
    match ggml_type {
        GgmlType::Q4_0 => Some((18, q4_0)),
        GgmlType::Q4_1 => Some((20, q4_1)),
        GgmlType::Q8_0 => Some((34, q8_0)),
        _ => None,
    }
}

/// `d: f16, qs: [u8; 16]`: `d * (q - 8)`.
fn q4_0(block: &[u8], out: &mut [u16; BLOCK]) {
    let scale = read_f16(block, 0);
    nibbles(&block[2..18], |q| scale * (q as f32 - 8.0), out);
}

/// `d: f16, m: f16, qs: [u8; 16]`: `d * q + m`.
fn q4_1(block: &[u8], out: &mut [u16; BLOCK]) {
    let (scale, offset) = (read_f16(block, 0), read_f16(block, 2));
    nibbles(&block[4..20], |q| scale * q as f32 + offset, out);
}

/// `d: f16, qs: [i8; 32]`: `d * q`.
fn q8_0(block: &[u8], out: &mut [u16; BLOCK]) {
    let scale = read_f16(block, 0);
    for (value, &q) in out.iter_mut().zip(&block[2..34]) {
        *value = round_to_bf16(scale * f32::from(q.cast_signed()));
    }
}

/// The low halves of the bytes are the first 16 elements, the high halves the others. A block has 16 different values at
/// most, so they are computed once and looked up.
fn nibbles(bytes: &[u8], value: impl Fn(usize) -> f32, out: &mut [u16; BLOCK]) {
    let table: [u16; 16] = std::array::from_fn(|q| round_to_bf16(value(q)));
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = table[usize::from(byte & 15)];
        *high = table[usize::from(byte >> 4)];
    }
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The bits of the nearest bfloat16, ties to even; a NaN stays one. Free of branches, unlike `half`'s, so that it
/// vectorizes.
pub(super) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

#[cfg(test)]
#[path = "dequantize_tests.rs"]
mod tests;
