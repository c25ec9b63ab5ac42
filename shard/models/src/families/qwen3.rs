//! Qwen3 (arXiv:2505.09388): Llama with norms over query and key heads.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, add_head_norms};
use super::window;
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Llama with head norms; the last layers may have a window.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        mlp_bias: false,
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    add_head_norms(&mut spec);
    window::set_qwen(&mut reader, &mut spec);
    reader.finish(spec)
}
