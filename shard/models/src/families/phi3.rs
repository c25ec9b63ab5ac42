//! Phi-3 (arXiv:2404.14219) and Phi-4: Llama with fused projections, where a part of each head may stay unturned.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions, fuse_gate_and_up};
use super::{rope, window};
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec};

/// Llama without biases: queries, keys and values are one tensor, gate and up another.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        rope: rope::partial,
        max_position_embeddings: 4096,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let window = window::size(&mut reader, None);
    for (index, attention) in attentions(&mut spec).enumerate() {
        let keys = attention.num_kv_heads * attention.head_dim;
        let sizes = [attention.num_heads * attention.head_dim, keys, keys];
        let prefix = format!("model.layers.{index}.self_attn.qkv_proj");
        [attention.q_proj, attention.k_proj, attention.v_proj] = LinearSpec::fused(&prefix, false, sizes);
        attention.window = window;
    }
    fuse_gate_and_up(&mut spec);
    reader.finish(spec)
}
