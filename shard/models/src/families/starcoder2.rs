//! StarCoder 2 (arXiv:2402.19173): Llama's attention between LayerNorms, a feed-forward without a gate, biases everywhere.

use backend::Activation;
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, activation, attentions, norms};
use super::window;
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec, MlpSpec, NormKind};

/// Llama's attention with biases, in the older surroundings.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let has_bias = reader.flag_or("use_bias", true);
    let dense = Dense {
        qkv_bias: has_bias,
        o_bias: has_bias,
        eps: ("norm_epsilon", 1e-5),
        activation: activation(&mut reader, "hidden_act", Activation::GeluTanh),
        is_tied: true,
        max_position_embeddings: 4096,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    for norm in norms(&mut spec) {
        norm.kind = NormKind::Layer;
        norm.bias = norm.weight.strip_suffix("weight").map(|prefix| format!("{prefix}bias"));
    }
    let intermediate_size = reader.size("intermediate_size");
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let linear = |name: &str| LinearSpec::new(&format!("model.layers.{index}.mlp.{name}"), has_bias);
        layer.mlp = MlpSpec::Plain {
            intermediate_size,
            activation: dense.activation,
            up_proj: linear("c_fc"),
            down_proj: linear("c_proj"),
        };
    }
    let window = window::size(&mut reader, None);
    attentions(&mut spec).for_each(|attention| attention.window = window);
    reader.finish(spec)
}
