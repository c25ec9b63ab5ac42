//! OLMo 2 (arXiv:2501.00656): Llama with the norms after attention and feed-forward instead of before them, and norms over all
//! query and all key heads together.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, add_qk_norms};
use crate::ModelError;
use crate::spec::{BranchSpec, DecoderSpec, NormSpec, QkNormScope, ResidualSpec};

/// Llama with its norms moved.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense { mlp_bias: false, eps: ("rms_norm_eps", 1e-5), ..Dense::llama(&mut reader) };
    let mut spec = dense.spec(&mut reader);
    add_qk_norms(&mut spec, QkNormScope::AllHeads, NormSpec::rms);
    let eps = spec.norm.eps;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let branch = |name: &str| BranchSpec {
            norm: None,
            post_norm: Some(NormSpec::rms(&format!("model.layers.{index}.{name}"), eps)),
            multiplier: 1.0,
        };
        layer.residual = ResidualSpec::Sequential {
            mixer: branch("post_attention_layernorm"),
            mlp: branch("post_feedforward_layernorm"),
        };
    }
    reader.finish(spec)
}
