//! What configurations become, and which are refused how.

use backend::Activation;
use serde_json::{Value, json};

use super::*;
use crate::spec::{LinearSpec, LmHeadSpec, MixerSpec, MlpSpec};

pub(super) fn config(changes: Value) -> ModelConfig {
    let mut raw = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 384,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    });
    for (key, value) in changes.as_object().unwrap() {
        raw[key] = value.clone();
    }
    ModelConfig::new(raw.as_object().unwrap().clone())
}

pub(super) fn spec(changes: Value) -> DecoderSpec {
    decoder_spec(&config(changes)).unwrap()
}

pub(super) fn refusal(changes: Value) -> String {
    decoder_spec(&config(changes)).unwrap_err().to_string()
}

fn inv_freq(changes: Value) -> Vec<f32> {
    let MixerSpec::Attention(attention) = &spec(changes).layers[1].mixer else { panic!("another mixer") };
    attention.rope.clone().unwrap().inv_freq
}

#[test]
fn llama_in_full() {
    let spec = spec(json!({"attention_bias": true, "tie_word_embeddings": true, "head_dim": 24}));
    let MixerSpec::Attention(attention) = &spec.layers[1].mixer else { panic!("another mixer") };
    assert_eq!((attention.num_heads, attention.num_kv_heads, attention.head_dim), (4, 2, 24));
    assert_eq!(attention.scale, 24_f32.sqrt().recip());
    assert_eq!(attention.q_proj, LinearSpec::new("model.layers.1.self_attn.q_proj", true));
    let MlpSpec::Gated { intermediate_size, activation, down_proj, .. } = &spec.layers[0].mlp else {
        panic!()
    };
    assert_eq!((*intermediate_size, *activation), (128, Activation::Silu));
    assert_eq!(*down_proj, LinearSpec::new("model.layers.0.mlp.down_proj", false));
    assert_eq!(spec.lm_head, LmHeadSpec::Tied);
    assert_eq!(spec.norm.eps, 1e-5);
    let tensors = spec.tensors();
    assert_eq!(tensors.len(), 2 + 2 * (2 + 8 + 3));
    let shape = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().shape.clone();
    assert_eq!(shape("model.layers.0.self_attn.o_proj.weight"), [64, 96]);
    assert_eq!(shape("model.layers.0.self_attn.k_proj.bias"), [48]);
}

#[test]
fn defaults_are_those_of_the_library_that_wrote_the_file() {
    let mut bare = config(json!({"head_dim": null, "mlp_bias": null, "attention_bias": null}));
    for key in ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings"] {
        bare.raw.remove(key);
    }
    let spec = decoder_spec(&bare).unwrap();
    let MixerSpec::Attention(attention) = &spec.layers[0].mixer else { panic!("another mixer") };
    assert_eq!((attention.num_kv_heads, attention.head_dim), (4, 16));
    assert_eq!((spec.norm.eps, spec.max_position_embeddings), (1e-6, 2048));
    assert_eq!(attention.q_proj.bias, None);
    assert_eq!(spec.lm_head, LmHeadSpec::Own(LinearSpec::new("lm_head", false)));
}

#[test]
fn rotary_scalings() {
    let plain = inv_freq(json!({"rope_theta": 10000.0}));
    assert_eq!((plain.len(), plain[0]), (8, 1.0));
    assert!((plain[4] - 0.01).abs() < 1e-9);
    assert_eq!(inv_freq(json!({"rope_scaling": {"type": "default"}})), plain);
    let linear = inv_freq(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    assert!(linear.iter().zip(&plain).all(|(scaled, plain)| (scaled * 4.0 - plain).abs() < 1e-9));

    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let scaled = inv_freq(json!({"rope_scaling": llama3}));
    // 64 positions: the first wave turns ten times, the second three times, the third once.
    assert_eq!(scaled[0], plain[0]);
    assert!(scaled[1] < plain[1] && scaled[1] > plain[1] / 8.0);
    assert_eq!(scaled[7], plain[7] / 8.0);
    let mut newer = llama3.clone();
    newer["rope_theta"] = json!(10000.0);
    assert_eq!(inv_freq(json!({"rope_parameters": newer})), scaled);
}

#[test]
fn every_mistake_in_a_scaling_has_a_line() {
    assert_eq!(refusal(json!({"rope_scaling": {"rope_type": "llama3", "factor": 0}})).lines().count(), 5);
}

#[test]
fn relatives_do_not_run_as_llama() {
    let refusal = |architecture: &str, model_type: &str| {
        refusal(json!({"architectures": [architecture], "model_type": model_type}))
    };
    for (architecture, model_type, expected) in [
        ("LlamaForCausalLM", "mistral", "MistralForCausalLM"),
        ("MistralForCausalLM", "llama", "LlamaForCausalLM"),
    ] {
        assert_eq!(
            refusal(architecture, model_type),
            format!(
                "config.json: model_type {model_type:?} with architectures [{architecture:?}], expected {expected}: \
                 choose another model with --model-id"
            )
        );
    }
    let error = refusal("NoSuchForCausalLM", "nosuch");
    assert!(
        error.contains("model_type \"nosuch\" with architectures [\"NoSuchForCausalLM\"] is not supported"),
        "{error}"
    );
    assert!(error.contains(", gemma2, gemma3_text, "), "{error}");
    assert!(decoder_spec(&ModelConfig::default()).is_err());
}

#[test]
fn quantized_checkpoints_are_refused_by_method() {
    let error = refusal(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}));
    assert!(error.contains("quantized checkpoints (gptq) come later"), "{error}");
    decoder_spec(&config(json!({"quantization_config": null}))).unwrap();
}

#[test]
fn every_mistake_is_listed_at_once() {
    let error = refusal(json!({
        "hidden_size": null, "num_attention_heads": "four", "num_hidden_layers": 1e12, "rms_norm_eps": -1,
        "hidden_act": "mish", "num_key_value_heads": 0, "vocab_size": 1u64 << 40, "head_dim": 1_000_000,
    }));
    for key in [
        "hidden_size: missing",
        "num_attention_heads: found \"four\"",
        "num_hidden_layers: found 1000000000000",
        "rms_norm_eps: found -1",
        "hidden_act: found \"mish\"",
        "num_key_value_heads: found 0",
        "vocab_size: found 1099511627776",
        "head_dim: found 1000000",
    ] {
        assert!(error.contains(key), "{key} in {error}");
    }
    assert_eq!(error.lines().count(), 8, "{error}");
    assert!(refusal(json!({"num_key_value_heads": 3})).contains("expected a divisor"));
    assert!(refusal(json!({"head_dim": 15})).contains("expected an even number"));
}

#[test]
fn experts_of_all_layers_together_are_bounded() {
    let mixtral = |layers: u64, experts: u64| {
        refusal(json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": layers,
            "num_local_experts": experts,
        }))
    };
    assert_eq!(
        mixtral(4096, 1024),
        "config.json: num_local_experts: found 1024 in each of 4096 layers, expected at most 131072 in all"
    );
    assert!(mixtral(1, 1 << 20).contains("found 1048576, expected at most 16384"));
}
