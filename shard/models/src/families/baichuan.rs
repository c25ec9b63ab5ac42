//! Baichuan and Baichuan 2 (arXiv:2309.10305): Llama with queries, keys and values in one tensor; the 13B models have linear biases
//! instead of a rotary embedding, the second generation normalises the rows of its logits' matrix.

use hub::ModelConfig;

use super::classic::ALIBI;
use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions};
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec, LmHeadSpec};

/// Width of the 13B models: no key tells that their positions are linear biases.
const WIDTH_OF_13B: usize = 5120;
/// Only its vocabulary tells the second generation from the first.
const VOCABULARY_OF_SECOND: usize = 125_696;

/// Llama with fused projections.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    // What the 13B models call it: biases have no end.
    let config = respelled(config, &[("max_position_embeddings", "model_max_length")]);
    let mut reader = ConfigReader::new(&config);
    let dense = Dense { qkv_bias: false, o_bias: false, mlp_bias: false, ..Dense::llama(&mut reader) };
    let mut spec = dense.spec(&mut reader);
    let has_biases = spec.hidden_size >= WIDTH_OF_13B;
    for (index, attention) in attentions(&mut spec).enumerate() {
        let width = attention.num_heads * attention.head_dim;
        if attention.num_kv_heads != attention.num_heads {
            reader.wrong(format!(
                "num_key_value_heads: found {}, expected num_attention_heads, {}",
                attention.num_kv_heads, attention.num_heads
            ));
            break;
        }
        let prefix = format!("model.layers.{index}.self_attn.W_pack");
        [attention.q_proj, attention.k_proj, attention.v_proj] =
            LinearSpec::fused(&prefix, false, [width; 3]);
        if has_biases {
            attention.rope = None;
            attention.alibi = Some(ALIBI);
        }
    }
    if let (VOCABULARY_OF_SECOND, LmHeadSpec::Own(lm_head)) = (spec.vocab_size, &spec.lm_head) {
        spec.lm_head = LmHeadSpec::Normalised(lm_head.clone());
    }
    reader.finish(spec)
}
