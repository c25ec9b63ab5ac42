//! GGUF files that nobody should trust, given to the real program.

use std::fs;
use std::path::PathBuf;

use crate::bad_models::ends_with;
use crate::process::{Place, program};

/// A Falcon of two layers with its tokenizer.
fn sound() -> Vec<u8> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read(root.join("integration-tests/fixtures/tiny-gguf/falcon.gguf")).unwrap()
}

/// Where a tensor's number of dimensions is; they, its type and the offset of its data follow.
fn entry(bytes: &[u8], name: &str) -> usize {
    let text = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    bytes.windows(text.len()).rposition(|window| window == text).unwrap() + text.len()
}

fn put(bytes: &mut [u8], place: usize, number: u64) {
    bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
}

/// The file, changed by `spoil`, must be refused in as many lines as there are `words`.
fn refused(spoil: impl FnOnce(&mut Vec<u8>), words: &[&str]) {
    let place = Place::new();
    let mut bytes = sound();
    spoil(&mut bytes);
    let path = place.dir.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let mut command = program();
    command.arg("serve").arg(path).arg("--uds-path").arg(place.dir.path().join("s"));
    command.args(["--threads", "1", "--json-output"]);
    assert_eq!(ends_with(&command, 10, words), words.len(), "about {words:?}");
}

const NORM: &str = "output_norm.weight";
const TABLE: &str = "token_embd.weight";

#[test]
fn counts_and_lengths_past_the_end() {
    refused(|bytes| put(bytes, 8, u64::MAX), &["18446744073709551615 tensors, but only 7527 fit"]);
    refused(|bytes| put(bytes, 16, u64::MAX), &["18446744073709551615 metadata entries, but only"]);
    refused(|bytes| put(bytes, 24, u64::MAX), &["18446744073709551615 bytes of text, but only"]);
    refused(|bytes| bytes.truncate(40), &["not a usable GGUF file: 19 tensors, but only 0 fit"]);
    refused(
        |bytes| bytes.truncate(120_000),
        &["but the file ends at 120000; the download may be incomplete"],
    );
    refused(|bytes| bytes[4] = 9, &["version 9, expected 2 or 3"]);
}

#[test]
fn tensors_that_lie_wrongly() {
    let offset = |offset: u64| {
        move |bytes: &mut Vec<u8>| {
            let place = entry(bytes, NORM) + 4 + 8 + 4;
            put(bytes, place, offset);
        }
    };
    refused(offset(1 << 60), &["has 256 bytes at offset 1152921504606846976 of the data, but the file ends"]);
    refused(offset(0), &["\"output_norm.weight\" overlap"]);
    refused(offset(4), &["is at offset 4, expected a multiple of 32"]);
}

#[test]
fn absurd_shapes_and_types() {
    let size = |name: &'static str, dimension: usize, size: u64| {
        move |bytes: &mut Vec<u8>| {
            let place = entry(bytes, name) + 4 + 8 * dimension;
            put(bytes, place, size);
        }
    };
    refused(size(NORM, 0, u64::MAX), &["has a dimension of 18446744073709551615; no such tensor can exist"]);
    refused(
        size(TABLE, 1, 1 << 40),
        &["has 140737488355328 bytes at offset 182784 of the data, but the file ends at"],
    );
    let unknown = |bytes: &mut Vec<u8>| {
        let place = entry(bytes, NORM) + 4 + 8;
        bytes[place] = 99;
    };
    refused(unknown, &["tensor \"output_norm.weight\" has the unknown type 99"]);
    let integers = |bytes: &mut Vec<u8>| {
        let place = entry(bytes, NORM) + 4 + 8;
        bytes[place] = 24;
    };
    refused(integers, &["tensor transformer.ln_f.weight is stored as I8, expected F32, F16, BF16"]);
}

#[test]
fn tensors_and_vocabulary_of_another_model() {
    // Names are told as the family has them, which are not those of the file.
    let rename = |bytes: &mut Vec<u8>| {
        let place = entry(bytes, NORM) - 1;
        bytes[place] = b'T';
        let place = entry(bytes, "output_norm.bias") + 4;
        put(bytes, place, 32);
    };
    refused(
        rename,
        &[
            "tensor transformer.ln_f.weight is missing",
            "tensor transformer.ln_f.bias has shape [32], expected [64]",
            "tensor transformer.ln_f.weighT is not part of the model",
        ],
    );
    let shrink = |bytes: &mut Vec<u8>| {
        let place = entry(bytes, TABLE) + 4 + 8;
        put(bytes, place, 381);
    };
    refused(shrink, &["its largest token id is 383, expected ids below the model's vocab_size of 381"]);
}
