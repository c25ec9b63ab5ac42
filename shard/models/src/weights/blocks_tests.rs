//! Every format against what the gguf package makes of random blocks (`integration-tests/fixtures/make_ggml_blocks.py`).

use std::path::Path;

use super::*;
use crate::testing::Noise;

const TYPES: [GgmlType; 10] = [
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
];

/// The fixture's blocks as one row, and the elements of that row.
fn fixture(ggml_type: GgmlType) -> (Vec<u8>, Vec<f32>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/ggml-blocks");
    let read = |ending: &str| std::fs::read(folder.join(format!("{ggml_type}.{ending}"))).unwrap();
    let elements = read("f32").as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    (read("blocks"), elements)
}

struct Unpacked {
    values: Vec<u8>,
    scales: Vec<f32>,
    offsets: Vec<f32>,
}

fn unpack(format: &BlockFormat, row: &[u8], from: usize, count: usize) -> Unpacked {
    let groups = count / format.group;
    let mut out = Unpacked { values: vec![99; count], scales: vec![9.0; groups], offsets: vec![9.0; groups] };
    let Unpacked { values, scales, offsets } = &mut out;
    format.unpack_row(row, from, Groups { values, scales, offsets });
    out
}

#[test]
fn unpacked_blocks_have_exactly_the_elements_of_the_reference() {
    for ggml_type in TYPES {
        let (row, expected) = fixture(ggml_type);
        let format = format(ggml_type).unwrap();
        assert_eq!(expected.len() * format.bytes, row.len() * format.elements, "{ggml_type}");
        let unpacked = unpack(&format, &row, 0, expected.len());
        for (index, &expected) in expected.iter().enumerate() {
            let (value, group) = (unpacked.values[index], index / format.group);
            assert!(u32::from(value) < 1 << format.bits, "{ggml_type}");
            let found = unpacked.scales[group] * f32::from(value) + unpacked.offsets[group];
            assert_eq!(found, expected, "{ggml_type}, element {index}");
        }
    }
}

#[test]
fn dequantized_blocks_are_the_reference_rounded_once() {
    for ggml_type in TYPES {
        let (row, expected) = fixture(ggml_type);
        let mut out = vec![[0; 2]; expected.len()];
        format(ggml_type).unwrap().dequantize_row(&row, 0, &mut out);
        let rounded: Vec<_> = expected.iter().map(|&value| half::bf16::from_f32(value)).collect();
        let found: Vec<_> = out.iter().map(|&bytes| half::bf16::from_le_bytes(bytes)).collect();
        assert_eq!(found, rounded, "{ggml_type}");
    }
}

#[test]
fn any_columns_equal_those_of_the_whole_row() {
    let mut noise = Noise::new(5);
    for ggml_type in TYPES {
        let (row, elements) = fixture(ggml_type);
        let format = format(ggml_type).unwrap();
        let whole = unpack(&format, &row, 0, elements.len());
        let mut plain = vec![[0; 2]; elements.len()];
        format.dequantize_row(&row, 0, &mut plain);
        for _ in 0..50 {
            let groups = elements.len() / format.group;
            let first = noise.below(groups);
            let last = first + 1 + noise.below(groups - first);
            let (from, to) = (first * format.group, last * format.group);
            let part = unpack(&format, &row, from, to - from);
            assert_eq!(part.values, whole.values[from..to], "{ggml_type}");
            assert_eq!(part.scales, whole.scales[first..last], "{ggml_type}");
            assert_eq!(part.offsets, whole.offsets[first..last], "{ggml_type}");
            let from = noise.below(elements.len());
            let mut out = vec![[0; 2]; noise.below(elements.len() - from + 1)];
            format.dequantize_row(&row, from, &mut out);
            assert_eq!(out, plain[from..from + out.len()], "{ggml_type}");
        }
    }
}

#[test]
fn random_bits_never_panic_and_plain_types_have_no_blocks() {
    let mut noise = Noise::new(6);
    for ggml_type in TYPES {
        let format = format(ggml_type).unwrap();
        for _ in 0..2000 {
            let block: Vec<u8> = (0..format.bytes).map(|_| noise.next() as u8).collect();
            let unpacked = unpack(&format, &block, 0, format.elements);
            assert!(unpacked.values.iter().all(|&value| u32::from(value) < 1 << format.bits));
            format.dequantize_row(&block, 0, &mut vec![[0; 2]; format.elements]);
        }
    }
    assert!(format(GgmlType::F16).is_none() && format(GgmlType::IQ2_XS).is_none());
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
