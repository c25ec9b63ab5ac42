//! Families with experts and with attention over latent vectors: what their configurations become.

use backend::{ExpertGroups, GroupRank, RopeStyle, RouterScores, WeightNormalization};
use serde_json::{Value, json};

use super::tests::{refusal, spec};
use super::*;
use crate::spec::{
    ExpertsSpec, LatentAttentionSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormKind, ResidualSpec,
};

/// The changes that make the tests' llama a `model_type`, with `defaults` where `changes` say nothing.
fn named(model_type: &str, architecture: &str, defaults: Value, changes: Value) -> Value {
    let mut all = defaults;
    all["model_type"] = json!(model_type);
    all["architectures"] = json!([architecture]);
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}

fn experts(spec: &DecoderSpec, layer: usize) -> &ExpertsSpec {
    let MlpSpec::Experts(experts) = &spec.layers[layer].mlp else { panic!("no experts in layer {layer}") };
    experts
}

fn latent(spec: &DecoderSpec) -> &LatentAttentionSpec {
    let MixerSpec::LatentAttention(attention) = &spec.layers[1].mixer else { panic!("another mixer") };
    attention
}

fn shape(spec: &DecoderSpec, name: &str) -> Vec<usize> {
    let tensors = spec.tensors();
    tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}")).shape.clone()
}

fn mixtral(changes: Value) -> Value {
    named("mixtral", "MixtralForCausalLM", json!({}), changes)
}

#[test]
fn mixtral_sends_tokens_to_two_of_eight() {
    let found = spec(mixtral(json!({"attention_bias": true, "sliding_window": null})));
    let layer = experts(&found, 1);
    assert_eq!((layer.experts.len(), layer.intermediate_size, layer.routing.num_chosen), (8, 128, 2));
    assert_eq!(
        (layer.routing.scores, layer.routing.normalization),
        (RouterScores::Softmax, WeightNormalization::Sum)
    );
    let prefix = "model.layers.1.block_sparse_moe";
    assert_eq!(layer.router, LinearSpec::new(&format!("{prefix}.gate"), false));
    assert_eq!(layer.experts[7].up_proj, LinearSpec::new(&format!("{prefix}.experts.7.w3"), false));
    assert_eq!(shape(&found, &format!("{prefix}.experts.3.w2.weight")), [64, 128]);
    assert_eq!(shape(&found, &format!("{prefix}.gate.weight")), [8, 64]);
    let MixerSpec::Attention(attention) = &found.layers[0].mixer else { panic!("another mixer") };
    assert_eq!((attention.window, &attention.q_proj.bias), (None, &None));
    assert_eq!(
        attention.rope.as_ref().unwrap().inv_freq[4],
        1e6_f64.powf(-0.5) as f32,
        "the library's default"
    );
    let error = refusal(mixtral(json!({"num_local_experts": 2, "num_experts_per_tok": 3})));
    assert_eq!(error, "config.json: the choice of experts: 3 experts for a token, expected 1 to 2");
    let error = refusal(mixtral(json!({"num_local_experts": 1_000_000, "intermediate_size": null})));
    assert_eq!(error.lines().count(), 2, "{error}");
}

#[test]
fn qwen_has_experts_where_its_rule_says() {
    let sizes = json!({
        "num_experts": 6, "moe_intermediate_size": 24, "num_hidden_layers": 6, "shared_expert_intermediate_size": 48,
    });
    let qwen3 = |changes| named("qwen3_moe", "Qwen3MoeForCausalLM", sizes.clone(), changes);
    let has_experts = |spec: &DecoderSpec| -> Vec<bool> {
        spec.layers.iter().map(|layer| matches!(layer.mlp, MlpSpec::Experts(_))).collect()
    };
    let changes = json!({"num_experts_per_tok": 4, "norm_topk_prob": true, "decoder_sparse_step": 2});
    let found = spec(qwen3(changes));
    assert_eq!(has_experts(&found), [false, true, false, true, false, true]);
    let layer = experts(&found, 1);
    assert_eq!((layer.routing.num_chosen, layer.routing.normalization), (4, WeightNormalization::Sum));
    assert_eq!(shape(&found, "model.layers.5.mlp.experts.5.down_proj.weight"), [64, 24]);
    assert_eq!(shape(&found, "model.layers.4.mlp.down_proj.weight"), [64, 128]);
    assert_eq!(shape(&found, "model.layers.4.self_attn.q_norm.weight"), [16]);
    let found = spec(qwen3(json!({"num_experts_per_tok": 1, "mlp_only_layers": [0, 5, 77]})));
    assert_eq!(has_experts(&found), [false, true, true, true, true, false]);
    assert_eq!(experts(&found, 1).routing.normalization, WeightNormalization::None, "the library's default");
    let error = refusal(qwen3(json!({"mlp_only_layers": "none", "num_experts": null})));
    assert_eq!(
        error.lines().collect::<Vec<_>>(),
        [
            "config.json: mlp_only_layers: found \"none\", expected a list of layers",
            "config.json: num_experts: missing, expected a positive integer",
        ]
    );

    let found = spec(named("qwen2_moe", "Qwen2MoeForCausalLM", sizes, json!({})));
    let shared = experts(&found, 0).shared.as_ref().unwrap();
    assert_eq!((shared.intermediate_size, experts(&found, 0).routing.num_chosen), (48, 4));
    assert_eq!(shape(&found, "model.layers.0.mlp.shared_expert_gate.weight"), [1, 64]);
    assert_eq!(shape(&found, "model.layers.0.mlp.shared_expert.up_proj.weight"), [48, 64]);
    assert_eq!(shape(&found, "model.layers.0.self_attn.v_proj.bias"), [32]);
}

