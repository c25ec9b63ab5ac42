//! StableLM 2 (arXiv:2402.17834): Llama with LayerNorm, turning a quarter of each head; the 12B model has a norm for each head of
//! queries and keys, and attention and feed-forward side by side.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions, norms};
use super::rope;
use crate::ModelError;
use crate::spec::{
    BranchSpec, DecoderSpec, HEAD_NUMBER, NormKind, NormSpec, QkNormScope, QkNormSpec, ResidualSpec,
};

/// Llama with LayerNorms.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let has_head_norms = reader.flag_or("qk_layernorm", false);
    let is_parallel = reader.flag_or("use_parallel_residual", false);
    let dense = Dense {
        qkv_bias: reader.flag_or("use_qkv_bias", false),
        o_bias: false,
        mlp_bias: false,
        eps: ("layer_norm_eps", 1e-5),
        rope: |reader, head_dim| rope::partial_or(reader, head_dim, 0.25),
        max_position_embeddings: 4096,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    for norm in norms(&mut spec) {
        norm.kind = NormKind::Layer;
        norm.bias = norm.weight.strip_suffix("weight").map(|prefix| format!("{prefix}bias"));
    }
    if is_parallel {
        for layer in &mut spec.layers {
            if let ResidualSpec::Sequential { mixer: BranchSpec { norm: Some(norm), .. }, .. } =
                &layer.residual
            {
                layer.residual = ResidualSpec::Parallel { norm: norm.clone(), mlp_norm: None };
            }
        }
    }
    if has_head_norms {
        let eps = spec.norm.eps;
        for (index, attention) in attentions(&mut spec).enumerate() {
            let norm = |name: &str| {
                let prefix = format!("model.layers.{index}.self_attn.{name}.norms.{HEAD_NUMBER}");
                NormSpec::layer(&prefix, false, eps)
            };
            let scope = QkNormScope::HeadWithOwnTensor;
            attention.qk_norm = Some(QkNormSpec { scope, q: norm("q_layernorm"), k: norm("k_layernorm") });
        }
    }
    reader.finish(spec)
}
