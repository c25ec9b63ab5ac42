//! GPT-2 and its descendants: which tensors they read, where their configurations differ, and what is refused.

use std::ops::Range;

use backend::{Activation, RopeStyle};
use serde_json::{Value, json};

use super::*;
use crate::spec::{AttentionSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, ResidualSpec};

const GPT2: [&str; 2] = ["gpt2", "GPT2LMHeadModel"];
const GPT_BIGCODE: [&str; 2] = ["gpt_bigcode", "GPTBigCodeForCausalLM"];
const GPT_NEOX: [&str; 2] = ["gpt_neox", "GPTNeoXForCausalLM"];
const GPTJ: [&str; 2] = ["gptj", "GPTJForCausalLM"];
const CODEGEN: [&str; 2] = ["codegen", "CodeGenForCausalLM"];
const BLOOM: [&str; 2] = ["bloom", "BloomForCausalLM"];
const OPT: [&str; 2] = ["opt", "OPTForCausalLM"];
const MPT: [&str; 2] = ["mpt", "MPTForCausalLM"];
const FALCON: [&str; 2] = ["falcon", "FalconForCausalLM"];

/// A small model of a family under every spelling of the sizes, with changes; null takes a key away.
fn config([model_type, architecture]: [&str; 2], changes: Value) -> ModelConfig {
    let mut raw = json!({
        "model_type": model_type, "architectures": [architecture], "vocab_size": 384,
        "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 3,
        "n_embd": 64, "n_head": 8, "n_layer": 3, "d_model": 64, "n_heads": 8, "n_layers": 3,
        "intermediate_size": 128, "ffn_dim": 128, "rotary_dim": 4,
    });
    for (key, value) in changes.as_object().unwrap() {
        raw[key] = value.clone();
    }
    ModelConfig::new(raw.as_object().unwrap().clone())
}

fn spec(family: [&str; 2], changes: Value) -> DecoderSpec {
    decoder_spec(&config(family, changes)).unwrap()
}

fn refusal(family: [&str; 2], changes: Value) -> String {
    decoder_spec(&config(family, changes)).unwrap_err().to_string()
}

fn attention(spec: &DecoderSpec, layer: usize) -> &AttentionSpec {
    let MixerSpec::Attention(attention) = &spec.layers[layer].mixer else { panic!() };
    attention
}

/// Where the second query, key and value head of the first layer are in their tensor.
fn second_heads(spec: &DecoderSpec) -> [Range<usize>; 3] {
    let AttentionSpec { head_dim, q_proj, k_proj, v_proj, .. } = attention(spec, 0);
    [q_proj, k_proj, v_proj].map(|linear| only_run(linear, *head_dim..2 * head_dim))
}

/// The one place of outputs that lie together.
fn only_run(linear: &LinearSpec, outputs: Range<usize>) -> Range<usize> {
    let mut runs = linear.row_runs(outputs);
    assert_eq!(runs.len(), 1, "{runs:?}");
    runs.remove(0)
}

fn shape(spec: &DecoderSpec, name: &str) -> Vec<usize> {
    spec.tensors().into_iter().find(|tensor| tensor.name == name).unwrap().shape
}

fn plain_mlp(spec: &DecoderSpec) -> (usize, Activation) {
    match &spec.layers[0].mlp {
        MlpSpec::Plain { intermediate_size, activation, .. } => (*intermediate_size, *activation),
        other => panic!("{other:?}"),
    }
}

fn is_parallel(spec: &DecoderSpec) -> bool {
    matches!(spec.layers[0].residual, ResidualSpec::Parallel { .. })
}

#[test]
fn gpt2_stores_matrices_the_other_way_round() {
    let found = spec(GPT2, json!({"n_positions": 128}));
    assert_eq!(shape(&found, "transformer.h.0.attn.c_attn.weight"), [64, 192]);
    assert_eq!(shape(&found, "transformer.h.0.attn.c_attn.bias"), [192]);
    assert_eq!(shape(&found, "transformer.h.2.mlp.c_proj.weight"), [256, 64]);
    assert_eq!(shape(&found, "transformer.wpe.weight"), [128, 64]);
    assert_eq!(second_heads(&found), [8..16, 72..80, 136..144]);
    assert_eq!(
        (plain_mlp(&found), found.max_position_embeddings, &found.lm_head),
        ((256, Activation::GeluTanh), 128, &LmHeadSpec::Tied)
    );
    let by_layer = spec(GPT2, json!({"scale_attn_weights": false, "scale_attn_by_inverse_layer_idx": true}));
    assert_eq!((attention(&by_layer, 0).scale, attention(&by_layer, 1).scale), (1.0, 0.5));
    let own = spec(GPT2, json!({"tie_word_embeddings": false}));
    assert_eq!(own.lm_head, LmHeadSpec::Own(LinearSpec::new("lm_head", false)));
    let error = refusal(GPT2, json!({"add_cross_attention": true, "n_head": 7}));
    assert_eq!(
        error.lines().collect::<Vec<_>>(),
        ["config.json: add_cross_attention: found true, which comes later, expected false"],
        "what may follow from a mistake is no second one"
    );
    assert!(
        refusal(GPT2, json!({"n_head": 7})).contains("n_head: found 7, expected a divisor of n_embd, 64")
    );
}

