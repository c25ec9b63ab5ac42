//! The decoder that most families vary: pre-norm layers of rotary grouped-query attention and a gated feed-forward, with
//! the tensor names of transformers' Llama.

use backend::{Activation, RopeFrequencies};

use super::config_reader::ConfigReader;
use super::rope;
use crate::spec::{
    AttentionSpec, BranchSpec, DecoderSpec, LayerSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormKind,
    NormSpec, ResidualSpec,
};

/// What a family decides, or takes for granted where config.json is silent.
pub(super) struct Dense {
    /// Queries, keys and values have biases.
    pub(super) qkv_bias: bool,
    /// The attention's projection out has a bias.
    pub(super) o_bias: bool,
    /// The feed-forward's projections have biases.
    pub(super) mlp_bias: bool,
    /// Key and default of the norms' epsilon.
    pub(super) eps: (&'static str, f64),
    /// Reads the rotary embedding of heads of so many elements.
    pub(super) rope: fn(&mut ConfigReader<'_>, usize) -> RopeFrequencies,
    /// Elements of a head; none: `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<usize>,
    /// On the gate.
    pub(super) activation: Activation,
    /// Whether the logits come from the embedding.
    pub(super) is_tied: bool,
    /// Longest sequence.
    pub(super) max_position_embeddings: usize,
}

impl Dense {
    /// As Llama has it: biases, activation and tying as config.json says.
    pub(super) fn llama(reader: &mut ConfigReader<'_>) -> Self {
        let attention_bias = reader.flag_or("attention_bias", false);
        Self {
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            mlp_bias: reader.flag_or("mlp_bias", false),
            eps: ("rms_norm_eps", 1e-6),
            rope: rope::frequencies,
            head_dim: None,
            activation: activation(reader, "hidden_act", Activation::Silu),
            is_tied: false,
            max_position_embeddings: 2048,
        }
    }

    /// Reads the rest. Families change the result where they differ.
    pub(super) fn spec(&self, reader: &mut ConfigReader<'_>) -> DecoderSpec {
        let hidden_size = reader.size("hidden_size");
        let eps = reader.number_or(self.eps.0, self.eps.1) as f32;
        let attention = self.attention(reader, hidden_size);
        let intermediate_size = reader.size("intermediate_size");
        let layers = (0..reader.num_layers("num_hidden_layers")).map(|index| {
            let prefix = format!("model.layers.{index}");
            let mlp = |name: &str| LinearSpec::new(&format!("{prefix}.mlp.{name}"), self.mlp_bias);
            LayerSpec {
                residual: ResidualSpec::Sequential {
                    mixer: branch(rms_norm(&format!("{prefix}.input_layernorm"), eps)),
                    mlp: branch(rms_norm(&format!("{prefix}.post_attention_layernorm"), eps)),
                },
                mixer: MixerSpec::Attention(attention(&prefix)),
                mlp: MlpSpec::Gated {
                    intermediate_size,
                    activation: self.activation,
                    gate_proj: mlp("gate_proj"),
                    up_proj: mlp("up_proj"),
                    down_proj: mlp("down_proj"),
                },
            }
        });
        let layers = layers.collect();
        let is_tied = reader.flag_or("tie_word_embeddings", self.is_tied);
        DecoderSpec {
            vocab_size: reader.size("vocab_size"),
            hidden_size,
            max_position_embeddings: reader.size_or("max_position_embeddings", self.max_position_embeddings),
            embed_tokens: "model.embed_tokens.weight".to_owned(),
            embedding_multiplier: 1.0,
            layers,
            norm: rms_norm("model.norm", eps),
            lm_head: if is_tied {
                LmHeadSpec::Tied
            } else {
                LmHeadSpec::Own(LinearSpec::new("lm_head", false))
            },
            logits_multiplier: 1.0,
            logits_soft_cap: None,
        }
    }

    /// Reads the attention once; the result gives each layer its own tensor names.
    fn attention(
        &self,
        reader: &mut ConfigReader<'_>,
        hidden_size: usize,
    ) -> impl Fn(&str) -> AttentionSpec + use<> {
        let num_heads = reader.size("num_attention_heads");
        let num_kv_heads = reader.size_or("num_key_value_heads", num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            reader.wrong(format!(
                "num_key_value_heads: found {num_kv_heads}, expected a divisor of num_attention_heads, {num_heads}"
            ));
        }
        let head_dim = reader.head_dim(self.head_dim.unwrap_or((hidden_size / num_heads).max(1)));
        let rope = (self.rope)(reader, head_dim);
        let (qkv_bias, o_bias) = (self.qkv_bias, self.o_bias);
        move |prefix| {
            let linear =
                |name: &str, has_bias| LinearSpec::new(&format!("{prefix}.self_attn.{name}"), has_bias);
            AttentionSpec {
                num_heads,
                num_kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                q_norm: None,
                k_norm: None,
                rope: Some(rope.clone()),
                window: None,
                soft_cap: None,
                q_proj: linear("q_proj", qkv_bias),
                k_proj: linear("k_proj", qkv_bias),
                v_proj: linear("v_proj", qkv_bias),
                o_proj: linear("o_proj", o_bias),
            }
        }
    }
}

/// The attentions of all layers, to be changed.
pub(super) fn attentions(spec: &mut DecoderSpec) -> impl Iterator<Item = &mut AttentionSpec> {
    spec.layers.iter_mut().map(|layer| {
        let MixerSpec::Attention(attention) = &mut layer.mixer;
        attention
    })
}

/// A branch with a norm before it.
fn branch(norm: NormSpec) -> BranchSpec {
    BranchSpec { norm, post_norm: None, multiplier: 1.0 }
}

/// Adds norms over query and key heads, with the tensor names of Qwen3.
pub(super) fn add_head_norms(spec: &mut DecoderSpec) {
    let eps = spec.norm.eps;
    for (index, attention) in attentions(spec).enumerate() {
        let norm = |name: &str| Some(rms_norm(&format!("model.layers.{index}.self_attn.{name}"), eps));
        (attention.q_norm, attention.k_norm) = (norm("q_norm"), norm("k_norm"));
    }
}

/// The branches of all layers, to be changed.
pub(super) fn branches(spec: &mut DecoderSpec) -> impl Iterator<Item = &mut BranchSpec> {
    spec.layers.iter_mut().flat_map(|layer| {
        let ResidualSpec::Sequential { mixer, mlp } = &mut layer.residual;
        [mixer, mlp]
    })
}

/// Every norm there is, to be changed.
pub(super) fn norms(spec: &mut DecoderSpec) -> impl Iterator<Item = &mut NormSpec> {
    let of_layers = spec.layers.iter_mut().flat_map(|layer| {
        let ResidualSpec::Sequential { mixer, mlp } = &mut layer.residual;
        let MixerSpec::Attention(attention) = &mut layer.mixer;
        let optional =
            [&mut mixer.post_norm, &mut mlp.post_norm, &mut attention.q_norm, &mut attention.k_norm];
        optional.into_iter().flatten().chain([&mut mixer.norm, &mut mlp.norm])
    });
    of_layers.chain([&mut spec.norm])
}

/// RMSNorm with the weight `PREFIX.weight`.
pub(super) fn rms_norm(prefix: &str, eps: f32) -> NormSpec {
    NormSpec { kind: NormKind::Rms, weight: format!("{prefix}.weight"), bias: None, weight_offset: 0.0, eps }
}

/// The activation that `key` names.
pub(super) fn activation(reader: &mut ConfigReader<'_>, key: &str, default: Activation) -> Activation {
    match reader.config().str(key) {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
        Some("relu") => Activation::Relu,
        Some(other) => {
            reader.wrong(format!(
                "{key}: found {other:?}, expected silu, gelu, gelu_new, gelu_pytorch_tanh or relu"
            ));
            default
        }
    }
}
