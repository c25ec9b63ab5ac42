//! Sound and hostile GGUF files.

use super::writer::{GgufWriter, mutations};
use super::*;

fn sound() -> GgufWriter {
    let mut writer = GgufWriter::default();
    writer
        .text("general.architecture", "llama")
        .number("general.alignment", 32)
        .set("llama.rope.freq_base", Value::F32(1e5))
        .set("signed", Value::Signed(-3))
        .set("double", Value::F64(0.25))
        .set("flag", Value::Bool(true))
        .texts("tokens", &["a", "b", "ab"])
        .set("kinds", Value::Array(Array::Signed(vec![1, 3, 1])))
        .set("scores", Value::Array(Array::Floats(vec![0.5, -1.0])))
        .set("bools", Value::Array(Array::Bools(vec![true, false])))
        .set("nested", Value::Array(Array::Arrays(vec![Array::Unsigned(vec![1]), Array::Unsigned(vec![])])))
        .tensor("token_embd.weight", &[3, 64], GgmlType::Q4_1)
        .tensor("output_norm.weight", &[64], GgmlType::F32);
    writer
}

fn problem(bytes: &[u8]) -> String {
    Gguf::parse(bytes).unwrap_err().to_string()
}

/// The sound file with `edit` applied to the bytes that follow the first occurrence of `name`.
fn edited(name: &str, edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = sound().bytes();
    let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    edit(&mut bytes[at + name.len()..]);
    bytes
}

#[test]
fn reads_every_kind_of_value() {
    let gguf = Gguf::parse(&sound().bytes()).unwrap();
    assert_eq!(gguf.version, 3);
    for (key, value) in sound().metadata {
        assert_eq!(gguf.metadata[&key], value, "{key}");
    }
    assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.f64("llama.rope.freq_base").unwrap(), Some(1e5));
    assert_eq!(gguf.strings("tokens").unwrap().unwrap(), ["a", "b", "ab"]);
    assert_eq!(gguf.u64("absent").unwrap(), None);
    assert!(gguf.u64("signed").unwrap_err().to_string().contains("signed is -3"));
}

#[test]
fn shapes_are_outermost_first_and_ranges_in_the_file() {
    let bytes = sound().bytes();
    let gguf = Gguf::parse(&bytes).unwrap();
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape, [3, 64]);
    assert_eq!(embedding.range.len(), 3 * 64 / 32 * 20);
    let norm = gguf.tensor("output_norm.weight").unwrap();
    assert_eq!(norm.range.end, bytes.len());
    assert_eq!(norm.range.start % 32, 0);
}

#[test]
fn float32_keeps_its_shortest_spelling() {
    assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
    assert_eq!(Value::F32(500000.0).as_f64(), Some(500000.0));
    assert!(Value::F32(f32::NAN).as_f64().unwrap().is_nan());
}

#[test]
fn version_2_is_read_and_others_are_named() {
    let with_version = |version: [u8; 4]| {
        let mut bytes = sound().bytes();
        bytes[4..8].copy_from_slice(&version);
        bytes
    };
    assert_eq!(Gguf::parse(&with_version([2, 0, 0, 0])).unwrap().version, 2);
    assert!(problem(&with_version([1, 0, 0, 0])).contains("version 1"));
    assert!(problem(&with_version([9, 0, 0, 0])).contains("version 9"));
    assert!(problem(&with_version([0, 0, 0, 3])).contains("big-endian"));
    assert!(problem(&with_version([0, 0, 0, 0])).contains("version 0"));
}

