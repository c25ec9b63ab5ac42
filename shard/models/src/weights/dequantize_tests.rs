//! Random blocks against a second reading of the formats, written from their description and without shared code.

use super::*;
use crate::testing::Noise;

/// The f32 behind the bits of a binary16.
fn from_f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2_f64.powi(exponent - 25),
    };
    (sign * magnitude) as f32
}

/// Element `index` of a block.
fn element(ggml_type: GgmlType, block: &[u8], index: usize) -> f32 {
    let half = |at: usize| from_f16(u16::from(block[at]) + 256 * u16::from(block[at + 1]));
    let nibble = |start: usize| {
        let byte = block[start + index % 16];
        f32::from(if index < 16 { byte % 16 } else { byte / 16 })
    };
    match ggml_type {
        GgmlType::Q4_0 => half(0) * (nibble(2) - 8.0),
        GgmlType::Q4_1 => half(0) * nibble(4) + half(2),
        GgmlType::Q8_0 => half(0) * f32::from(block[2 + index] as i8),
        other => panic!("{other}"),
    }
}

#[test]
fn blocks_of_all_formats_equal_the_plain_reading() {
    let mut noise = Noise::new(1);
    for ggml_type in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q8_0] {
        let (block_bytes, decode) = decoder(ggml_type).unwrap();
        assert_eq!((BLOCK as u64, block_bytes as u64), ggml_type.block());
        let mut out = [0; BLOCK];
        for _ in 0..20_000 {
            // Random bits are infinite or not a number at times, and those must survive.
            let block: Vec<u8> = (0..block_bytes).map(|_| noise.next() as u8).collect();
            decode(&block, &mut out);
            for (index, &bits) in out.iter().enumerate() {
                let expected = element(ggml_type, &block, index);
                if expected.is_nan() {
                    assert!(half::bf16::from_bits(bits).is_nan());
                } else {
                    assert_eq!(bits, half::bf16::from_f32(expected).to_bits(), "{ggml_type} {expected}");
                }
            }
        }
    }
}

#[test]
fn rounding_is_to_nearest_even() {
    let mut noise = Noise::new(2);
    let edges = [0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::INFINITY, f32::NEG_INFINITY];
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0xff7f_ffff].map(f32::from_bits);
    let random = (0..100_000).map(|_| f32::from_bits(noise.next() as u32));
    for value in edges.into_iter().chain(ties).chain(random).filter(|value| !value.is_nan()) {
        assert_eq!(round_to_bf16(value), half::bf16::from_f32(value).to_bits(), "{value:e}");
    }
    assert!(half::bf16::from_bits(round_to_bf16(f32::NAN)).is_nan());
    assert!(half::bf16::from_bits(round_to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
}