#[test]
fn gpt_bigcode_has_one_kv_head_or_interleaved_ones() {
    let one = spec(GPT_BIGCODE, json!({}));
    assert_eq!(shape(&one, "transformer.h.0.attn.c_attn.weight"), [80, 64]);
    assert_eq!(attention(&one, 0).num_kv_heads, 1);
    assert_eq!(only_run(&attention(&one, 0).v_proj, 0..8), 72..80);
    let many = spec(GPT_BIGCODE, json!({"multi_query": false}));
    assert_eq!(second_heads(&many), [24..32, 32..40, 40..48]);
}

#[test]
fn gpt_neox_turns_a_part_of_each_head() {
    let rope = |changes| attention(&spec(GPT_NEOX, changes), 0).rope.clone().unwrap();
    let old = rope(json!({"rotary_pct": 0.5, "rotary_emb_base": 100.0}));
    assert_eq!((old.inv_freq.as_slice(), old.style), ([1.0, 0.1].as_slice(), RopeStyle::Half));
    assert_eq!(rope(json!({"partial_rotary_factor": 0.5, "rope_theta": 100.0})), old);
    assert_eq!(rope(json!({})).inv_freq.len(), 1, "the library's default, a quarter");
    let found = spec(GPT_NEOX, json!({"hidden_act": "gelu_fast"}));
    assert_eq!(second_heads(&found), [24..32, 32..40, 40..48]);
    assert_eq!((plain_mlp(&found), is_parallel(&found)), ((128, Activation::GeluTanh), true));
    assert_eq!(found.lm_head, LmHeadSpec::Own(LinearSpec::new("embed_out", false)));
    let other = spec(GPT_NEOX, json!({"use_parallel_residual": false, "attention_bias": false}));
    assert!(!is_parallel(&other) && attention(&other, 0).o_proj.bias.is_none());
    assert_eq!(shape(&other, "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"), [128]);
}

#[test]
fn gptj_and_codegen_turn_neighbours() {
    let found = spec(GPTJ, json!({}));
    let rope = attention(&found, 0).rope.clone().unwrap();
    assert_eq!((rope.inv_freq.as_slice(), rope.style), ([1.0, 0.01].as_slice(), RopeStyle::Interleaved));
    assert!(matches!(found.layers[0].residual, ResidualSpec::Parallel { mlp_norm: None, .. }));
    assert_eq!(attention(&found, 0).q_proj, LinearSpec::new("transformer.h.0.attn.q_proj", false));
    assert_eq!(found.lm_head, LmHeadSpec::Own(LinearSpec::new("lm_head", true)));
    let LmHeadSpec::Own(tied) = spec(GPTJ, json!({"tie_word_embeddings": true})).lm_head else { panic!() };
    assert_eq!(
        (tied.weight.as_str(), tied.bias.as_deref()),
        ("transformer.wte.weight", Some("lm_head.bias"))
    );
    // Two heads a group: queries, values, keys.
    let codegen = spec(CODEGEN, json!({}));
    assert_eq!(second_heads(&codegen), [8..16, 40..48, 24..32]);
    let third_key = only_run(&attention(&codegen, 0).k_proj, 16..24);
    assert_eq!(third_key, 80..88, "the third head is of the second group");
    for (found, expected) in [
        (json!(null), "rotary_dim: found null"),
        (json!(10), "rotary_dim: found 10, expected an even number of a head's 8 elements"),
        (json!(1 << 24), "rotary_dim: found 16777216, expected"),
    ] {
        let error = refusal(GPTJ, json!({"rotary_dim": found, "n_layer": 4096}));
        assert!(error.contains(expected) && error.lines().count() == 1, "{error}");
    }
    let error = refusal(CODEGEN, json!({"n_head": 2}));
    assert!(
        error.contains("n_head: found 2, expected a multiple of 4") && error.lines().count() == 1,
        "{error}"
    );
}

