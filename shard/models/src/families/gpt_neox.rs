//! GPT-NeoX (arXiv:2204.06745) and Pythia: attention and feed-forward side by side, each after its own LayerNorm; a quarter of each
//! head is turned.

use backend::Activation;
use hub::ModelConfig;

use super::classic::{SizeKeys, Sizes, lm_head};
use super::config_reader::ConfigReader;
use super::dense::activation;
use super::respelled::respelled;
use super::rope;
use crate::ModelError;
use crate::spec::{DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, ResidualSpec};

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "hidden_size",
    num_heads: "num_attention_heads",
    num_layers: "num_hidden_layers",
    intermediate_size: "intermediate_size",
    eps: "layer_norm_eps",
};

/// Parallel or sequential, as config.json says.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let names = [("partial_rotary_factor", "rotary_pct"), ("rope_theta", "rotary_emb_base")];
    let config = respelled(config, &names);
    let mut reader = ConfigReader::new(&config);
    let sizes = Sizes::read(&mut reader, &KEYS);
    let activation = activation(&mut reader, "hidden_act", Activation::Gelu);
    let rope = rope::partial_or(&mut reader, sizes.head_dim, 0.25);
    let has_bias = reader.flag_or("attention_bias", true);
    let is_parallel = reader.flag_or("use_parallel_residual", true);
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("gpt_neox.layers.{index}");
        let norm = |name: &str| NormSpec::layer(&format!("{prefix}.{name}"), true, sizes.eps);
        let (first, second) = (norm("input_layernorm"), norm("post_attention_layernorm"));
        let linear = |name: &str, has_bias| LinearSpec::new(&format!("{prefix}.{name}"), has_bias);
        let qkv = sizes.qkv_by_head(&format!("{prefix}.attention.query_key_value"), has_bias);
        let mut attention = sizes.attention(qkv, linear("attention.dense", has_bias));
        attention.rope = Some(rope.clone());
        LayerSpec {
            residual: if is_parallel {
                ResidualSpec::Parallel { norm: first, mlp_norm: Some(second) }
            } else {
                ResidualSpec::pre_norm(first, second)
            },
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(activation, linear("mlp.dense_h_to_4h", true), linear("mlp.dense_4h_to_h", true)),
        }
    });
    let layers = layers.collect();
    let embedding = EmbeddingSpec::tokens("gpt_neox.embed_in.weight");
    let norm = NormSpec::layer("gpt_neox.final_layer_norm", true, sizes.eps);
    let longest = reader.size_or("max_position_embeddings", 2048);
    let mut spec = sizes.decoder(embedding, layers, norm, longest);
    spec.lm_head = lm_head(&mut reader, "embed_out", false);
    reader.finish(spec)
}