#[test]
fn phimoe_has_biases_layer_norms_and_a_sparse_mixer() {
    let phimoe = |changes| named("phimoe", "PhimoeForCausalLM", json!({}), changes);
    let found =
        spec(phimoe(json!({"attention_bias": true, "lm_head_bias": true, "router_jitter_noise": 0.02})));
    assert_eq!((found.norm.kind, found.norm.bias.as_deref()), (NormKind::Layer, Some("model.norm.bias")));
    let ResidualSpec::Sequential { mlp, .. } = &found.layers[0].residual else { panic!("another residual") };
    let norm = mlp.norm.as_ref().unwrap();
    assert_eq!(norm.bias.as_deref(), Some("model.layers.0.post_attention_layernorm.bias"));
    assert_eq!(found.lm_head, LmHeadSpec::Own(LinearSpec::new("lm_head", true)));
    let layer = experts(&found, 0);
    assert_eq!((layer.experts.len(), layer.routing.scores), (16, RouterScores::SparseMixer { jitter: 0.02 }));
    assert!(spec(phimoe(json!({"router_jitter_noise": 0}))).layers.len() == 2);
    let error = refusal(phimoe(json!({"num_experts_per_tok": 3, "router_jitter_noise": -1})));
    assert_eq!(error.lines().count(), 2, "{error}");
}

