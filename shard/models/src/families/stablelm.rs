//! StableLM 2 (arXiv:2402.17834): Llama with LayerNorm, turning a quarter of each head.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, norms};
use super::rope;
use crate::ModelError;
use crate::spec::{DecoderSpec, NormKind};

/// Llama with LayerNorms.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    for key in ["qk_layernorm", "use_parallel_residual"] {
        if reader.flag_or(key, false) {
            reader.wrong(format!("{key}: found true, which comes later, expected false"));
        }
    }
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
    reader.finish(spec)
}