#[test]
fn heads_wider_than_any_are_refused() {
    let error = refusal(GPT_NEOX, json!({"hidden_size": 1 << 22, "num_attention_heads": 1}));
    assert_eq!(error, "config.json: head_dim: found 4194304, expected an even number up to 4096");
}

#[test]
fn bloom_has_linear_biases_and_a_norm_of_the_embedding() {
    let old = json!({"n_embed": 64, "hidden_size": null, "n_head": null, "n_layer": null});
    let found = spec(BLOOM, old);
    assert_eq!(found.layers.len(), 3);
    let alibi = attention(&found, 2).alibi.unwrap();
    assert_eq!((alibi.max_bias, alibi.multiplier), (8.0, 1.0));
    assert_eq!(shape(&found, "transformer.word_embeddings_layernorm.bias"), [64]);
    assert_eq!(second_heads(&found), [24..32, 32..40, 40..48]);
    assert_eq!((plain_mlp(&found), &found.lm_head), ((256, Activation::GeluTanh), &LmHeadSpec::Tied));
    let error = refusal(BLOOM, json!({"apply_residual_connection_post_layernorm": true}));
    assert!(error.contains("apply_residual_connection_post_layernorm: found true"), "{error}");
}

#[test]
fn opt_begins_its_positions_in_the_third_row() {
    let found = spec(OPT, json!({"max_position_embeddings": 100}));
    let positions = found.embedding.positions.clone().unwrap();
    assert_eq!((positions.rows, positions.offset, found.max_position_embeddings), (102, 2, 100));
    assert_eq!(plain_mlp(&found), (128, Activation::Relu));
    assert!(attention(&found, 0).q_proj.bias.is_some());
    assert!(attention(&spec(OPT, json!({"enable_bias": false})), 0).q_proj.bias.is_none());
    let of_350m = json!({"do_layer_norm_before": false, "word_embed_proj_dim": 32});
    let found = spec(OPT, of_350m);
    let last = found.layers.len() - 1;
    assert_eq!(found.norm.weight, format!("model.decoder.layers.{last}.final_layer_norm.weight"));
    assert!(matches!(found.layers[last].residual, ResidualSpec::PostNorm { mlp: None, .. }));
    assert!(matches!(found.layers[0].residual, ResidualSpec::PostNorm { mlp: Some(_), .. }));
    assert_eq!(shape(&found, "model.decoder.embed_tokens.weight")[1..], [32]);
    assert_eq!(shape(&found, "model.decoder.project_in.weight"), [64, 32]);
    assert_eq!(shape(&found, "model.decoder.project_out.weight"), [32, 64]);
    assert_eq!(shape(&found, "model.decoder.embed_positions.weight")[1..], [64]);
}

#[test]
fn mpt_reads_an_object_of_its_own() {
    let nested = json!({"alibi_bias_max": 16, "clip_qkv": 6, "softmax_scale": 0.5});
    let found = spec(MPT, json!({"attn_config": nested, "logit_scale": "inv_sqrt_d_model"}));
    let layer = attention(&found, 0);
    assert_eq!((layer.alibi.unwrap().max_bias, layer.clip_qkv, layer.scale), (16.0, Some(6.0), 0.5));
    assert_eq!((found.logits_multiplier, &found.embedding.positions), (0.125, &None));
    assert!(found.tensors().iter().all(|tensor| !tensor.name.ends_with(".bias")));
    let table = spec(MPT, json!({"attn_config": {"alibi": false}, "max_seq_len": 100, "logit_scale": null}));
    assert_eq!((attention(&table, 0).alibi, table.logits_multiplier), (None, 1.0));
    assert_eq!(shape(&table, "transformer.wpe.weight"), [100, 64]);
    let error = refusal(
        MPT,
        json!({
            "attn_config": {
                "attn_type": "grouped_query_attention", "prefix_lm": true, "qk_ln": true, "rope": true, "alibi": false,
                "sliding_window_size": 8,
            },
            "ffn_config": {"ffn_type": "mptglu"}, "norm_type": "rmsnorm", "no_bias": false, "logit_scale": "half",
            "learned_pos_emb": false, "tie_word_embeddings": false,
        }),
    );
    for key in [
        "attn_config.attn_type: found \"grouped_query_attention\", expected multihead_attention",
        "attn_config.prefix_lm: found true",
        "attn_config.qk_ln: found true",
        "attn_config.rope: found true",
        "attn_config.sliding_window_size: found 8",
        "ffn_config.ffn_type: found \"mptglu\", expected mptmlp",
        "norm_type: found \"rmsnorm\", expected low_precision_layernorm or layernorm",
        "no_bias: found false",
        "logit_scale: found \"half\"",
        "learned_pos_emb: found false",
        "tie_word_embeddings: found false",
    ] {
        assert!(error.contains(key), "{key} in {error}");
    }
    assert_eq!(error.lines().count(), 11, "{error}");
    assert!(refusal(MPT, json!({"attn_config": 3})).contains("attn_config: found 3, expected an object"));
}

