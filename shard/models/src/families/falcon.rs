//! Falcon (arXiv:2311.16867) in its three layouts: the 1B "RW" models (sequential, linear biases), the 7B ones (side by side, one KV
//! head), and the "new decoder architecture" of 40B, 180B and 11B (side by side, grouped KV heads).

use backend::Activation;
use hub::ModelConfig;

use super::classic::{ALIBI, SizeKeys, Sizes};
use super::config_reader::ConfigReader;
use super::dense::activation;
use super::respelled::respelled;
use super::rope;
use crate::ModelError;
use crate::spec::{
    AlibiSpec, DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, LmHeadSpec, MixerSpec, NormSpec,
    ResidualSpec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "hidden_size",
    num_heads: "num_attention_heads",
    num_layers: "num_hidden_layers",
    intermediate_size: "ffn_hidden_size",
    eps: "layer_norm_epsilon",
};

/// How often transformers' eager attention, the reference here, adds the linear biases before it scales the scores: with the
/// mask and by itself. Its fused attention adds them once.
const EAGER_BIASES: f32 = 2.0;

/// How a model's layers are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// One part after the other.
    Sequential,
    /// Side by side after one norm.
    Parallel,
    /// Side by side, each after its own norm.
    ParallelTwoNorms,
}

/// Reads which of the layouts it is.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let names = [
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("num_kv_heads", "n_head_kv"),
        ("num_kv_heads", "num_key_value_heads"),
    ];
    let config = respelled(config, &names);
    let mut reader = ConfigReader::new(&config);
    let mut sizes = Sizes::read(&mut reader, &KEYS);
    let is_new = reader.flag_or("new_decoder_architecture", false);
    let is_multi_query = reader.flag_or("multi_query", true);
    if is_new {
        sizes.num_kv_heads = reader.size_or("num_kv_heads", sizes.num_heads);
        if !sizes.num_heads.is_multiple_of(sizes.num_kv_heads) && !reader.has_mistakes() {
            reader.wrong(format!(
                "num_kv_heads: found {}, expected a divisor of num_attention_heads, {}",
                sizes.num_kv_heads, sizes.num_heads
            ));
        }
    } else if is_multi_query {
        sizes.num_kv_heads = 1;
    }
    let layout = layout(&mut reader, is_new);
    let has_bias = reader.flag_or("bias", false);
    let activation = activation(&mut reader, "activation", Activation::Gelu);
    let has_alibi = reader.flag_or("alibi", false);
    let rope = (!has_alibi).then(|| rope::frequencies(&mut reader, sizes.head_dim));
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("transformer.h.{index}");
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), has_bias);
        let qkv = qkv(&sizes, &format!("{prefix}.self_attention.query_key_value"), is_new, has_bias);
        let mut attention = sizes.attention(qkv, linear("self_attention.dense"));
        attention.rope = rope.clone();
        attention.alibi =
            has_alibi.then_some(AlibiSpec { multiplier: EAGER_BIASES * attention.scale, ..ALIBI });
        LayerSpec {
            residual: residual(layout, &prefix, sizes.eps),
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(activation, linear("mlp.dense_h_to_4h"), linear("mlp.dense_4h_to_h")),
        }
    });
    let layers = layers.collect();
    let embedding = EmbeddingSpec::tokens("transformer.word_embeddings.weight");
    let norm = NormSpec::layer("transformer.ln_f", true, sizes.eps);
    let longest = reader.size_or("max_position_embeddings", 2048);
    let mut spec = sizes.decoder(embedding, layers, norm, longest);
    if !reader.flag_or("tie_word_embeddings", true) {
        spec.lm_head = LmHeadSpec::Own(LinearSpec::new("lm_head", false));
    }
    reader.finish(spec)
}

fn layout(reader: &mut ConfigReader<'_>, is_new: bool) -> Layout {
    if !is_new {
        let is_parallel = reader.flag_or("parallel_attn", true);
        return if is_parallel { Layout::Parallel } else { Layout::Sequential };
    }
    match reader.size_or("num_ln_in_parallel_attn", 2) {
        1 => Layout::Parallel,
        2 => Layout::ParallelTwoNorms,
        other => {
            reader.wrong(format!("num_ln_in_parallel_attn: found {other}, expected 1 or 2"));
            Layout::Parallel
        }
    }
}

fn residual(layout: Layout, prefix: &str, eps: f32) -> ResidualSpec {
    let norm = |name: &str| NormSpec::layer(&format!("{prefix}.{name}"), true, eps);
    match layout {
        Layout::Sequential => {
            ResidualSpec::pre_norm(norm("input_layernorm"), norm("post_attention_layernorm"))
        }
        Layout::Parallel => ResidualSpec::Parallel { norm: norm("input_layernorm"), mlp_norm: None },
        Layout::ParallelTwoNorms => {
            ResidualSpec::Parallel { norm: norm("ln_attn"), mlp_norm: Some(norm("ln_mlp")) }
        }
    }
}

/// Each KV head's query heads, its key and its value, or with one KV head all query heads first, or each head's three parts.
fn qkv(sizes: &Sizes, prefix: &str, is_new: bool, has_bias: bool) -> [LinearSpec; 3] {
    let Sizes { num_heads, num_kv_heads, head_dim, .. } = *sizes;
    if is_new || num_kv_heads == 1 {
        let group = [num_heads / num_kv_heads * head_dim, head_dim, head_dim];
        LinearSpec::interleaved(prefix, has_bias, group, num_kv_heads)
    } else {
        sizes.qkv_by_head(prefix, has_bias)
    }
}
