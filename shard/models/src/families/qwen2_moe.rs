//! Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2 with experts, one of which all tokens pass, weighed by a projection of its
//! own.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::Dense;
use super::{experts, window};
use crate::ModelError;
use crate::spec::{DecoderSpec, GatedSpec, LinearSpec, MlpSpec, SharedExpertSpec};

/// Qwen2 in which some layers have experts.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        qkv_bias: reader.flag_or("qkv_bias", true),
        o_bias: false,
        mlp_bias: false,
        max_position_embeddings: 32_768,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    window::set_qwen(&mut reader, &mut spec);
    let has_experts = experts::qwen_layers(&mut reader, spec.layers.len());
    let of_layer = experts::qwen(&mut reader, dense.activation, 4);
    let intermediate_size = reader.size("shared_expert_intermediate_size");
    for (index, layer) in spec.layers.iter_mut().enumerate().filter(|&(index, _)| has_experts[index]) {
        let prefix = format!("model.layers.{index}");
        let mut experts = of_layer(&prefix);
        experts.shared = Some(SharedExpertSpec {
            intermediate_size,
            projections: GatedSpec::new(&format!("{prefix}.mlp.shared_expert"), experts::NAMES),
            gate: Some(LinearSpec::new(&format!("{prefix}.mlp.shared_expert_gate"), false)),
        });
        layer.mlp = MlpSpec::Experts(Box::new(experts));
    }
    reader.finish(spec)
}
