//! Baichuan and Baichuan 2 of 7B parameters (arXiv:2309.10305): Llama with queries, keys and values in one tensor.

use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions};
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec};

/// Width from which on the family's models have linear biases instead of a rotary embedding.
const WIDTH_OF_13B: usize = 5120;
/// The second generation normalises the rows of its logits' matrix; only its vocabulary tells the generations apart.
const VOCABULARY_OF_SECOND: usize = 125_696;

/// Llama with fused projections.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense { qkv_bias: false, o_bias: false, mlp_bias: false, ..Dense::llama(&mut reader) };
    let mut spec = dense.spec(&mut reader);
    if spec.hidden_size >= WIDTH_OF_13B {
        reader.wrong(format!(
            "hidden_size: found {}, a 13B model with linear biases, which comes later; expected less than {WIDTH_OF_13B}",
            spec.hidden_size
        ));
    }
    if spec.vocab_size == VOCABULARY_OF_SECOND {
        reader.wrong(format!(
            "vocab_size: found {VOCABULARY_OF_SECOND}, a Baichuan 2 whose logits are normalised, which comes later"
        ));
    }
    for (index, attention) in attentions(&mut spec).enumerate() {
        let width = attention.num_heads * attention.head_dim;
        let prefix = format!("model.layers.{index}.self_attn.W_pack");
        [attention.q_proj, attention.k_proj, attention.v_proj] =
            LinearSpec::fused(&prefix, false, [width; 3]);
    }
    reader.finish(spec)
}
