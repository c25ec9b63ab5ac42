//! Qwen3-MoE (arXiv:2505.09388): Qwen3 with experts.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, add_head_norms, attentions};
use super::{experts, window};
use crate::ModelError;
use crate::spec::{DecoderSpec, MlpSpec};

/// Qwen3 in which some layers have experts; with `use_sliding_window` all layers have the window.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense { mlp_bias: false, max_position_embeddings: 32_768, ..Dense::llama(&mut reader) };
    let mut spec = dense.spec(&mut reader);
    add_head_norms(&mut spec);
    if reader.flag_or("use_sliding_window", false) {
        let window = window::size(&mut reader, Some(4096));
        attentions(&mut spec).for_each(|attention| attention.window = window);
    }
    let has_experts = experts::qwen_layers(&mut reader, spec.layers.len());
    let of_layer = experts::qwen(&mut reader, dense.activation, 8);
    for (index, layer) in spec.layers.iter_mut().enumerate().filter(|&(index, _)| has_experts[index]) {
        layer.mlp = MlpSpec::Experts(Box::new(of_layer(&format!("model.layers.{index}"))));
    }
    reader.finish(spec)
}