#[test]
fn other_files_are_refused() {
    assert!(problem(b"").contains("only 0 are left"));
    assert!(problem(b"PK\x03\x04....").contains("expected \"GGUF\""));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sound().bytes();
    for length in 0..bytes.len() {
        assert!(Gguf::parse(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
    }
}

#[test]
fn absurd_counts_allocate_nothing() {
    let mut bytes = sound().bytes();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(problem(&bytes).contains("tensors, but only"));
    let mut bytes = sound().bytes();
    bytes[16..24].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    assert!(problem(&bytes).contains("metadata entries, but only"));
    // After the key: kind 9, kind of the items, count.
    let bytes = edited("tokens", |rest| rest[8..16].copy_from_slice(&u64::MAX.to_le_bytes()));
    assert!(problem(&bytes).contains("items of a list, but only"));
    let bytes = edited("general.architecture", |rest| rest[4..12].copy_from_slice(&u64::MAX.to_le_bytes()));
    assert!(problem(&bytes).contains("bytes of text, but only"));
}

#[test]
fn deep_nesting_is_refused() {
    let mut array = Array::Unsigned(vec![1]);
    for _ in 0..10 {
        array = Array::Arrays(vec![array]);
    }
    let mut writer = sound();
    writer.set("nested", Value::Array(array));
    assert!(problem(&writer.bytes()).contains("nests lists too deeply"));
}

#[test]
fn duplicates_are_refused() {
    let mut writer = sound();
    writer.tensor("output_norm.weight", &[64], GgmlType::F32);
    assert!(problem(&writer.bytes()).contains("tensor \"output_norm.weight\" appears twice"));
    let mut writer = sound();
    writer.metadata.push(("flag".to_owned(), Value::Bool(false)));
    assert!(problem(&writer.bytes()).contains("metadata key \"flag\" appears twice"));
}

#[test]
fn bad_alignment_is_refused() {
    for alignment in [0, 1, 24, 1 << 40] {
        let mut writer = sound();
        writer.number("general.alignment", alignment);
        assert!(problem(&writer.bytes()).contains("power of two"), "{alignment}");
    }
    // After the name of a one-dimensional tensor: number of dimensions, dimension, type, offset.
    let bytes = edited("output_norm.weight", |rest| rest[16] += 8);
    assert!(problem(&bytes).contains("expected a multiple of 32"));
}

#[test]
fn bad_tensors_are_refused() {
    let norm = |edit: fn(&mut [u8])| problem(&edited("output_norm.weight", edit));
    assert!(norm(|rest| rest[0] = 0).contains("has 0 dimensions"));
    assert!(norm(|rest| rest[0] = 5).contains("has 5 dimensions"));
    assert!(norm(|rest| rest[4..12].fill(0)).contains("dimension of 0"));
    assert!(norm(|rest| rest[4..12].fill(0xff)).contains("no such tensor can exist"));
    assert!(norm(|rest| rest[11] = 0x7f).contains("larger than memory"));
    assert!(norm(|rest| rest[12] = 99).contains("unknown type 99"));
    assert!(
        norm(|rest| rest[16..24].copy_from_slice(&(u64::MAX - 31).to_le_bytes())).contains("the file ends")
    );
    assert!(norm(|rest| rest[4] = 65).contains("the file ends"));
    assert!(norm(|rest| rest[16..24].fill(0)).contains("overlaps"));
    let embedding = problem(&edited("token_embd.weight", |rest| rest[4] = 63));
    assert!(embedding.contains("rows of 63, expected a multiple of 32"), "{embedding}");
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    let bytes = edited("general.architecture", |rest| rest[12] = 0xff);
    assert!(problem(&bytes).contains("not valid UTF-8"));
}

#[test]
fn long_names_are_cut_in_messages() {
    let name = "x".repeat(10_000);
    let mut writer = sound();
    writer.tensor(&name, &[32], GgmlType::F32).tensor(&name, &[32], GgmlType::F32);
    assert!(problem(&writer.bytes()).len() < 200);
}

#[test]
fn random_mutations_never_panic() {
    let sound = sound().bytes();
    let mut accepted = 0;
    for bytes in mutations(&sound, 20_000) {
        if let Ok(gguf) = Gguf::parse(&bytes) {
            accepted += 1;
            assert!(gguf.tensors.iter().all(|tensor| bytes.get(tensor.range.clone()).is_some()));
        }
    }
    // Changes within names, values and data are harmless; the check above would be idle without them.
    assert!(accepted > 1000, "{accepted}");
}
