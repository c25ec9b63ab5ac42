//! Where the relatives of Llama differ from it.

use backend::{Activation, RopeStyle};
use serde_json::{Value, json};

use super::tests::{refusal, spec};
use super::*;
use crate::spec::{
    AttentionSpec, BranchSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormKind, ResidualSpec,
};

/// The changes that make the tests' llama a `model_type`.
fn named(model_type: &str, architecture: &str, mut changes: Value) -> Value {
    changes["model_type"] = json!(model_type);
    changes["architectures"] = json!([architecture]);
    changes
}

fn branches_of(spec: &DecoderSpec, layer: usize) -> (&BranchSpec, &BranchSpec) {
    let ResidualSpec::Sequential { mixer, mlp } = &spec.layers[layer].residual else {
        panic!("layer {layer} has its parts side by side");
    };
    (mixer, mlp)
}

fn attention(spec: &DecoderSpec, layer: usize) -> &AttentionSpec {
    let MixerSpec::Attention(attention) = &spec.layers[layer].mixer else { panic!("another mixer") };
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
    let norm = &layer.qk_norm.as_ref().unwrap().k;
    assert_eq!((norm.weight.as_str(), norm.eps), ("model.layers.1.self_attn.k_norm.weight", 1e-5));
    assert!(layer.o_proj.bias.is_some());
    let tensors = found.tensors();
    let q_norm = tensors.iter().find(|tensor| tensor.name == "model.layers.0.self_attn.q_norm.weight");
    assert_eq!(q_norm.unwrap().shape, [128]);
    let error = refusal(qwen3(json!({"head_dim": 31})));
    assert_eq!(error, "config.json: head_dim: found 31, expected an even number up to 4096");
}

#[test]
fn granite_has_factors() {
    let granite = |changes| named("granite", "GraniteForCausalLM", changes);
    let factors = json!({
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.25, "residual_multiplier": 0.22,
    });
    let found = spec(granite(factors));
    assert_eq!((found.embedding.multiplier, found.logits_multiplier), (12.0, 0.125));
    assert_eq!(attention(&found, 1).scale, 0.25);
    let (mixer, mlp) = branches_of(&found, 1);
    assert_eq!((mixer.multiplier, mlp.multiplier), (0.22, 0.22));
    let bare = spec(granite(json!({})));
    assert_eq!((bare.embedding.multiplier, attention(&bare, 0).scale), (1.0, 1.0), "the library's defaults");
    let error = refusal(granite(json!({"logits_scaling": 0})));
    assert_eq!(error, "config.json: logits_scaling: found 0, expected a positive number");
}

#[test]
fn gemma_shifts_norms_and_scales_the_embedding() {
    let gemma = |changes| named("gemma", "GemmaForCausalLM", changes);
    let found = spec(gemma(json!({"hidden_act": "gelu"})));
    assert_eq!((found.embedding.multiplier, found.norm.weight_offset), (8.0, 1.0));
    assert_eq!((attention(&found, 0).head_dim, &found.lm_head), (256, &LmHeadSpec::Tied));
    let (mixer, mlp) = branches_of(&found, 1);
    assert_eq!(
        (mixer.norm.as_ref().unwrap().weight_offset, mlp.norm.as_ref().unwrap().weight_offset),
        (1.0, 1.0)
    );
    assert_eq!((&mixer.post_norm, found.logits_soft_cap), (&None, None));
    let MlpSpec::Gated { activation, .. } = &found.layers[0].mlp else { panic!() };
    assert_eq!(*activation, Activation::GeluTanh);
    let error = refusal(gemma(json!({"hidden_activation": "mish"})));
    assert!(
        error.starts_with("config.json: hidden_activation: found \"mish\"") && error.lines().count() == 1
    );
}

