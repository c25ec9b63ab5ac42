//! What GPT-2 and its descendants share: attention with a KV head for each query head, a feed-forward without a gate, LayerNorms.

use backend::Activation;

use super::config_reader::ConfigReader;
use crate::spec::{
    AlibiSpec, AttentionSpec, DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, LmHeadSpec, MlpSpec,
    NormSpec,
};

/// Sizes of a decoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_layers: usize,
    pub(super) eps: f32,
}

/// The keys of a family's sizes.
pub(super) struct SizeKeys {
    pub(super) hidden_size: &'static str,
    pub(super) num_heads: &'static str,
    pub(super) num_layers: &'static str,
    /// May be absent: four times the width.
    pub(super) intermediate_size: &'static str,
    pub(super) eps: &'static str,
}

/// GPT-2's spellings, which many took over.
pub(super) const GPT2_KEYS: SizeKeys = SizeKeys {
    hidden_size: "n_embd",
    num_heads: "n_head",
    num_layers: "n_layer",
    intermediate_size: "n_inner",
    eps: "layer_norm_epsilon",
};

impl Sizes {
    /// Reads them; every query head has its KV head.
    pub(super) fn read(reader: &mut ConfigReader<'_>, keys: &SizeKeys) -> Self {
        let hidden_size = reader.size(keys.hidden_size);
        let num_heads = reader.size(keys.num_heads);
        if !hidden_size.is_multiple_of(num_heads) && !reader.has_mistakes() {
            reader.wrong(format!(
                "{}: found {num_heads}, expected a divisor of {}, {hidden_size}",
                keys.num_heads, keys.hidden_size
            ));
        }
        Self {
            vocab_size: reader.size("vocab_size"),
            hidden_size,
            num_heads,
            num_kv_heads: num_heads,
            head_dim: (hidden_size / num_heads).max(1),
            intermediate_size: reader.size_or(keys.intermediate_size, 4 * hidden_size),
            num_layers: reader.num_layers(keys.num_layers),
            eps: reader.number_or(keys.eps, 1e-5) as f32,
        }
    }

    /// Causal attention without positions, to be changed.
    pub(super) fn attention(
        &self,
        [q_proj, k_proj, v_proj]: [LinearSpec; 3],
        o_proj: LinearSpec,
    ) -> AttentionSpec {
        AttentionSpec {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            clip_qkv: None,
            qk_norm: None,
            rope: None,
            alibi: None,
            window: None,
            soft_cap: None,
            q_proj,
            k_proj,
            v_proj,
            o_proj,
        }
    }

    /// Queries, keys and values of a tensor in which every head has its three parts side by side.
    pub(super) fn qkv_by_head(&self, prefix: &str, has_bias: bool) -> [LinearSpec; 3] {
        LinearSpec::interleaved(prefix, has_bias, [self.head_dim; 3], self.num_heads)
    }

    /// A feed-forward without a gate.
    pub(super) fn mlp(&self, activation: Activation, up_proj: LinearSpec, down_proj: LinearSpec) -> MlpSpec {
        MlpSpec::Plain { intermediate_size: self.intermediate_size, activation, up_proj, down_proj }
    }

    /// The decoder of these layers, its logits from the embedding.
    pub(super) fn decoder(
        &self,
        embedding: EmbeddingSpec,
        layers: Vec<LayerSpec>,
        norm: NormSpec,
        max_position_embeddings: usize,
    ) -> DecoderSpec {
        DecoderSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            max_position_embeddings,
            embedding,
            layers,
            norm,
            lm_head: LmHeadSpec::Tied,
            logits_multiplier: 1.0,
            logits_soft_cap: None,
            other_tensors: Vec::new(),
        }
    }
}

/// The slopes of the paper.
pub(super) const ALIBI: AlibiSpec = AlibiSpec { max_bias: 8.0, multiplier: 1.0 };

/// Refuses a switch whose other position would compute something else.
pub(super) fn expect_flag(reader: &mut ConfigReader<'_>, key: &str, expected: bool) {
    if reader.flag_or(key, expected) != expected {
        reader.wrong(format!("{key}: found {}, which comes later, expected {expected}", !expected));
    }
}
