//! GLM-4 of 2024 (arXiv:2406.12793; `glm`) and the 0414 models that followed it (`glm4`): Llama with biases on queries, keys and
//! values, gate and up in one tensor, and neighbours of half of each head turned together. The newer ones have norms after both
//! branches besides.

use backend::RopeStyle;
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, fuse_gate_and_up};
use super::rope;
use crate::ModelError;
use crate::spec::{DecoderSpec, NormSpec, ResidualSpec};

/// GLM-4 9B of 2024.
pub(super) fn glm(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let spec = base(&mut reader);
    reader.finish(spec)
}

/// GLM-4 0414 and GLM-Z1.
pub(super) fn glm4(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let mut spec = base(&mut reader);
    let eps = spec.norm.eps;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let norm = |name: &str| Some(NormSpec::rms(&format!("model.layers.{index}.{name}"), eps));
        // `post_attention_layernorm` is still the one before the feed-forward.
        if let ResidualSpec::Sequential { mixer, mlp } = &mut layer.residual {
            mixer.post_norm = norm("post_self_attn_layernorm");
            mlp.post_norm = norm("post_mlp_layernorm");
        }
    }
    reader.finish(spec)
}

/// What both share.
fn base(reader: &mut ConfigReader<'_>) -> DecoderSpec {
    let dense = Dense {
        qkv_bias: reader.flag_or("attention_bias", true),
        o_bias: false,
        mlp_bias: false,
        num_kv_heads: Some(2),
        head_dim: Some(128),
        eps: ("rms_norm_eps", 1.5625e-7),
        rope: |reader, head_dim| {
            let mut frequencies = rope::partial_or(reader, head_dim, 0.5);
            frequencies.style = RopeStyle::Interleaved;
            frequencies
        },
        max_position_embeddings: 131_072,
        ..Dense::llama(reader)
    };
    let mut spec = dense.spec(reader);
    fuse_gate_and_up(&mut spec);
    spec
}
