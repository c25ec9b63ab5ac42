//! PyTorch files that nobody should trust, given to the real program.

use std::fs;
use std::path::Path;

use crate::bad_models::{self, ends_with, grow_vocabulary};
use crate::process::{Place, Shard};
use crate::tiny_model;
use crate::torch_file::{Code, VIEW, View, archive, one_tensor};

/// Before a storage of the container before torch 1.6: magic number, version, and what the writer's machine was like.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
/// In the directory of an archive, before each entry.
const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";

/// A tensor with a storage of its own, all zeros.
struct Saved {
    name: String,
    class: &'static str,
    element_bytes: usize,
    shape: Vec<i64>,
    strides: Vec<i64>,
    num_elements: usize,
}

/// The tensors of the tiny model.
fn model() -> Vec<Saved> {
    let saved = |(name, shape): (String, Vec<usize>)| {
        let num_elements = shape.iter().product();
        let shape: Vec<i64> = shape.into_iter().map(|size| size as i64).collect();
        let strides = if let &[_, cols] = shape.as_slice() { vec![cols, 1] } else { vec![1] };
        Saved { name, class: "FloatStorage", element_bytes: 4, shape, strides, num_elements }
    };
    tiny_model::tensors().into_iter().map(saved).collect()
}

fn find<'a>(tensors: &'a mut [Saved], name: &str) -> &'a mut Saved {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

fn file_of(tensors: &[Saved]) -> Vec<u8> {
    let keys: Vec<String> = (0..tensors.len()).map(|key| key.to_string()).collect();
    let code = tensors.iter().zip(&keys).fold(Code::new().op(b"}("), |code, (tensor, key)| {
        let Saved { name, class, shape, strides, num_elements, .. } = tensor;
        let len = *num_elements as i64;
        code.text(name).tensor(&View { class, key, len, offset: 0, shape, strides })
    });
    let code = code.op(b"u.");
    let data: Vec<(String, Vec<u8>)> = tensors
        .iter()
        .zip(&keys)
        .map(|(tensor, key)| (format!("m/data/{key}"), vec![0; tensor.num_elements * tensor.element_bytes]))
        .collect();
    let mut entries = vec![("m/data.pkl", code.0.as_slice())];
    entries.extend(data.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    archive(&entries)
}

/// A file with one tensor, which says all about itself that [`View`] says, and a storage of 24 bytes.
fn file_with(view: &View<'_>) -> Vec<u8> {
    archive(&[("m/data.pkl", &one_tensor("a", view).0), ("m/data/0", &[0; 24])])
}

fn put(model: &Path, bytes: &[u8]) {
    fs::remove_file(model.join("model.safetensors")).unwrap();
    fs::write(model.join("pytorch_model.bin"), bytes).unwrap();
}

/// The file must be refused in one line.
fn refused(bytes: &[u8], words: &[&str]) {
    let words = [&["pytorch_model.bin: not a usable PyTorch file: "][..], words].concat();
    bad_models::refused(|model| put(model, bytes), &words);
}

/// The model must be refused in as many lines as there are `words`.
fn refused_tensors(tensors: &[Saved], words: &[&str]) {
    let place = Place::new();
    put(&place.model(), &file_of(tensors));
    assert_eq!(ends_with(&place.command(), 10, words), words.len(), "about {words:?}");
}

/// Where the `nth` entry of an archive's directory is.
fn directory_entry(bytes: &[u8], nth: usize) -> usize {
    let mut places = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(DIRECTORY_ENTRY));
    places.nth(nth).unwrap()
}

#[tokio::test]
async fn what_the_others_spoil_is_served() {
    let place = Place::new();
    put(&place.model(), &file_of(&model()));
    let shard = Shard::start(place.command(), place.socket(0));
    shard.client().await.health().await.unwrap();
}

