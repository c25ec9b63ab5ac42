//! Mixtral (arXiv:2401.04088): Mistral with experts for feed-forwards.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions};
use super::experts::ExpertsOfAllLayers;
use super::{experts, rope, window};
use crate::ModelError;
use crate::spec::DecoderSpec;

/// Llama without biases; the weights of the chosen experts add up to 1.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        eps: ("rms_norm_eps", 1e-5),
        rope: |reader, head_dim| rope::frequencies_or(reader, head_dim, 1e6),
        max_position_embeddings: 131_072,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let window = window::size(&mut reader, None);
    attentions(&mut spec).for_each(|attention| attention.window = window);
    let num_experts = experts::count(&mut reader, "num_local_experts", Some(8));
    let routing = experts::softmax(reader.size_or("num_experts_per_tok", 2), true);
    experts::check(&mut reader, &routing, num_experts);
    let intermediate_size = reader.size("intermediate_size");
    let shared = ExpertsOfAllLayers { intermediate_size, activation: dense.activation, routing };
    experts::set_mixtral(&mut spec, num_experts, &shared);
    reader.finish(spec)
}