#[test]
fn gemma2_alternates_windows_and_caps() {
    let gemma2 = |changes| named("gemma2", "Gemma2ForCausalLM", changes);
    let found =
        spec(gemma2(json!({"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 3})));
    assert_eq!(windows(&found), [Some(16), None, Some(16)]);
    assert_eq!((attention(&found, 1).scale, attention(&found, 1).soft_cap), (0.25, Some(50.0)));
    assert_eq!(found.logits_soft_cap, Some(30.0));
    let (mixer, mlp) = branches_of(&found, 2);
    let post_norm = mixer.post_norm.as_ref().unwrap();
    assert_eq!(post_norm.weight, "model.layers.2.post_attention_layernorm.weight");
    assert_eq!(mlp.norm.as_ref().unwrap().weight, "model.layers.2.pre_feedforward_layernorm.weight");
    assert_eq!((post_norm.weight_offset, mlp.post_norm.as_ref().unwrap().weight_offset), (1.0, 1.0));
    let uncapped = spec(gemma2(json!({"attn_logit_softcapping": null, "final_logit_softcapping": null})));
    assert_eq!((attention(&uncapped, 0).soft_cap, uncapped.logits_soft_cap), (None, None));
    let error = refusal(gemma2(json!({"final_logit_softcapping": -1})));
    assert_eq!(error, "config.json: final_logit_softcapping: found -1, expected a positive number");
}

#[test]
fn gemma3_turns_sliding_layers_at_their_own_rate() {
    let gemma3 = |changes| named("gemma3_text", "Gemma3ForCausalLM", changes);
    let found = spec(gemma3(json!({
        "sliding_window": 16, "sliding_window_pattern": 2, "rope_local_base_freq": 100.0, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 4,
    })));
    assert_eq!(windows(&found), [Some(16), None]);
    let rates = |spec: &DecoderSpec, layer| attention(spec, layer).rope.clone().unwrap().inv_freq;
    assert_eq!(rates(&found, 0), [1.0, 0.1]);
    assert_eq!(rates(&found, 1), [0.125, 0.00125]);
    assert_eq!(attention(&found, 0).qk_norm.as_ref().unwrap().q.weight_offset, 1.0);
    assert_eq!(found.logits_soft_cap, None);
    let newer = json!({
        "head_dim": 4, "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    });
    let newer = spec(gemma3(newer));
    assert_eq!((rates(&newer, 0), rates(&newer, 1)), (rates(&found, 1), rates(&found, 0)));
    let error = refusal(gemma3(json!({"use_bidirectional_attention": true})));
    assert!(error.starts_with("config.json: use_bidirectional_attention: found true"), "{error}");
}

#[test]
fn parameters_per_kind_of_layer_are_not_passed_over() {
    let error = refusal(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}));
    assert!(error.contains("found one object per kind of layer") && error.lines().count() == 1, "{error}");
}

#[test]
fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    let rope = |scaling: Value| attention(&spec(json!({"rope_scaling": scaling})), 0).rope.clone().unwrap();
    let (plain, scaled) = (rope(json!(null)), rope(yarn.clone()));
    assert_eq!(scaled.inv_freq[0], plain.inv_freq[0]);
    assert_eq!(scaled.inv_freq[7], plain.inv_freq[7] / 4.0);
    assert!((scaled.scale - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6, "{}", scaled.scale);
    let mut told = yarn;
    told["attention_factor"] = json!(1.5);
    assert_eq!(rope(told.clone()).scale, 1.5);
    told["factor"] = json!("four");
    let error = refusal(json!({"rope_scaling": told}));
    assert_eq!(error, "config.json: rope_scaling: factor is \"four\", expected a positive number");
}

#[test]
fn phi3_fuses_projections_and_turns_a_part_of_each_head() {
    let phi3 = |changes| named("phi3", "Phi3ForCausalLM", changes);
    let found = spec(phi3(json!({"partial_rotary_factor": 0.75, "sliding_window": 16})));
    let layer = attention(&found, 1);
    assert_eq!(layer.v_proj.weight, "model.layers.1.self_attn.qkv_proj.weight");
    assert_eq!(layer.v_proj.row_runs(0..32), std::slice::from_ref(&(96..128)));
    assert_eq!(layer.rope.as_ref().unwrap().inv_freq.len(), 6);
    assert_eq!(windows(&found), [Some(16), Some(16)]);
    assert_eq!(windows(&spec(phi3(json!({})))), [None, None]);
    let tensors = found.tensors();
    let shapes = |name: &str| -> Vec<_> {
        tensors.iter().filter(|tensor| tensor.name == name).map(|tensor| tensor.shape.clone()).collect()
    };
    assert_eq!(shapes("model.layers.0.self_attn.qkv_proj.weight"), [[128, 64]], "once, as a whole");
    assert_eq!(shapes("model.layers.0.mlp.gate_up_proj.weight"), [[256, 64]]);
    let error = refusal(phi3(json!({"partial_rotary_factor": 1.5})));
    assert!(error.starts_with("config.json: partial_rotary_factor: found 1.5") && error.lines().count() == 1);
}

#[test]
fn glm_turns_neighbours_and_glm4_has_norms_after_both_branches() {
    let glm = |changes| named("glm", "GlmForCausalLM", changes);
    let glm4 = |changes| named("glm4", "Glm4ForCausalLM", changes);
    let found = spec(glm(json!({"head_dim": 32})));
    let layer = attention(&found, 1);
    let rope = layer.rope.as_ref().unwrap();
    assert_eq!((rope.style, rope.inv_freq.len()), (RopeStyle::Interleaved, 8), "half of a head");
    assert_eq!((layer.q_proj.bias.is_some(), layer.o_proj.bias.is_some()), (true, false));
    let MlpSpec::Gated { up_proj, .. } = &found.layers[1].mlp else { panic!() };
    assert_eq!(up_proj.weight, "model.layers.1.mlp.gate_up_proj.weight");
    assert_eq!(up_proj.row_runs(0..128), std::slice::from_ref(&(128..256)));
    assert_eq!(branches_of(&found, 0).0.post_norm, None);
    let newer = spec(glm4(json!({"attention_bias": false, "partial_rotary_factor": 1.0, "head_dim": 32})));
    assert_eq!(attention(&newer, 0).q_proj.bias, None);
    assert_eq!(attention(&newer, 0).rope.as_ref().unwrap().inv_freq.len(), 16);
    let (mixer, mlp) = branches_of(&newer, 1);
    let names = [&mixer.norm, &mixer.post_norm, &mlp.norm, &mlp.post_norm]
        .map(|norm| norm.as_ref().unwrap().weight.trim_start_matches("model.layers.1.").to_owned());
    assert_eq!(
        names,
        [
            "input_layernorm.weight",
            "post_self_attn_layernorm.weight",
            "post_attention_layernorm.weight",
            "post_mlp_layernorm.weight"
        ]
    );
    // The library's defaults, where they are not Llama's.
    let mut bare = super::tests::config(glm4(json!({"num_attention_heads": 8})));
    for key in ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings"] {
        bare.raw.remove(key);
    }
    let bare = decoder_spec(&bare).unwrap();
    let layer = attention(&bare, 0);
    assert_eq!((layer.num_kv_heads, layer.head_dim, bare.norm.eps), (2, 128, 1.5625e-7));
    assert_eq!(bare.max_position_embeddings, 131_072);
    let error = refusal(glm(json!({"partial_rotary_factor": 1.5})));
    assert!(error.starts_with("config.json: partial_rotary_factor: found 1.5") && error.lines().count() == 1);
}

#[test]
fn stablelm_has_layer_norms_with_biases() {
    let stablelm = |changes| named("stablelm", "StableLmForCausalLM", changes);
    let found = spec(stablelm(json!({"use_qkv_bias": true, "layer_norm_eps": 1e-3, "head_dim": 32})));
    assert_eq!((found.norm.kind, found.norm.eps), (NormKind::Layer, 1e-3));
    assert_eq!(found.norm.bias.as_deref(), Some("model.norm.bias"));
    let layer = attention(&found, 0);
    assert_eq!(layer.rope.as_ref().unwrap().inv_freq.len(), 4, "the library's default, a quarter");
    assert_eq!((layer.q_proj.bias.is_some(), layer.o_proj.bias.is_some()), (true, false));
    let tensors = found.tensors();
    let bias = tensors.iter().find(|tensor| tensor.name == "model.layers.1.input_layernorm.bias");
    assert_eq!(bias.unwrap().shape, [64]);
    let of_12b = spec(stablelm(json!({"use_parallel_residual": true, "qk_layernorm": true, "head_dim": 32})));
    assert!(matches!(of_12b.layers[0].residual, ResidualSpec::Parallel { mlp_norm: None, .. }));
    let tensors = of_12b.tensors();
    let shape =
        |name: &str| tensors.iter().find(|tensor| tensor.name == name).map(|tensor| &tensor.shape[..]);
    assert_eq!(shape("model.layers.1.self_attn.q_layernorm.norms.3.weight"), Some(&[32][..]));
    assert_eq!(shape("model.layers.1.self_attn.q_layernorm.norms.4.weight"), None);
    assert_eq!(shape("model.layers.1.post_attention_layernorm.weight"), None);
}
