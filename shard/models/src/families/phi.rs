//! Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644, 2309.05463): attention and feed-forward side by side after one LayerNorm, a part of
//! each head turned, biases everywhere, the logits' too.

use backend::Activation;
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, activation, attentions};
use super::rope;
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec, LmHeadSpec, MlpSpec, NormSpec, ResidualSpec};

/// Llama's attention with biases, beside a feed-forward without a gate.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    if reader.flag_or("qk_layernorm", false) {
        reader.wrong("qk_layernorm: found true, which comes later, expected false");
    }
    let dense = Dense {
        qkv_bias: true,
        eps: ("layer_norm_eps", 1e-5),
        rope: |reader, head_dim| rope::partial_or(reader, head_dim, 0.5),
        activation: activation(&mut reader, "hidden_act", Activation::GeluTanh),
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let eps = spec.norm.eps;
    let intermediate_size = reader.size("intermediate_size");
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let prefix = format!("model.layers.{index}");
        layer.residual = ResidualSpec::Parallel {
            norm: NormSpec::layer(&format!("{prefix}.input_layernorm"), true, eps),
            mlp_norm: None,
        };
        layer.mlp = MlpSpec::Plain {
            intermediate_size,
            activation: dense.activation,
            up_proj: LinearSpec::new(&format!("{prefix}.mlp.fc1"), true),
            down_proj: LinearSpec::new(&format!("{prefix}.mlp.fc2"), true),
        };
    }
    for (index, attention) in attentions(&mut spec).enumerate() {
        attention.o_proj = LinearSpec::new(&format!("model.layers.{index}.self_attn.dense"), true);
    }
    spec.norm = NormSpec::layer("model.final_layernorm", true, eps);
    if let LmHeadSpec::Own(lm_head) = &mut spec.lm_head {
        *lm_head = LinearSpec::new("lm_head", true);
    }
    reader.finish(spec)
}
