//! Llama (arXiv:2302.13971, 2307.09288, 2407.21783), as SmolLM2, TinyLlama and many others use it.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::Dense;
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Pre-norm layers of rotary grouped-query attention and a gated feed-forward.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let spec = Dense::llama(&mut reader).spec(&mut reader);
    reader.finish(spec)
}
