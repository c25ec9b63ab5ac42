//! MPT (MosaicML 2023): linear biases, no other bias anywhere, LayerNorms without one.

use backend::Activation;
use hub::ModelConfig;

use super::classic::{ALIBI, SizeKeys, Sizes, expect_flag};
use super::config_reader::ConfigReader;
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{
    AlibiSpec, DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, ResidualSpec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "d_model",
    num_heads: "n_heads",
    num_layers: "n_layers",
    // Not a key of the family, so always four times the width.
    intermediate_size: "n_inner",
    eps: "layer_norm_epsilon",
};

/// The nested keys that are read.
const NESTED: [(&str, &str); 7] = [
    ("attn_config.alibi", "attn_config.alibi"),
    ("attn_config.alibi_bias_max", "attn_config.alibi_bias_max"),
    ("attn_config.clip_qkv", "attn_config.clip_qkv"),
    ("attn_config.prefix_lm", "attn_config.prefix_lm"),
    ("attn_config.qk_ln", "attn_config.qk_ln"),
    ("attn_config.softmax_scale", "attn_config.softmax_scale"),
    ("attn_config.attn_type", "attn_config.attn_type"),
];

/// The classic decoder with linear biases.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let config = respelled(config, &NESTED);
    let mut reader = ConfigReader::new(&config);
    expect_flag(&mut reader, "no_bias", true);
    expect_flag(&mut reader, "attn_config.alibi", true);
    expect_flag(&mut reader, "attn_config.prefix_lm", false);
    expect_flag(&mut reader, "attn_config.qk_ln", false);
    if let Some(kind) = config.str("attn_config.attn_type").filter(|&kind| kind != "multihead_attention") {
        reader.wrong(format!("attn_config.attn_type: found {kind:?}, expected multihead_attention"));
    }
    if config.raw.get("logit_scale").is_some_and(|value| !value.is_null()) {
        reader.wrong("logit_scale: found a value, which comes later, expected null");
    }
    // `expansion_ratio` is not read, as transformers does not: all have four times the width.
    let sizes = Sizes::read(&mut reader, &KEYS);
    let max_bias = reader.number_or("attn_config.alibi_bias_max", f64::from(ALIBI.max_bias)) as f32;
    let clip_qkv = reader.nullable_number("attn_config.clip_qkv", None).map(|limit| limit as f32);
    let scale = reader.nullable_number("attn_config.softmax_scale", None).map(|scale| scale as f32);
    let norm = |prefix: &str| NormSpec::layer(prefix, false, sizes.eps);
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("transformer.blocks.{index}");
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), false);
        let qkv = LinearSpec::fused(&format!("{prefix}.attn.Wqkv"), false, [sizes.hidden_size; 3]);
        let mut attention = sizes.attention(qkv, linear("attn.out_proj"));
        attention.alibi = Some(AlibiSpec { max_bias, ..ALIBI });
        attention.clip_qkv = clip_qkv;
        attention.scale = scale.unwrap_or(attention.scale);
        LayerSpec {
            residual: ResidualSpec::pre_norm(
                norm(&format!("{prefix}.norm_1")),
                norm(&format!("{prefix}.norm_2")),
            ),
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(Activation::Gelu, linear("ffn.up_proj"), linear("ffn.down_proj")),
        }
    });
    let layers = layers.collect();
    let embedding = EmbeddingSpec::tokens("transformer.wte.weight");
    let longest = reader.size_or("max_seq_len", 2048);
    reader.finish(sizes.decoder(embedding, layers, norm("transformer.norm_f"), longest))
}
