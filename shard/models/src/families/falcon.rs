//! Falcon (arXiv:2311.16867) in its three layouts: the 1B "RW" models (sequential, linear biases), the 7B ones (side by side, one KV
//! head), and the "new decoder architecture" of 40B, 180B and 11B (side by side, grouped KV heads).

use backend::Activation;
use hub::ModelConfig;

use super::classic::{ALIBI, SizeKeys, Sizes, expect_flag, lm_head};
use super::config_reader::ConfigReader;
use super::dense::activation;
use super::respelled::respelled;
use super::rope;
use crate::ModelError;
use crate::spec::{
    AlibiSpec, DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, ResidualSpec,
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

/// What a file that does not say so is taken to have.
#[derive(Debug, Clone, Copy)]
struct Defaults {
    /// The layout of 40B.
    is_new: bool,
    /// The two switches that make the layout of 7B.
    is_multi_query: bool,
    is_parallel: bool,
}

/// As transformers reads it: 7B.
pub(super) fn falcon(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    spec(config, Defaults { is_new: false, is_multi_query: true, is_parallel: true })
}

/// The first files of 40B, which do not name their layout.
pub(super) fn refined_web(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    spec(config, Defaults { is_new: true, is_multi_query: false, is_parallel: true })
}

/// The first files of 7B and of the models before it, in which an absent switch is off.
pub(super) fn refined_web_model(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    spec(config, Defaults { is_new: false, is_multi_query: false, is_parallel: false })
}

/// Reads which of the layouts it is.
fn spec(config: &ModelConfig, defaults: Defaults) -> Result<DecoderSpec, ModelError> {
    let names = [
        ("hidden_size", "n_embed"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("num_kv_heads", "n_head_kv"),
        ("num_kv_heads", "num_key_value_heads"),
    ];
    let config = respelled(config, &names);
    let mut reader = ConfigReader::new(&config);
    let mut sizes = Sizes::read(&mut reader, &KEYS);
    expect_flag(&mut reader, "apply_residual_connection_post_layernorm", false);
    let is_new = reader.flag_or("new_decoder_architecture", defaults.is_new);
    let is_multi_query = reader.flag_or("multi_query", defaults.is_multi_query);
    sizes.num_kv_heads = kv_heads(&mut reader, &sizes, is_new, is_multi_query);
    let layout = layout(&mut reader, is_new, defaults.is_parallel);
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
    spec.lm_head = lm_head(&mut reader, "lm_head", true);
    reader.finish(spec)
}

/// One KV head, or as many as the file says: a group of query heads to each in the new architecture, one to each before.
fn kv_heads(reader: &mut ConfigReader<'_>, sizes: &Sizes, is_new: bool, is_multi_query: bool) -> usize {
    // Files of 7B name the query heads here.
    if is_multi_query && !is_new {
        return 1;
    }
    let (found, num_heads) = (reader.size_or("num_kv_heads", sizes.num_heads), sizes.num_heads);
    if found == num_heads || is_new && num_heads.is_multiple_of(found) {
        return found;
    }
    if !reader.has_mistakes() {
        let expected = if is_new { "a divisor of num_attention_heads" } else { "num_attention_heads" };
        reader.wrong(format!("num_kv_heads: found {found}, expected {expected}, {num_heads}"));
    }
    1
}

fn layout(reader: &mut ConfigReader<'_>, is_new: bool, default_parallel: bool) -> Layout {
    let is_parallel = reader.flag_or("parallel_attn", default_parallel);
    let norms = reader.size_or("num_ln_in_parallel_attn", if is_new { 2 } else { 1 });
    match (is_new, is_parallel, norms) {
        (false, false, _) => Layout::Sequential,
        (_, true, 1) => Layout::Parallel,
        (true, true, 2) => Layout::ParallelTwoNorms,
        (true, false, _) => {
            reader.wrong("parallel_attn: found false, expected true with new_decoder_architecture");
            Layout::Sequential
        }
        (_, true, other) => {
            let expected = if is_new { "1 or 2" } else { "1 without new_decoder_architecture" };
            reader.wrong(format!("num_ln_in_parallel_attn: found {other}, expected {expected}"));
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
