//! Gemma (arXiv:2403.08295), Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786).
//!
//! All multiply the embedding by the root of its width, store norm weights as differences from 1, and tie the logits to the
//! embedding. Gemma 2 adds norms after each branch, windows and soft caps; Gemma 3 replaces the caps by norms over heads and
//! gives sliding layers rotary frequencies of their own.

use backend::{Activation, RopeFrequencies};
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, activation, add_head_norms, attentions, norms};
use super::{rope, window};
use crate::ModelError;
use crate::spec::{BranchSpec, DecoderSpec, NormSpec, ResidualSpec};

/// Gemma.
pub(super) fn gemma(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let mut spec = base(&mut reader, 8192, rope::frequencies);
    offset_norms(&mut spec);
    reader.finish(spec)
}

/// Gemma 2.
pub(super) fn gemma2(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let mut spec = base(&mut reader, 8192, rope::frequencies);
    second_and_third(&mut reader, &mut spec, (Some(50.0), Some(30.0)));
    let window = window::size(&mut reader, Some(4096));
    window::set(&mut reader, &mut spec, window, |index| index % 2 == 0);
    offset_norms(&mut spec);
    reader.finish(spec)
}

/// The text model of Gemma 3.
pub(super) fn gemma3_text(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    if reader.flag_or("use_bidirectional_attention", false) {
        reader.wrong(
            "use_bidirectional_attention: found true, expected false: a model that generates is causal",
        );
    }
    let mut spec = base(&mut reader, 131_072, global_rope);
    second_and_third(&mut reader, &mut spec, (None, None));
    add_head_norms(&mut spec);
    // Never none: layers with a window are also those with the local rotation.
    let window = Some(reader.size_or("sliding_window", 4096));
    let pattern = reader.size_or("sliding_window_pattern", 6);
    window::set(&mut reader, &mut spec, window, |index| !(index + 1).is_multiple_of(pattern));
    let head_dim = attentions(&mut spec).next().map_or(2, |attention| attention.head_dim);
    let local = local_rope(&mut reader, head_dim);
    for attention in attentions(&mut spec).filter(|attention| attention.window.is_some()) {
        attention.rope = Some(local.clone());
    }
    offset_norms(&mut spec);
    reader.finish(spec)
}

/// What all of them share, but for the norms' offset.
fn base(
    reader: &mut ConfigReader<'_>,
    max_position_embeddings: usize,
    rope: fn(&mut ConfigReader<'_>, usize) -> RopeFrequencies,
) -> DecoderSpec {
    let dense = Dense {
        mlp_bias: false,
        head_dim: Some(256),
        // Not `hidden_act`: early files say "gelu" there, and mean the approximation.
        activation: activation(reader, "hidden_activation", Activation::GeluTanh),
        is_tied: true,
        rope,
        max_position_embeddings,
        ..Dense::llama(reader)
    };
    let mut spec = dense.spec(reader);
    spec.embedding.multiplier = (spec.hidden_size as f32).sqrt();
    spec
}

/// Norms after the branches, the scores' factor, and the soft caps on scores and logits, with their defaults.
fn second_and_third(
    reader: &mut ConfigReader<'_>,
    spec: &mut DecoderSpec,
    (scores, logits): (Option<f64>, Option<f64>),
) {
    let eps = spec.norm.eps;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let norm = |name: &str| Some(NormSpec::rms(&format!("model.layers.{index}.{name}"), eps));
        layer.residual = ResidualSpec::Sequential {
            mixer: BranchSpec {
                norm: norm("input_layernorm"),
                post_norm: norm("post_attention_layernorm"),
                multiplier: 1.0,
            },
            mlp: BranchSpec {
                norm: norm("pre_feedforward_layernorm"),
                post_norm: norm("post_feedforward_layernorm"),
                multiplier: 1.0,
            },
        };
    }
    let scale = reader.number_or("query_pre_attn_scalar", 256.0).sqrt().recip() as f32;
    let soft_cap = reader.nullable_number("attn_logit_softcapping", scores).map(|cap| cap as f32);
    for attention in attentions(spec) {
        (attention.scale, attention.soft_cap) = (scale, soft_cap);
    }
    spec.logits_soft_cap = reader.nullable_number("final_logit_softcapping", logits).map(|cap| cap as f32);
}

/// The rotary embedding of layers without a window.
fn global_rope(reader: &mut ConfigReader<'_>, head_dim: usize) -> RopeFrequencies {
    rope::of_kind(reader, "full_attention", head_dim)
        .unwrap_or_else(|| rope::frequencies_or(reader, head_dim, 1_000_000.0))
}

/// The rotary embedding of layers with a window; `rope_scaling` is not for them.
fn local_rope(reader: &mut ConfigReader<'_>, head_dim: usize) -> RopeFrequencies {
    let theta = reader.number_or("rope_local_base_freq", 10_000.0);
    rope::of_kind(reader, "sliding_attention", head_dim).unwrap_or_else(|| rope::unscaled(theta, head_dim))
}

fn offset_norms(spec: &mut DecoderSpec) {
    norms(spec).for_each(|norm| norm.weight_offset = 1.0);
}
