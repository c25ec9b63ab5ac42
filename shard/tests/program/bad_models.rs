//! Models that nobody should trust, given to the real program: one clear line each, exit code 10, and memory that stays
//! bounded.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};

use crate::process::{Place, run};

/// KiB of address space: the program, its threads and a small model take a quarter of it.
const MAX_ADDRESS_SPACE: &str = "4194304";

/// MiB that no refusal may have used.
const MAX_RESIDENT: i64 = 256;

/// `command` must end with `code`, and with all of `words` in what it says; the number of lines.
pub(crate) fn ends_with(command: &Command, code: i32, words: &[&str]) -> usize {
    let mut bounded = Command::new("/bin/sh");
    bounded.args(["-c", &format!("ulimit -v {MAX_ADDRESS_SPACE} && exec \"$0\" \"$@\"")]);
    bounded.arg(command.get_program()).args(command.get_args());
    bounded.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (found, stderr) = run(bounded);
    assert_eq!(found, Some(code), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(stderr.lines().all(|line| line.len() < 1000), "{stderr}");
    // Of all that this test's process has started and waited for.
    let resident = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss() / 1024;
    assert!(resident < MAX_RESIDENT, "{resident} MiB were used");
    stderr.lines().count()
}

/// The model, changed by `spoil`, must be refused in one line.
pub(crate) fn refused(spoil: impl FnOnce(&Path), words: &[&str]) {
    let place = Place::new();
    spoil(&place.model());
    let num_lines = ends_with(&place.command(), 10, words);
    assert_eq!(num_lines, 1, "about {words:?}");
}

fn change_config(model: &Path, changes: Value) {
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

/// Rewrites the header of the safetensors file; the data stays.
fn change_header(model: &Path, change: impl FnOnce(&mut Value)) {
    let path = model.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    change(&mut header);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
}

/// Gives the tokenizer a token that the model has no row for.
pub(crate) fn grow_vocabulary(model: &Path) {
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["one too many"] = json!(300);
    fs::write(path, tokenizer.to_string()).unwrap();
}

#[test]
fn safetensors_that_contradict_themselves() {
    let name = "model.norm.weight";
    let unusable = "model.safetensors: not a usable safetensors file";
    refused(
        |model| change_header(model, |header| header[name]["data_offsets"] = json!([0, 1_u64 << 60])),
        &[unusable],
    );
    refused(
        |model| change_header(model, |header| header[name]["data_offsets"] = json!([0, 256])),
        &[unusable],
    );
    refused(|model| change_header(model, |header| header[name]["dtype"] = json!("BF16")), &[unusable]);
    refused(
        |model| change_header(model, |header| header[name]["shape"] = json!([u64::MAX, u64::MAX])),
        &[unusable],
    );
    refused(|model| fs::write(model.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap(), &[unusable]);
    refused(|model| fs::write(model.join("model.safetensors"), "").unwrap(), &[unusable, "it has 0 bytes"]);
}

#[test]
fn safetensors_of_types_that_are_not_read() {
    let place = Place::new();
    change_header(&place.model(), |header| {
        header["model.norm.weight"]["dtype"] = json!("I32");
        header["lm_head.weight"]["dtype"] = json!("U32");
    });
    let words = [
        "tensor model.norm.weight is stored as I32, expected F32, F16, BF16",
        "tensor lm_head.weight is stored as U32, expected F32, F16, BF16",
    ];
    assert_eq!(ends_with(&place.command(), 10, &words), words.len());
}

#[test]
fn tensors_that_are_missing_surplus_or_of_another_shape_are_all_listed() {
    let place = Place::new();
    change_header(&place.model(), |header| {
        let header = header.as_object_mut().unwrap();
        for (from, to) in
            [("lm_head.weight", "head.weight"), ("model.layers.1.mlp.up_proj.weight", "extra.weight")]
        {
            let tensor = header.shift_remove(from).unwrap();
            header.insert(to.to_owned(), tensor);
        }
        header["model.norm.weight"]["shape"] = json!([32, 2]);
    });
    let words = [
        "tensor lm_head.weight is missing",
        "tensor model.layers.1.mlp.up_proj.weight is missing",
        "tensor model.norm.weight has shape [32, 2], expected [64]",
        "tensor extra.weight is not part of the model",
        "tensor head.weight is not part of the model",
    ];
    assert_eq!(ends_with(&place.command(), 10, &words), words.len());
}

#[test]
fn indexes_that_lead_elsewhere() {
    for (weights, index) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ] {
        let suffix = weights.rsplit('.').next().unwrap();
        let spoilt = |map: Value| {
            move |model: &Path| {
                fs::rename(model.join("model.safetensors"), model.join(weights)).unwrap();
                fs::write(model.join(index), json!({"weight_map": map}).to_string()).unwrap();
            }
        };
        let (parent, here) = (format!("../model/{weights}"), format!("./{weights}"));
        for name in [parent.as_str(), "/etc/passwd", here.as_str(), ".."] {
            let words = [index, "weight_map: found", name, "expected names of files"];
            refused(spoilt(json!({"model.norm.weight": name})), &words);
        }
        let (first, second) = (format!("b.{suffix}"), format!("d.{suffix}"));
        refused(
            spoilt(json!({"a": first, "c": second, "e": weights})),
            &[&format!("{first}, {second} of model")],
        );
        refused(spoilt(json!([1, 2])), &["weight_map: found no object"]);
    }
}

#[test]
fn links_that_lead_elsewhere() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    for name in ["model.safetensors", "pytorch_model.bin", "model.gguf", "tokenizer.json"] {
        let link = |model: &Path| {
            if name != "tokenizer.json" {
                fs::remove_file(model.join("model.safetensors")).unwrap();
            }
            let _ = fs::remove_file(model.join(name));
            std::os::unix::fs::symlink(outside.path(), model.join(name)).unwrap();
        };
        refused(link, &[name, "found a link to", "outside of the model's directory"]);
    }
    // One that an index names.
    let named = |model: &Path| {
        std::os::unix::fs::symlink(outside.path(), model.join("b.safetensors")).unwrap();
        let index = json!({"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}});
        fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    refused(named, &["b.safetensors: found a link to", "outside of the model's directory"]);
}

#[test]
fn configurations_with_absurd_numbers() {
    for (key, value) in [
        ("hidden_size", json!(9_007_199_254_740_993_u64)),
        ("hidden_size", json!(1e300)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("vocab_size", json!(u64::MAX)),
        ("num_attention_heads", json!(-1)),
        ("num_key_value_heads", json!(0)),
        ("head_dim", json!(3)),
        ("rms_norm_eps", json!("small")),
    ] {
        refused(|model| change_config(model, json!({key: value})), &["config.json: ", key]);
    }
    refused(|model| fs::write(model.join("config.json"), "[".repeat(1 << 20)).unwrap(), &["not valid JSON"]);
    refused(
        |model| fs::write(model.join("config.json"), vec![b' '; 17 << 20]).unwrap(),
        &["config.json: found 17825792 bytes, expected a file of at most 16777216 bytes"],
    );
    // As many layers as are allowed, of which two are there.
    let place = Place::new();
    change_config(&place.model(), json!({"num_hidden_layers": 4096}));
    assert_eq!(
        ends_with(
            &place.command(),
            10,
            &["tensor model.layers.2.input_layernorm.weight is missing", "more of this kind"]
        ),
        21
    );
}

#[test]
fn a_tokenizer_of_another_model() {
    refused(
        grow_vocabulary,
        &["tokenizer of ", "its largest token id is 300, expected ids below the model's vocab_size of 257"],
    );
    refused(
        |model| fs::write(model.join("tokenizer.json"), "{}").unwrap(),
        &["tokenizer.json: cannot build"],
    );
}

#[test]
fn kinds_of_models_that_come_later() {
    let kind = |model_type: &'static str, architecture: &'static str| {
        move |model: &Path| {
            change_config(model, json!({"model_type": model_type, "architectures": [architecture]}));
        }
    };
    refused(kind("t5", "T5ForConditionalGeneration"), &["\"t5\" is an encoder-decoder", "come later"]);
    refused(kind("mamba", "MambaForCausalLM"), &["\"mamba\" is a state-space or recurrent model"]);
}