#[test]
fn lengths_past_the_end() {
    let sound = file_with(&VIEW);
    refused(&sound[..sound.len() - 1], &["its directory is not within its", "may be incomplete"]);
    refused(&sound[..sound.len() / 2], &["may be incomplete"]);
    let spoilt = |field: usize, number: u32| {
        let mut bytes = sound.clone();
        let at = directory_entry(&bytes, 1) + field;
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    refused(&spoilt(42, u32::MAX - 1), &["entry \"m/data/0\" leaves the file"]);
    refused(&spoilt(20, 1 << 30), &["entry \"m/data/0\" takes 1073741824 bytes, expected 24"]);
    let mut long = spoilt(20, 1 << 30);
    let at = directory_entry(&long, 1);
    long.copy_within(at + 20..at + 24, at + 24);
    refused(&long, &["entry \"m/data/0\" leaves the file"]);

    for (view, words) in [
        (View { len: i64::MAX, ..VIEW }, "9223372036854775807 elements of F32, but 24 bytes"),
        (View { len: 7, ..VIEW }, "is in a storage of 7 elements of F32, but 24 bytes"),
        (View { offset: 1, ..VIEW }, "from 1 on leaves its storage of 6 elements"),
        (View { offset: i64::MAX, ..VIEW }, "leaves its storage of 6 elements"),
        (View { strides: &[i64::MAX, 1], ..VIEW }, "leaves its storage of 6 elements"),
        (View { key: "1", ..VIEW }, "in storage \"1\", which is not there"),
    ] {
        refused(&file_with(&view), &[words]);
    }
    let keys = Code::new().op(b"](").text("0").op(b"e.").0;
    let legacy = |len: u64| [LEGACY, &one_tensor("a", &VIEW).0, &keys, &len.to_le_bytes(), &[0; 24]].concat();
    refused(&legacy(u64::MAX), &["storage \"0\" leaves the file"]);
    refused(&legacy(7), &["storage \"0\" leaves the file"]);
    refused(&legacy(5), &["is in a storage of 6 elements of F32, but 20 bytes"]);
    refused(&LEGACY[..LEGACY.len() - 1], &["in the middle of an instruction"]);
}

#[test]
fn storages_and_strides_that_overlap() {
    let tensors = one_tensor("a", &VIEW).0;
    let mut bytes = archive(&[("m/data.pkl", &tensors), ("m/data/0", &[0; 24]), ("m/data/1", &[0; 24])]);
    let (first, second) = (directory_entry(&bytes, 1), directory_entry(&bytes, 2));
    bytes.copy_within(first + 42..first + 46, second + 42);
    refused(&bytes, &["entries \"m/data/0\" and \"m/data/1\" overlap"]);
    // One number in the place of all, and rows that begin before the last one has ended.
    let mut tensors = model();
    find(&mut tensors, "model.norm.weight").strides = vec![0];
    find(&mut tensors, "lm_head.weight").strides = vec![32, 1];
    refused_tensors(
        &tensors,
        &[
            "tensor model.norm.weight is stored as F32 with strides [0], expected F32, F16, BF16",
            "tensor lm_head.weight is stored as F32 with strides [32, 1], expected F32, F16, BF16",
        ],
    );
}

#[test]
fn absurd_shapes() {
    let max = i64::MAX;
    for (view, words) in [
        (View { shape: &[max, max], strides: &[0, 0], ..VIEW }, "no such tensor can exist"),
        (View { shape: &[max, 1], strides: &[0, 0], ..VIEW }, "no such tensor can exist"),
        (View { shape: &[max, 3], ..VIEW }, "no such tensor can exist"),
        (View { shape: &[-1, 3], ..VIEW }, "a size of -1, expected a non-negative number"),
        (View { shape: &[6], ..VIEW }, "a tensor of 1 dimensions has 2 strides"),
        (View { shape: &[1; 9], strides: &[1; 9], ..VIEW }, "a tensor of 9 dimensions, expected at most 8"),
    ] {
        refused(&file_with(&view), &[words]);
    }
    // It can exist, and all of it is one number.
    let mut tensors = model();
    let table = find(&mut tensors, "model.embed_tokens.weight");
    (table.shape, table.strides, table.num_elements) = (vec![1 << 30, 1 << 30], vec![0, 0], 1);
    refused_tensors(
        &tensors,
        &[
            "tensor model.embed_tokens.weight has shape [1073741824, 1073741824], expected [257, 64]",
            "tensor model.embed_tokens.weight is stored as F32 with strides [0, 0]",
        ],
    );
}

#[test]
fn types_that_do_not_fit() {
    for (class, words) in [
        ("HalfStorage", "is in a storage of 6 elements of F16, but 24 bytes"),
        ("DoubleStorage", "is in a storage of 6 elements of F64, but 24 bytes"),
        ("QUInt8Storage", "it refers to \"torch.QUInt8Storage\", expected only tensors"),
    ] {
        refused(&file_with(&View { class, ..VIEW }), &[words]);
    }
    let mut tensors = model();
    let norm = find(&mut tensors, "model.norm.weight");
    (norm.class, norm.element_bytes) = ("DoubleStorage", 8);
    let head = find(&mut tensors, "lm_head.weight");
    (head.class, head.element_bytes) = ("CharStorage", 1);
    refused_tensors(
        &tensors,
        &[
            "tensor model.norm.weight is stored as F64, expected F32, F16, BF16",
            "tensor lm_head.weight is stored as I8, expected F32, F16, BF16",
        ],
    );
}

#[test]
fn missing_and_surplus_tensors_are_all_listed() {
    let mut tensors = model();
    find(&mut tensors, "lm_head.weight").name = "head.weight".to_owned();
    find(&mut tensors, "model.layers.1.mlp.up_proj.weight").name = "extra\n.weight".to_owned();
    let norm = find(&mut tensors, "model.norm.weight");
    (norm.shape, norm.strides) = (vec![32, 2], vec![2, 1]);
    refused_tensors(
        &tensors,
        &[
            "tensor lm_head.weight is missing",
            "tensor model.layers.1.mlp.up_proj.weight is missing",
            "tensor model.norm.weight has shape [32, 2], expected [64]",
            "tensor extra\\n.weight is not part of the model",
            "tensor head.weight is not part of the model",
        ],
    );
    let twice = Code::new().op(b"}(").text("a").tensor(&VIEW).text("a").tensor(&VIEW).op(b"u.");
    refused(&archive(&[("m/data.pkl", &twice.0), ("m/data/0", &[0; 24])]), &["tensor \"a\" is there twice"]);
}

#[test]
fn instructions_that_are_not_for_tensors() {
    let call = |module: &str, name: &str| Code::new().global(module, name).op(b"(").text("x").op(b"tR.");
    for (code, words) in [
        (call("os", "system"), "it refers to \"os.system\", expected only tensors"),
        (call("builtins", "eval"), "it refers to \"builtins.eval\""),
        (call("torch.storage", "_load_from_bytes"), "it refers to \"torch.storage._load_from_bytes\""),
        (call("a\u{1b}[31m", "b"), "it refers to \"a\\u{1b}[31m.b\""),
        (Code::new().text("os").text("system").op(b"\x93."), "it refers to \"os.system\""),
        (Code::new().op(b"(ios\nsystem\n."), "instruction INST is not allowed"),
        (Code::new().op(b"(o."), "instruction OBJ is not allowed"),
        (Code::new().op(b")\x81."), "instruction NEWOBJ is not allowed"),
        (Code::new().op(b"\x92."), "instruction NEWOBJ_EX is not allowed"),
        (Code::new().op(b"\x82\x01."), "instruction EXT1 is not allowed"),
        (Code::new().op(b"Px\n."), "instruction PERSID is not allowed"),
        (Code::new().op(&[0xff]), "instruction 0xff is not allowed"),
    ] {
        let (zip, legacy) = (archive(&[("m/data.pkl", &code.0)]), [LEGACY, &code.0].concat());
        refused(&zip, &[words]);
        refused(&legacy, &[words]);
    }
    let nested = Code::new().op(b"}").text("model").op(b"}s.");
    refused(&archive(&[("m/data.pkl", &nested.0)]), &["entry \"model\" is a dictionary, expected a tensor"]);
}

#[test]
fn bombs() {
    // Compressed entries, which torch does not write.
    let mut compressed = file_with(&VIEW);
    let at = directory_entry(&compressed, 1) + 10;
    compressed[at] = 8;
    refused(&compressed, &["entry \"m/data/0\" is compressed or encrypted, expected it stored"]);
    // Many entries that are all the same four MiB.
    let names: Vec<String> = (1..40_000).map(|key| format!("m/data/{key}")).collect();
    let pickle = one_tensor("a", &VIEW).0;
    let shared = vec![0; 4 << 20];
    let mut entries = vec![("m/data.pkl", pickle.as_slice()), ("m/data/0", shared.as_slice())];
    entries.extend(names.iter().map(|name| (name.as_str(), [].as_slice())));
    let mut bytes = archive(&entries);
    let first = directory_entry(&bytes, 1);
    let fields: [u8; 26] = bytes[first + 20..first + 46].try_into().unwrap();
    let mut at = first;
    while bytes[at..].starts_with(DIRECTORY_ENTRY) {
        bytes[at + 20..at + 28].copy_from_slice(&fields[..8]);
        bytes[at + 42..at + 46].copy_from_slice(&fields[22..]);
        at += 46 + usize::from(bytes[at + 28]);
    }
    refused(&bytes, &["overlap"]);
    // Pickles that make as much as they can of each byte.
    let million = 1 << 20;
    for (code, words) in [
        (b"]".repeat(16 * million), "it has more than 1310720 values"),
        (b"(".repeat(16 * million), "it has more than 1310720 values"),
        (b"]\x94".repeat(8 * million), "it has more than 1310720 values"),
        (
            [b"N".as_slice(), b"\x85".repeat(16 * million - 3).as_slice()].concat(),
            "it has more than 1310720 values",
        ),
        (b"\x80\x02".repeat(8 * million), "has 16777218 bytes, expected at most 16777216"),
    ] {
        let code = Code::new().op(&code).0;
        let code = if words.starts_with("has") { code } else { code[..16 * million].to_vec() };
        refused(&archive(&[("m/data.pkl", &code)]), &[words]);
    }
}

#[test]
fn a_tokenizer_of_another_model() {
    let spoil = |model: &Path| {
        put(model, &file_of(&self::model()));
        grow_vocabulary(model);
    };
    bad_models::refused(
        spoil,
        &["its largest token id is 300, expected ids below the model's vocab_size of 257"],
    );
}

#[test]
fn files_of_another_kind() {
    refused(b"PK\x03\x04", &["may be incomplete"]);
    refused(b"", &["it begins with [], expected what torch.save writes"]);
    refused(b"version https://git-lfs.github.com/spec/v1", &["expected what torch.save writes"]);
    refused(&archive(&[("m/model.json", b"{}")]), &["it has no data.pkl, or several, expected one"]);
    let big = archive(&[("m/data.pkl", &one_tensor("a", &VIEW).0), ("m/byteorder", b"big")]);
    refused(&big, &["its numbers are big-endian, expected little-endian"]);
}
