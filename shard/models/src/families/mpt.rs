//! MPT (MosaicML 2023): linear biases or learned positions, no other bias anywhere, LayerNorms without one.

use backend::Activation;
use hub::ModelConfig;
use serde_json::Value;

use super::classic::{ALIBI, SizeKeys, Sizes, expect_flag};
use super::config_reader::ConfigReader;
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{
    AlibiSpec, DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, PositionTableSpec,
    ResidualSpec,
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
const NESTED: [(&str, &str); 11] = [
    ("attn_config.alibi", "attn_config.alibi"),
    ("attn_config.alibi_bias_max", "attn_config.alibi_bias_max"),
    ("attn_config.clip_qkv", "attn_config.clip_qkv"),
    ("attn_config.prefix_lm", "attn_config.prefix_lm"),
    ("attn_config.qk_ln", "attn_config.qk_ln"),
    ("attn_config.softmax_scale", "attn_config.softmax_scale"),
    ("attn_config.attn_type", "attn_config.attn_type"),
    ("attn_config.qk_gn", "attn_config.qk_gn"),
    ("attn_config.rope", "attn_config.rope"),
    ("attn_config.sliding_window_size", "attn_config.sliding_window_size"),
    ("ffn_config.ffn_type", "ffn_config.ffn_type"),
];

/// The classic decoder with linear biases.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let config = respelled(config, &NESTED);
    let mut reader = ConfigReader::new(&config);
    refuse_others(&mut reader);
    // `expansion_ratio` is not read, as transformers does not: all have four times the width.
    let sizes = Sizes::read(&mut reader, &KEYS);
    let has_alibi = has_alibi(&mut reader);
    let max_bias = reader.number_or("attn_config.alibi_bias_max", f64::from(ALIBI.max_bias)) as f32;
    let clip_qkv = reader.nullable_number("attn_config.clip_qkv", None).map(|limit| limit as f32);
    let scale = reader.nullable_number("attn_config.softmax_scale", None).map(|scale| scale as f32);
    let norm = |prefix: &str| NormSpec::layer(prefix, false, sizes.eps);
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("transformer.blocks.{index}");
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), false);
        let qkv = LinearSpec::fused(&format!("{prefix}.attn.Wqkv"), false, [sizes.hidden_size; 3]);
        let mut attention = sizes.attention(qkv, linear("attn.out_proj"));
        attention.alibi = has_alibi.then_some(AlibiSpec { max_bias, ..ALIBI });
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
    let longest = reader.size_or("max_seq_len", 2048);
    let positions =
        PositionTableSpec { weight: "transformer.wpe.weight".to_owned(), rows: longest, offset: 0 };
    let embedding = EmbeddingSpec {
        positions: (!has_alibi).then_some(positions),
        ..EmbeddingSpec::tokens("transformer.wte.weight")
    };
    let mut spec = sizes.decoder(embedding, layers, norm("transformer.norm_f"), longest);
    spec.logits_multiplier = logits_multiplier(&mut reader, sizes.hidden_size);
    reader.finish(spec)
}

/// Refuses what MosaicML's own code could compute and this does not.
fn refuse_others(reader: &mut ConfigReader<'_>) {
    let config = reader.config();
    for object in ["attn_config", "ffn_config"] {
        let found = config.raw.get(object).filter(|value| !value.is_null() && !value.is_object());
        if let Some(found) = found {
            reader.wrong(format!("{object}: found {found}, expected an object"));
        }
    }
    expect_flag(reader, "no_bias", true);
    expect_flag(reader, "tie_word_embeddings", true);
    for key in ["prefix_lm", "qk_ln", "qk_gn", "rope"] {
        expect_flag(reader, &format!("attn_config.{key}"), false);
    }
    let names: [(&str, &[&str]); 3] = [
        ("attn_config.attn_type", &["multihead_attention"]),
        ("norm_type", &["low_precision_layernorm", "layernorm"]),
        ("ffn_config.ffn_type", &["mptmlp"]),
    ];
    for (key, expected) in names {
        let is_other = |found: &&Value| found.as_str().is_none_or(|name| !expected.contains(&name));
        if let Some(found) = config.raw.get(key).filter(|value| !value.is_null()).filter(is_other) {
            reader.wrong(format!("{key}: found {found}, expected {}", expected.join(" or ")));
        }
    }
    let window = reader.read(config.f64("attn_config.sliding_window_size")).unwrap_or(-1.0);
    if window != -1.0 {
        reader.wrong(format!(
            "attn_config.sliding_window_size: found {window}, which comes later, expected -1"
        ));
    }
}

/// Whether positions are linear biases; the other choice is a table of them.
fn has_alibi(reader: &mut ConfigReader<'_>) -> bool {
    let has_alibi = reader.flag_or("attn_config.alibi", true);
    if !has_alibi {
        expect_flag(reader, "learned_pos_emb", true);
    }
    has_alibi
}

/// `logit_scale`: a number, or the name of the one rule there is.
fn logits_multiplier(reader: &mut ConfigReader<'_>, hidden_size: usize) -> f32 {
    match reader.config().raw.get("logit_scale") {
        Some(Value::String(rule)) if rule == "inv_sqrt_d_model" => 1.0 / (hidden_size as f32).sqrt(),
        Some(Value::String(rule)) => {
            reader.wrong(format!("logit_scale: found {rule:?}, expected a number or inv_sqrt_d_model"));
            1.0
        }
        _ => reader.number_or("logit_scale", 1.0) as f32,
    }
}
