//! Qwen2 (arXiv:2407.10671) and Qwen2.5: Llama with biases on queries, keys and values.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::Dense;
use super::window;
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Llama with other biases; the last layers may have a window.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        max_position_embeddings: 32_768,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    window::set_qwen(&mut reader, &mut spec);
    reader.finish(spec)
}
