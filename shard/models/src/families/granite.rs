//! Granite 3 (IBM): Llama with factors on the embedding, the scores, the branches and the logits.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions, branches};
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Llama with factors. They stay apart from the weights: a product would have to be rounded to the weights' type.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let mut spec = Dense::llama(&mut reader).spec(&mut reader);
    spec.embedding.multiplier = reader.number_or("embedding_multiplier", 1.0) as f32;
    spec.logits_multiplier = reader.number_or("logits_scaling", 1.0).recip() as f32;
    let scale = reader.number_or("attention_multiplier", 1.0) as f32;
    attentions(&mut spec).for_each(|attention| attention.scale = scale);
    let multiplier = reader.number_or("residual_multiplier", 1.0) as f32;
    branches(&mut spec).for_each(|branch| branch.multiplier = multiplier);
    reader.finish(spec)
}
