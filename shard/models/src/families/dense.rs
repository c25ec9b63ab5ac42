//! The decoder that most families vary: pre-norm layers of rotary grouped-query attention and a gated feed-forward, with
//! the tensor names of transformers' Llama.

use backend::{Activation, RopeFrequencies};

use super::config_reader::ConfigReader;
use super::rope;
use crate::spec::{
    AttentionSpec, BranchSpec, DecoderSpec, EmbeddingSpec, LatentAttentionSpec, LayerSpec, LinearSpec,
    LmHeadSpec, MixerSpec, MlpSpec, NormSpec, QkNormScope, QkNormSpec, ResidualSpec,
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
    /// Key and value heads; none: as many as query heads.
    pub(super) num_kv_heads: Option<usize>,
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
            num_kv_heads: None,
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
                residual: ResidualSpec::pre_norm(
                    NormSpec::rms(&format!("{prefix}.input_layernorm"), eps),
                    NormSpec::rms(&format!("{prefix}.post_attention_layernorm"), eps),
                ),
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
            embedding: EmbeddingSpec::tokens("model.embed_tokens.weight"),
            layers,
            norm: NormSpec::rms("model.norm", eps),
            lm_head: LmHeadSpec::new(is_tied),
            logits_multiplier: 1.0,
            logits_soft_cap: None,
            other_tensors: Vec::new(),
        }
    }

    /// Reads the attention once; the result gives each layer its own tensor names.
    fn attention(
        &self,
        reader: &mut ConfigReader<'_>,
        hidden_size: usize,
    ) -> impl Fn(&str) -> AttentionSpec + use<> {
        let num_heads = reader.size("num_attention_heads");
        let num_kv_heads = reader.size_or("num_key_value_heads", self.num_kv_heads.unwrap_or(num_heads));
        // What follows from a mistake is no second one.
        if !reader.has_mistakes() && !num_heads.is_multiple_of(num_kv_heads) {
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
                clip_qkv: None,
                qk_norm: None,
                rope: Some(rope.clone()),
                alibi: None,
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
    spec.layers.iter_mut().filter_map(|layer| match &mut layer.mixer {
        MixerSpec::Attention(attention) => Some(attention),
        MixerSpec::LatentAttention(_) => None,
    })
}

/// Adds norms over query and key heads, with the tensor names of Qwen3.
pub(super) fn add_head_norms(spec: &mut DecoderSpec) {
    add_qk_norms(spec, QkNormScope::Head, NormSpec::rms);
}

/// Adds norms of queries and keys, with the tensor names of Qwen3.
pub(super) fn add_qk_norms(spec: &mut DecoderSpec, scope: QkNormScope, norm: fn(&str, f32) -> NormSpec) {
    let eps = spec.norm.eps;
    for (index, attention) in attentions(spec).enumerate() {
        let norm = |name: &str| norm(&format!("model.layers.{index}.self_attn.{name}"), eps);
        attention.qk_norm = Some(QkNormSpec { scope, q: norm("q_norm"), k: norm("k_norm") });
    }
}

/// Makes gate and up one tensor, with Phi-3's name for it.
pub(super) fn fuse_gate_and_up(spec: &mut DecoderSpec) {
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let prefix = format!("model.layers.{index}.mlp.gate_up_proj");
        if let MlpSpec::Gated { intermediate_size, gate_proj, up_proj, .. } = &mut layer.mlp {
            [*gate_proj, *up_proj] = LinearSpec::fused(&prefix, false, [*intermediate_size; 2]);
        }
    }
}

/// The branches of all layers whose parts follow one another, to be changed.
pub(super) fn branches(spec: &mut DecoderSpec) -> impl Iterator<Item = &mut BranchSpec> {
    spec.layers.iter_mut().flat_map(|layer| match &mut layer.residual {
        ResidualSpec::Sequential { mixer, mlp } => vec![mixer, mlp],
        ResidualSpec::PostNorm { .. } | ResidualSpec::Parallel { .. } => Vec::new(),
    })
}

/// Every norm there is, to be changed.
pub(super) fn norms(spec: &mut DecoderSpec) -> impl Iterator<Item = &mut NormSpec> {
    let of_layers = spec.layers.iter_mut().flat_map(|layer| {
        let mut norms = Vec::new();
        match &mut layer.mixer {
            MixerSpec::Attention(AttentionSpec { qk_norm, .. }) => {
                norms.extend(qk_norm.iter_mut().flat_map(|norm| [&mut norm.q, &mut norm.k]));
            }
            MixerSpec::LatentAttention(LatentAttentionSpec { q_down, kv_down, .. }) => {
                norms.extend(q_down.iter_mut().chain([kv_down]).map(|down| &mut down.norm));
            }
        }
        match &mut layer.residual {
            ResidualSpec::Sequential { mixer, mlp } => {
                let branches = [&mut mixer.norm, &mut mixer.post_norm, &mut mlp.norm, &mut mlp.post_norm];
                norms.extend(branches.into_iter().flatten());
            }
            ResidualSpec::PostNorm { mixer, mlp } => norms.extend(mlp.iter_mut().chain([mixer])),
            ResidualSpec::Parallel { norm, mlp_norm } => norms.extend(mlp_norm.iter_mut().chain([norm])),
        }
        norms
    });
    of_layers.chain([&mut spec.norm])
}

/// The activation that `key` names.
pub(super) fn activation(reader: &mut ConfigReader<'_>, key: &str, default: Activation) -> Activation {
    match reader.config().str(key) {
        None => default,
        Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Activation::GeluTanh,
        Some("relu") => Activation::Relu,
        Some(other) => {
            reader.wrong(format!(
                "{key}: found {other:?}, expected silu, gelu, gelu_new, gelu_pytorch_tanh or relu"
            ));
            default
        }
    }
}
