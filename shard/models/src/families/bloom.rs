//! BLOOM (arXiv:2211.05100): linear biases instead of positions, a LayerNorm right after the embedding, queries, keys and values of
//! each head side by side.

use backend::Activation;
use hub::ModelConfig;

use super::classic::{ALIBI, SizeKeys, Sizes, expect_flag, lm_head};
use super::config_reader::ConfigReader;
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, ResidualSpec};

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "hidden_size",
    num_heads: "n_head",
    num_layers: "n_layer",
    // Not a key of the family, so always four times the width.
    intermediate_size: "n_inner",
    eps: "layer_norm_epsilon",
};

/// The classic decoder with linear biases.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let names =
        [("hidden_size", "n_embed"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")];
    let config = respelled(config, &names);
    let mut reader = ConfigReader::new(&config);
    expect_flag(&mut reader, "apply_residual_connection_post_layernorm", false);
    let sizes = Sizes::read(&mut reader, &KEYS);
    let norm = |prefix: &str| NormSpec::layer(prefix, true, sizes.eps);
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("transformer.h.{index}");
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), true);
        let qkv = sizes.qkv_by_head(&format!("{prefix}.self_attention.query_key_value"), true);
        let mut attention = sizes.attention(qkv, linear("self_attention.dense"));
        attention.alibi = Some(ALIBI);
        LayerSpec {
            residual: ResidualSpec::pre_norm(
                norm(&format!("{prefix}.input_layernorm")),
                norm(&format!("{prefix}.post_attention_layernorm")),
            ),
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(Activation::GeluTanh, linear("mlp.dense_h_to_4h"), linear("mlp.dense_4h_to_h")),
        }
    });
    let layers = layers.collect();
    let embedding = EmbeddingSpec {
        norm: Some(norm("transformer.word_embeddings_layernorm")),
        ..EmbeddingSpec::tokens("transformer.word_embeddings.weight")
    };
    // Biases have no end; this is what the models were trained with.
    let longest = reader.size_or("seq_length", 2048);
    let mut spec = sizes.decoder(embedding, layers, norm("transformer.ln_f"), longest);
    spec.lm_head = lm_head(&mut reader, "lm_head", true);
    reader.finish(spec)
}
