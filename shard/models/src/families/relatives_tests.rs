//! Where the relatives of Llama differ from it.

use serde_json::{Value, json};

use super::tests::{refusal, spec};
use super::*;
use crate::spec::{AttentionSpec, LinearSpec, MixerSpec};

/// The changes that make the tests' llama a `model_type`.
fn named(model_type: &str, architecture: &str, mut changes: Value) -> Value {
    changes["model_type"] = json!(model_type);
    changes["architectures"] = json!([architecture]);
    changes
}

fn attention(spec: &DecoderSpec, layer: usize) -> &AttentionSpec {
    let MixerSpec::Attention(attention) = &spec.layers[layer].mixer;
    attention
}

fn windows(spec: &DecoderSpec) -> Vec<Option<usize>> {
    (0..spec.layers.len()).map(|layer| attention(spec, layer).window).collect()
}

#[test]
fn mistral_has_a_window_in_all_layers_or_none() {
    let mistral = |changes| named("mistral", "MistralForCausalLM", changes);
    let found = spec(mistral(json!({"sliding_window": 16, "head_dim": 32, "attention_bias": true})));
    assert_eq!(windows(&found), [Some(16), Some(16)]);
    assert_eq!((attention(&found, 0).head_dim, &attention(&found, 0).q_proj.bias), (32, &None));
    assert_eq!(windows(&spec(mistral(json!({"sliding_window": null, "head_dim": null})))), [None, None]);
    assert_eq!(windows(&spec(mistral(json!({})))), [Some(4096), Some(4096)], "the library's default");
    let error = refusal(mistral(json!({"sliding_window": 0})));
    assert_eq!(error, "config.json: sliding_window: found 0, expected 1 to 16777216");
}

#[test]
fn qwen2_has_biases_on_queries_keys_and_values() {
    let qwen2 = |changes| named("qwen2", "Qwen2ForCausalLM", changes);
    let found = spec(qwen2(json!({"sliding_window": 16, "use_sliding_window": false})));
    assert_eq!(attention(&found, 1).v_proj, LinearSpec::new("model.layers.1.self_attn.v_proj", true));
    assert_eq!(attention(&found, 1).o_proj, LinearSpec::new("model.layers.1.self_attn.o_proj", false));
    assert_eq!(windows(&found), [None, None]);
    let sliding = json!({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(windows(&spec(qwen2(sliding.clone()))), [None, Some(16)]);
    let mut typed = sliding;
    typed["layer_types"] = json!(["sliding_attention", "full_attention"]);
    assert_eq!(windows(&spec(qwen2(typed.clone()))), [Some(16), None]);
    typed["layer_types"] = json!(["sliding_attention"]);
    let error = refusal(qwen2(typed));
    assert!(error.contains("layer_types: expected") && error.lines().count() == 1, "{error}");
}

#[test]
fn qwen3_has_norms_over_heads() {
    let qwen3 = |changes| named("qwen3", "Qwen3ForCausalLM", changes);
    let found = spec(qwen3(json!({"attention_bias": true})));
    let layer = attention(&found, 1);
    assert_eq!((layer.head_dim, layer.scale), (128, 128_f32.sqrt().recip()), "the library's default");
    let norm = layer.k_norm.as_ref().unwrap();
    assert_eq!((norm.weight.as_str(), norm.eps), ("model.layers.1.self_attn.k_norm.weight", 1e-5));
    assert!(layer.o_proj.bias.is_some());
    let tensors = found.tensors();
    let q_norm = tensors.iter().find(|tensor| tensor.name == "model.layers.0.self_attn.q_norm.weight");
    assert_eq!(q_norm.unwrap().shape, [128]);
    let error = refusal(qwen3(json!({"head_dim": 31})));
    assert_eq!(error, "config.json: head_dim: found 31, expected an even number up to 4096");
}
