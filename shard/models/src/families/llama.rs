//! Llama (arXiv:2302.13971, 2307.09288, 2407.21783), as SmolLM2, TinyLlama and many others use it.

use backend::Activation;
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::rope;
use crate::ModelError;
use crate::spec::{
    AttentionSpec, DecoderSpec, LayerSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormKind, NormSpec,
    ResidualSpec,
};

/// Pre-norm layers of rotary grouped-query attention and a gated feed-forward.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let hidden_size = reader.size("hidden_size");
    let eps = reader.number_or("rms_norm_eps", 1e-6) as f32;
    let norm = |prefix: &str| NormSpec { kind: NormKind::Rms, weight: format!("{prefix}.weight"), eps };
    let attention = attention(&mut reader, hidden_size);
    let intermediate_size = reader.size("intermediate_size");
    let activation = activation(&mut reader);
    let mlp_bias = reader.flag_or("mlp_bias", false);
    let layers = (0..reader.num_layers("num_hidden_layers")).map(|index| {
        let prefix = format!("model.layers.{index}");
        let mlp = |name: &str| LinearSpec::new(&format!("{prefix}.mlp.{name}"), mlp_bias);
        LayerSpec {
            residual: ResidualSpec::PreNorm {
                mixer_norm: norm(&format!("{prefix}.input_layernorm")),
                mlp_norm: norm(&format!("{prefix}.post_attention_layernorm")),
            },
            mixer: MixerSpec::Attention(attention(&prefix)),
            mlp: MlpSpec::Gated {
                intermediate_size,
                activation,
                gate_proj: mlp("gate_proj"),
                up_proj: mlp("up_proj"),
                down_proj: mlp("down_proj"),
            },
        }
    });
    let layers = layers.collect();
    let is_tied = reader.flag_or("tie_word_embeddings", false);
    let spec = DecoderSpec {
        vocab_size: reader.size("vocab_size"),
        hidden_size,
        max_position_embeddings: reader.size_or("max_position_embeddings", 2048),
        embed_tokens: "model.embed_tokens.weight".to_owned(),
        layers,
        norm: norm("model.norm"),
        lm_head: if is_tied { LmHeadSpec::Tied } else { LmHeadSpec::Own(LinearSpec::new("lm_head", false)) },
    };
    reader.finish(spec)
}

/// Reads the attention once; the result gives each layer its own tensor names.
fn attention(reader: &mut ConfigReader<'_>, hidden_size: usize) -> impl Fn(&str) -> AttentionSpec + use<> {
    let num_heads = reader.size("num_attention_heads");
    let num_kv_heads = reader.size_or("num_key_value_heads", num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        reader.wrong(format!(
            "num_key_value_heads: found {num_kv_heads}, expected a divisor of num_attention_heads, {num_heads}"
        ));
    }
    let head_dim = reader.head_dim((hidden_size / num_heads).max(1));
    if reader.number_or("partial_rotary_factor", 1.0) != 1.0 {
        reader.wrong("partial_rotary_factor: found another value than 1, which llama does not have");
    }
    let rope = rope::frequencies(reader, head_dim);
    let has_bias = reader.flag_or("attention_bias", false);
    move |prefix| {
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.self_attn.{name}"), has_bias);
        AttentionSpec {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            rope: Some(rope.clone()),
            window: None,
            soft_cap: None,
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: linear("o_proj"),
        }
    }
}

fn activation(reader: &mut ConfigReader<'_>) -> Activation {
    match reader.config().str("hidden_act").unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            reader.wrong(format!(
                "hidden_act: found {other:?}, expected silu, gelu, gelu_new, gelu_pytorch_tanh or relu"
            ));
            Activation::Silu
        }
    }
}