/// The layouts of queries, keys and values, by the first rows of their second heads.
#[test]
fn falcon_has_three_layouts() {
    let old =
        spec(FALCON, json!({"multi_query": false, "parallel_attn": false, "alibi": true, "bias": true}));
    assert_eq!(second_heads(&old), [24..32, 32..40, 40..48]);
    assert!(!is_parallel(&old) && attention(&old, 0).rope.is_none() && attention(&old, 0).alibi.is_some());
    let one = spec(FALCON, json!({"num_kv_heads": 8}));
    assert_eq!((attention(&one, 0).num_kv_heads, is_parallel(&one)), (1, true), "7B's files name all heads");
    assert_eq!(shape(&one, "transformer.h.0.self_attention.query_key_value.weight"), [80, 64]);
    let grouped = json!({"new_decoder_architecture": true, "num_kv_heads": 2});
    let two_norms = spec(FALCON, grouped.clone());
    // Four query heads, a key and a value head in each group.
    assert_eq!(second_heads(&two_norms), [8..16, 80..88, 88..96]);
    assert_eq!(shape(&two_norms, "transformer.h.0.ln_mlp.weight"), [64]);
    let mut of_11b = grouped;
    of_11b["num_ln_in_parallel_attn"] = json!(1);
    of_11b["tie_word_embeddings"] = json!(false);
    let of_11b = spec(FALCON, of_11b);
    assert!(matches!(of_11b.layers[0].residual, ResidualSpec::Parallel { mlp_norm: None, .. }));
    assert_eq!(of_11b.lm_head, LmHeadSpec::Own(LinearSpec::new("lm_head", false)));
}

#[test]
fn the_first_falcon_files_mean_the_same() {
    let sizes =
        json!({"num_attention_heads": null, "num_hidden_layers": null, "hidden_size": null, "n_embed": 64});
    let with = |changes: Value| {
        let mut all = sizes.clone();
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        all
    };
    let grouped = spec(["RefinedWeb", "RWForCausalLM"], with(json!({"n_head_kv": 2, "parallel_attn": true})));
    assert_eq!(grouped, spec(FALCON, json!({"new_decoder_architecture": true, "num_kv_heads": 2})));
    let of_7b = ["RefinedWebModel", "RWForCausalLM"];
    let one = spec(of_7b, with(json!({"multi_query": true, "parallel_attn": true})));
    assert_eq!(one, spec(FALCON, json!({})));
    let bare = spec(of_7b, with(json!({})));
    assert_eq!(bare, spec(FALCON, json!({"multi_query": false, "parallel_attn": false})));
}

#[test]
fn falcons_that_do_not_exist_are_refused() {
    for (changes, expected) in [
        (json!({"new_decoder_architecture": true, "parallel_attn": false}), "parallel_attn: found false"),
        (
            json!({"new_decoder_architecture": true, "num_kv_heads": 3}),
            "num_kv_heads: found 3, expected a divisor",
        ),
        (json!({"new_decoder_architecture": true, "num_ln_in_parallel_attn": 3}), "found 3, expected 1 or 2"),
        (json!({"num_ln_in_parallel_attn": 2}), "found 2, expected 1 without new_decoder_architecture"),
        (
            json!({"multi_query": false, "num_kv_heads": 4}),
            "num_kv_heads: found 4, expected num_attention_heads, 8",
        ),
        (
            json!({"apply_residual_connection_post_layernorm": true}),
            "apply_residual_connection_post_layernorm: found",
        ),
    ] {
        let error = refusal(FALCON, changes);
        assert!(error.contains(expected) && error.lines().count() == 1, "{expected} in {error}");
    }
}
