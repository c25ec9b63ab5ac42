//! Cohere's Command R and Aya: attention and feed-forward side by side after one LayerNorm without a bias, neighbours of a head
//! turned together, logits tied and multiplied.

use backend::RopeStyle;
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, add_qk_norms};
use super::rope;
use crate::ModelError;
use crate::spec::{DecoderSpec, NormSpec, QkNormScope, ResidualSpec};

/// Llama's parts side by side. Command R+ has a norm of queries and keys besides, each head with its own weights.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        mlp_bias: false,
        eps: ("layer_norm_eps", 1e-5),
        is_tied: true,
        max_position_embeddings: 8192,
        rope: |reader, head_dim| {
            let mut frequencies = rope::frequencies(reader, head_dim);
            frequencies.style = RopeStyle::Interleaved;
            frequencies
        },
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let layer_norm = |prefix: &str, eps: f32| NormSpec::layer(prefix, false, eps);
    if reader.flag_or("use_qk_norm", false) {
        add_qk_norms(&mut spec, QkNormScope::HeadWithOwnWeight, layer_norm);
    }
    let eps = spec.norm.eps;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let norm = layer_norm(&format!("model.layers.{index}.input_layernorm"), eps);
        layer.residual = ResidualSpec::Parallel { norm, mlp_norm: None };
    }
    spec.norm = layer_norm("model.norm", eps);
    spec.logits_multiplier = reader.number_or("logit_scale", 0.0625) as f32;
    reader.finish(spec)
}
