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
        error.contains("architecture \"mamba\" is not supported; supported are the architectures baichuan, "),
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
    assert!(
        changed("llama.expert_count", Value::Unsigned(8)).contains("no metadata key llama.expert_used_count")
    );
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

/// The sizes of `architecture`: 4 heads of 16.
fn sizes_of(architecture: &str) -> GgufWriter {
    let mut writer = GgufWriter::default();
    writer.text("general.architecture", architecture);
    for (key, value) in [
        ("context_length", 512),
        ("embedding_length", 64),
        ("block_count", 2),
        ("feed_forward_length", 128),
        ("attention.head_count", 4),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("vocab_size", 10),
    ] {
        writer.number(&format!("{architecture}.{key}"), value);
    }
    writer.set(&format!("{architecture}.attention.layer_norm_epsilon"), Value::F32(1e-5));
    writer.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6));
    writer
}

#[test]
fn llama_with_experts_is_mixtral() {
    let mut writer = sizes_of("llama");
    let config = config(writer.tensor("blk.0.ffn_gate_exps.weight", &[8, 96, 64], GgmlType::F32)).unwrap();
    assert_eq!((&config["model_type"], &config["intermediate_size"]), (&json!("mixtral"), &json!(96)));
    assert_eq!((&config["num_local_experts"], &config["num_experts_per_tok"]), (&json!(8), &json!(2)));
}

#[test]
fn falcons_layout_is_what_its_tensors_are() {
    let falcon = |rows: u64, has_two_norms: bool| {
        let mut writer = sizes_of("falcon");
        writer.tensor("blk.0.attn_qkv.weight", &[rows, 64], GgmlType::F32);
        if has_two_norms {
            writer.tensor("blk.0.attn_norm_2.weight", &[64], GgmlType::F32);
        }
        config(&writer)
    };
    let seven = falcon(96, false).unwrap();
    assert_eq!((&seven["num_kv_heads"], &seven["new_decoder_architecture"]), (&json!(1), &json!(false)));
    let forty = falcon(128, true).unwrap();
    assert_eq!((&forty["num_kv_heads"], &forty["num_ln_in_parallel_attn"]), (&json!(2), &json!(2)));
    // A KV head for each query head is the layout of the models with linear biases, which no key says.
    assert!(falcon(192, false).unwrap_err().contains("the layouts of 7B, 11B, 40B and 180B"));
    assert!(falcon(100, false).unwrap_err().contains("100 rows for 4 heads of 16"));
}

#[test]
fn glm4_turns_a_part_of_each_head() {
    let mut writer = sizes_of("glm4");
    writer.number("glm4.rope.dimension_count", 8).tensor("blk.0.attn_q.bias", &[64], GgmlType::F32);
    let found = config(&writer).unwrap();
    let class = &found["architectures"][0];
    assert_eq!((&found["model_type"], class), (&json!("glm4"), &json!("Glm4ForCausalLM")));
    let rotation = (&found["partial_rotary_factor"], &found["attention_bias"]);
    assert_eq!(rotation, (&json!(0.5), &json!(true)));
    assert!(config(writer.number("glm4.rope.dimension_count", 17)).unwrap_err().contains("expected 1 to 16"));
}

#[test]
fn deepseeks_generation_is_told_by_its_bias() {
    let mut writer = sizes_of("deepseek2");
    for (key, value) in [
        ("attention.kv_lora_rank", 16),
        ("attention.key_length", 24),
        ("attention.value_length", 12),
        ("rope.dimension_count", 8),
        ("rope.scaling.original_context_length", 64),
    ] {
        writer.number(&format!("deepseek2.{key}"), value);
    }
    writer.text("deepseek2.rope.scaling.type", "yarn");
    writer.set("deepseek2.rope.scaling.factor", Value::F32(40.0));
    writer.set("deepseek2.rope.scaling.yarn_log_multiplier", Value::F32(0.0707));
    let second = config(&writer).unwrap();
    assert_eq!((&second["model_type"], &second["topk_method"]), (&json!("deepseek_v2"), &json!("greedy")));
    assert_eq!((&second["qk_nope_head_dim"], &second["v_head_dim"]), (&json!(16), &json!(12)));
    assert_eq!((&second["q_lora_rank"], &second["n_shared_experts"]), (&Json::Null, &Json::Null));
    assert_eq!(second["rope_scaling"]["mscale_all_dim"], 0.707);
    // Absorbed projections: a head's lengths go by other names.
    writer
        .number("deepseek2.attention.key_length_mla", 24)
        .number("deepseek2.attention.value_length_mla", 12);
    writer.number("deepseek2.attention.key_length", 24).number("deepseek2.attention.value_length", 16);
    writer.tensor("blk.1.exp_probs_b.bias", &[8], GgmlType::F32);
    let third = config(&writer).unwrap();
    assert_eq!((&third["model_type"], &third["topk_method"]), (&json!("deepseek_v3"), &json!("noaux_tc")));
    assert_eq!((&third["qk_nope_head_dim"], &third["v_head_dim"]), (&json!(16), &json!(12)));
}

#[test]
fn what_the_keys_do_not_say_is_refused() {
    let mut large = sizes_of("baichuan");
    large.number("baichuan.block_count", 40);
    assert!(config(&large).unwrap_err().contains("baichuan with 40 layers"));
    let mut windowed = sizes_of("olmo2");
    windowed.number("olmo2.attention.sliding_window", 4096);
    assert!(config(&windowed).unwrap_err().contains("olmo2 with a sliding window"));
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