#[test]
fn dbrx_has_its_experts_in_one_tensor() {
    let dbrx = |attention: Value, ffn: Value| {
        let mut raw = json!({
            "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 384, "num_key_value_heads": 3,
            "model_type": "dbrx", "architectures": ["DbrxForCausalLM"],
        });
        raw["attn_config"] = attention;
        raw["ffn_config"] = ffn;
        decoder_spec(&ModelConfig::new(raw.as_object().unwrap().clone()))
    };
    let attention = json!({"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5});
    let ffn = json!({"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "moe_normalize_expert_weights": 2});
    let found = dbrx(attention.clone(), ffn.clone()).unwrap();
    let layer = experts(&found, 1);
    assert_eq!(layer.routing.normalization, WeightNormalization::Norm(2.0));
    assert_eq!(layer.experts[2].up_proj.row_runs(5..9)[0], 53..57);
    assert_eq!(layer.experts[2].down_proj.column_range(0..24), 48..72);
    for name in ["w1", "v1", "w2"] {
        assert_eq!(shape(&found, &format!("transformer.blocks.1.ffn.experts.mlp.{name}")), [72, 64]);
    }
    assert_eq!(shape(&found, "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"), [128, 64]);
    let MixerSpec::Attention(attention_spec) = &found.layers[0].mixer else { panic!("another mixer") };
    assert_eq!((attention_spec.clip_qkv, attention_spec.num_kv_heads), (Some(8.0), 2));
    assert_eq!(found.max_position_embeddings, 256);
    let mut plain = ffn.clone();
    plain["moe_normalize_expert_weights"] = Value::Null;
    let plain = dbrx(attention, plain).unwrap();
    assert_eq!(experts(&plain, 0).routing.normalization, WeightNormalization::None);
    let error = dbrx(json!({"kv_n_heads": 3}), json!({"ffn_hidden_size": "wide"})).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 2, "{error}");
}

fn deepseek(version: u32, changes: Value) -> Value {
    let defaults = json!({
        "kv_lora_rank": 20, "q_lora_rank": null, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    });
    named(&format!("deepseek_v{version}"), &format!("DeepseekV{version}ForCausalLM"), defaults, changes)
}

#[test]
fn deepseek_v2_attends_to_latent_vectors() {
    let found = spec(deepseek(2, json!({"q_lora_rank": 18, "n_shared_experts": 2, "attention_bias": true})));
    let attention = latent(&found);
    assert_eq!((attention.latent_dim, attention.rope.inv_freq.len()), (20, 2));
    assert_eq!((attention.scale, attention.rope.style), (0.25, RopeStyle::Interleaved));
    let prefix = "model.layers.1.self_attn";
    for (name, expected) in [
        ("q_a_proj.bias", &[18][..]),
        ("q_a_layernorm.weight", &[18]),
        ("q_b_proj.weight", &[64, 18]),
        ("kv_a_proj_with_mqa.weight", &[24, 64]),
        ("kv_a_layernorm.weight", &[20]),
        ("kv_b_proj.weight", &[88, 20]),
        ("o_proj.weight", &[64, 40]),
        ("o_proj.bias", &[64]),
    ] {
        assert_eq!(shape(&found, &format!("{prefix}.{name}")), expected, "{name}");
    }
    assert!(matches!(found.layers[0].mlp, MlpSpec::Gated { .. }));
    let layer = experts(&found, 1);
    assert_eq!((layer.routing.groups, layer.routing.scale, &layer.correction), (None, 1.0, &None));
    assert_eq!(shape(&found, "model.layers.1.mlp.shared_experts.down_proj.weight"), [64, 48]);
    let direct = spec(deepseek(2, json!({})));
    assert_eq!((&latent(&direct).q_down, &experts(&direct, 1).shared), (&None, &None));
    assert_eq!(shape(&direct, &format!("{prefix}.q_proj.weight")), [64, 64]);
}

#[test]
fn deepseek_limits_the_choice_to_groups() {
    let groups = json!({
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16,
        "num_hidden_layers": 5, "moe_layer_freq": 2, "first_k_dense_replace": 0,
    });
    let found = spec(deepseek(2, groups.clone()));
    let expected = ExpertGroups { count: 4, num_chosen: 2, rank: GroupRank::Largest };
    assert_eq!((experts(&found, 4).routing.groups, experts(&found, 0).routing.scale), (Some(expected), 16.0));
    assert!(matches!(found.layers[3].mlp, MlpSpec::Gated { .. }));

    let v3 = json!({
        "n_group": 4, "topk_group": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1,
    });
    let found = spec(deepseek(3, v3.clone()));
    let routing = experts(&found, 1).routing;
    assert_eq!((routing.scores, routing.normalization), (RouterScores::Sigmoid, WeightNormalization::Sum));
    let expected = ExpertGroups { count: 4, num_chosen: 3, rank: GroupRank::LargestTwo };
    assert_eq!((routing.groups, routing.scale), (Some(expected), 2.5));
    assert_eq!(shape(&found, "model.layers.1.mlp.gate.e_score_correction_bias"), [8]);
    assert_eq!(found.other_tensors, ["model.layers.2."]);

    let mut bad = v3;
    bad["n_group"] = json!(3);
    let error = refusal(deepseek(3, bad));
    assert_eq!(error, "config.json: the choice of experts: 3 groups of 8 experts, expected a divisor");
    let other_rules = json!({"topk_method": "noaux_tc", "norm_topk_prob": true, "scoring_func": "sigmoid"});
    let error = refusal(deepseek(2, other_rules));
    assert_eq!(error.lines().count(), 3, "{error}");
    let error = refusal(deepseek(3, json!({"kv_lora_rank": 100_000, "qk_rope_head_dim": null})));
    assert_eq!(error.lines().count(), 2, "{error}");
}

#[test]
fn deepseek_with_yarn_scales_its_scores() {
    let yarn = json!({"rope_scaling": {
        "type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    }});
    let found = spec(deepseek(2, yarn));
    let magnitude = 0.1 * 0.707 * 40_f64.ln() + 1.0;
    assert!((f64::from(latent(&found).scale) - 0.25 * magnitude * magnitude).abs() < 1e-6);
    assert_eq!(latent(&found).rope.scale, 1.0);
}
