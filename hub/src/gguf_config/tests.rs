//! Configurations built from GGUF files written in memory.

use serde_json::{Value as Json, json};

use super::rope_scaling::Llama3Scaling;
use super::*;
use crate::gguf::writer::{GgufWriter, mutations};
use crate::gguf::{Array, GgmlType};
use crate::{HubOptions, ModelRef, locate};

fn llama_file() -> GgufWriter {
    let mut writer = GgufWriter::default();
    writer
        .text("general.architecture", "llama")
        .number("llama.block_count", 2)
        .number("llama.context_length", 128)
        .number("llama.embedding_length", 64)
        .number("llama.feed_forward_length", 96)
        .number("llama.attention.head_count", 4)
        .number("llama.attention.head_count_kv", 2)
        .set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5))
        .set("llama.rope.freq_base", Value::F32(1e4))
        .texts("tokenizer.ggml.tokens", &["<unk>", "<s>", "</s>", "a"])
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.eos_token_id", 2)
        .tensor("blk.0.attn_q.weight", &[64, 64], GgmlType::Q4_1);
    writer
}

fn config(writer: &GgufWriter) -> Result<Json, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, writer.bytes()).unwrap();
    let files = locate(&ModelRef::new(path.to_str().unwrap()), &HubOptions::default()).unwrap();
    files.config().map(|config| Json::Object(config.raw)).map_err(|error| error.to_string())
}

#[test]
fn llama_metadata_becomes_a_config() {
    let config = config(&llama_file()).unwrap();
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "max_position_embeddings": 128, "mlp_bias": false, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": null, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 1e4, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 4,
    });
    assert_eq!(config, expected);
}

#[test]
fn tensors_tell_what_metadata_does_not() {
    let mut writer = llama_file();
    writer.tensors.clear();
    writer
        .tensor("blk.0.attn_q.weight", &[64, 64], GgmlType::F16)
        .tensor("blk.0.attn_q.bias", &[64], GgmlType::F32)
        .tensor("output.weight", &[4, 64], GgmlType::F16);
    let config = config(&writer).unwrap();
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn unknown_architectures_name_the_supported_ones() {
    let mut writer = llama_file();
    writer.text("general.architecture", "mamba");
    let error = config(&writer).unwrap_err();
    assert!(
        error.contains("architecture \"mamba\" is not supported; supported are the architectures gemma, "),
        "{error}"
    );
}

#[test]
fn missing_and_senseless_values_are_named() {
    let changed = |key: &str, value: Value| config(llama_file().set(key, value)).unwrap_err();
    let mut writer = llama_file();
    writer.metadata.retain(|(key, _)| key != "llama.block_count");
    assert!(config(&writer).unwrap_err().contains("no metadata key llama.block_count"));
    assert!(changed("llama.block_count", Value::Unsigned(0)).contains("llama.block_count is 0"));
    assert!(changed("llama.block_count", Value::F32(2.0)).contains("expected a non-negative integer"));
    assert!(changed("llama.attention.head_count_kv", Value::Unsigned(3)).contains("cannot share 3"));
    assert!(changed("llama.attention.head_count", Value::Unsigned(6)).contains("do not divide 64"));
    assert!(changed("llama.rope.dimension_count", Value::Unsigned(8)).contains("a rotation of 8"));
    assert!(changed("llama.expert_count", Value::Unsigned(8)).contains("experts"));
    assert!(changed("split.count", Value::Unsigned(3)).contains("merge the parts"));
    assert!(changed("tokenizer.ggml.eos_token_id", Value::Unsigned(4)).contains("there are 4 tokens"));
    assert!(
        changed("llama.rope.scaling.type", Value::String("odd".into())).contains("rotary scaling \"odd\"")
    );
}

#[test]
fn sizes_per_layer_must_agree() {
    let with = |sizes: Vec<u64>| {
        config(llama_file().set("llama.attention.head_count_kv", Value::Array(Array::Unsigned(sizes))))
    };
    assert_eq!(with(vec![2, 2]).unwrap()["num_key_value_heads"], 2);
    assert!(with(vec![2, 1]).unwrap_err().contains("differs between layers"));
    assert!(with(vec![]).unwrap_err().contains("differs between layers"));
}

#[test]
fn linear_and_yarn_scaling_are_translated() {
    let mut writer = llama_file();
    writer.text("llama.rope.scaling.type", "linear").set("llama.rope.scaling.factor", Value::F32(4.0));
    assert_eq!(config(&writer).unwrap()["rope_scaling"], json!({"rope_type": "linear", "factor": 4.0}));
    writer.text("llama.rope.scaling.type", "yarn").number("llama.rope.scaling.original_context_length", 32);
    let expected = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    assert_eq!(config(&writer).unwrap()["rope_scaling"], expected);
}

#[test]
fn llama_3_factors_are_recognised() {
    let factors = |change: f32| {
        let scaling = Llama3Scaling { factor: 8.0 };
        let factor = |index| scaling.factor_at(index, 8, 1e4) as f32 * change;
        let data: Vec<u8> = (0..8).flat_map(|index| factor(index).to_le_bytes()).collect();
        let mut writer = llama_file();
        writer.tensor_data("rope_freqs.weight", &[8], GgmlType::F32, data);
        config(&writer)
    };
    // The base of 10,000 over 16 numbers has waves long, short and between.
    let expected = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(factors(1.0).unwrap()["rope_scaling"], expected);
    assert!(factors(1.1).unwrap_err().contains("rope_freqs.weight is not supported"));
}

#[test]
fn end_of_turn_ends_a_text_too() {
    let mut writer = llama_file();
    writer.number("tokenizer.ggml.eot_token_id", 3).set("tokenizer.ggml.padding_token_id", Value::Signed(2));
    let gguf = Gguf::parse(&writer.bytes()).unwrap();
    let generation = generation_config(&gguf, "m.gguf").unwrap();
    assert_eq!(generation.eos_token_ids, [2, 3]);
    assert_eq!(generation.bos_token_id, Some(1));
    assert_eq!(generation.pad_token_id, Some(2));
}

#[test]
fn random_mutations_never_panic() {
    let mut writer = llama_file();
    writer.tensor("rope_freqs.weight", &[8], GgmlType::F32);
    let mut parsed = 0;
    for bytes in mutations(&writer.bytes(), 10_000) {
        let Ok(gguf) = Gguf::parse(&bytes) else { continue };
        parsed += 1;
        // Errors are as good as results here: only a panic fails.
        let _ = model_config(&gguf, &bytes, "m.gguf");
        let _ = generation_config(&gguf, "m.gguf");
    }
    assert!(parsed > 100, "{parsed}");
}
