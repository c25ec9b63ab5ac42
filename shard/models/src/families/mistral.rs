//! Mistral (arXiv:2310.06825): Llama, looking back over a sliding window where config.json has one.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions};
use super::window;
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Llama without biases, with a window.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        max_position_embeddings: 4096 * 32,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let window = window::size(&mut reader, Some(4096));
    attentions(&mut spec).for_each(|attention| attention.window = window);
    reader.finish(spec)
}
