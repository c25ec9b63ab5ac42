//! Whether the files hold the tensors a spec needs: every difference at once.

use std::collections::HashSet;

use backend::DType;

use super::cache_scales::is_cache_scale;
use super::{WeightSource, blocks};
use crate::ModelError;
use crate::spec::{DecoderSpec, ExpectedTensor, LmHeadSpec};

/// Lines of one kind before the rest is only counted: enough to see the pattern.
const MAX_LINES: usize = 20;
/// Characters of a name from a file in a message.
const MAX_NAME: usize = 100;
/// Buffers that old checkpoints carry along and that are computed instead: frequencies and tables of the rotation, masks
/// of the attention (a `bias` of the attention itself, not of one of its projections), and positions in order.
const HARMLESS_SUFFIXES: [&str; 13] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    ".attn.bias",
    ".attn.masked_bias",
    ".attn.causal_mask",
    ".attn.embed_positions",
    ".attention.bias",
    ".attention.masked_bias",
    ".position_ids",
];
/// What the logits' projection is called. Where it is tied, a copy of the embedding may be stored as well.
const TIED_HEADS: [&str; 2] = ["lm_head.weight", "embed_out.weight"];

/// Compares the files with the spec.
///
/// # Errors
/// Tensors are missing, surplus, of another shape or of a type that is not read: one line each.
pub(crate) fn check_tensors(spec: &DecoderSpec, source: &dyn WeightSource) -> Result<(), ModelError> {
    let expected = spec.tensors();
    let (mut missing, mut wrong) = (Vec::new(), Vec::new());
    for tensor in &expected {
        let Some(meta) = source.meta(&tensor.name) else {
            missing.push(format!("tensor {} is missing, expected shape {:?}", tensor.name, tensor.shape));
            continue;
        };
        if meta.shape != tensor.shape {
            wrong.push(format!(
                "tensor {} has shape {:?}, expected {:?} after config.json",
                tensor.name, meta.shape, tensor.shape
            ));
        }
        if meta.dtype.is_none() {
            wrong.push(format!(
                "tensor {} is stored as {}, expected {}; choose another file with --model-id",
                tensor.name,
                meta.stored,
                blocks::EXPECTED
            ));
        }
    }
    let known: HashSet<_> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut surplus: Vec<_> = source
        .names()
        .into_iter()
        .filter(|name| !known.contains(name) && !is_harmless(name, spec))
        .map(|name| format!("tensor {} is not part of the model config.json describes", shorten(name)))
        .collect();
    surplus.sort();
    let mistakes: Vec<_> = [missing, wrong, surplus].into_iter().flat_map(shorten_list).collect();
    if mistakes.is_empty() { Ok(()) } else { Err(ModelError::Unusable(mistakes)) }
}

/// The type most elements of the model are stored in, those of eight bits aside.
pub(crate) fn prevailing_dtype(spec: &DecoderSpec, source: &dyn WeightSource) -> DType {
    let mut elements = [(DType::BF16, 0), (DType::F16, 0), (DType::F32, 0)];
    for ExpectedTensor { name, shape } in spec.tensors() {
        // Eight bits are a form of their own.
        if source.is_fp8(&name) {
            continue;
        }
        let dtype = source.meta(&name).and_then(|meta| meta.dtype);
        if let Some(entry) = elements.iter_mut().find(|entry| Some(entry.0) == dtype) {
            entry.1 += shape.iter().product::<usize>();
        }
    }
    elements.into_iter().max_by_key(|entry| entry.1).map_or(DType::F32, |entry| entry.0)
}

fn is_harmless(name: &str, spec: &DecoderSpec) -> bool {
    HARMLESS_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
        || is_cache_scale(name)
        || (spec.lm_head == LmHeadSpec::Tied && TIED_HEADS.contains(&name))
        || spec.other_tensors.iter().any(|prefix| name.starts_with(prefix.as_str()))
}

fn shorten(name: &str) -> String {
    let short: String = name.chars().take(MAX_NAME).flat_map(char::escape_debug).collect();
    if name.chars().count() > MAX_NAME { format!("{short}…") } else { short }
}

fn shorten_list(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MAX_LINES {
        let last = format!("… and {} more of this kind", lines.len() - MAX_LINES);
        lines.truncate(MAX_LINES);
        lines.push(last);
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use backend::HostMatrix;
    use hub::ModelConfig;
    use serde_json::json;

    use super::super::{TensorMeta, unusable};
    use super::*;

    /// Tensors of the given shapes.
    struct Shapes(Vec<(String, Vec<usize>)>);

    impl WeightSource for Shapes {
        fn names(&self) -> Vec<&str> {
            self.0.iter().map(|(name, _)| name.as_str()).collect()
        }

        fn meta(&self, name: &str) -> Option<TensorMeta> {
            let (_, shape) = self.0.iter().find(|(known, _)| known == name)?;
            Some(TensorMeta {
                shape: shape.clone(),
                dtype: Some(DType::F32),
                stored: "F32".to_owned(),
                quantized: None,
            })
        }

        fn matrix(&self, _: &str, _: Range<usize>, _: Range<usize>) -> Result<HostMatrix<'_>, ModelError> {
            Err(unusable("not asked for"))
        }
    }

    fn spec(is_tied: bool) -> DecoderSpec {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_hidden_layers": 1, "vocab_size": 384, "tie_word_embeddings": is_tied,
        });
        crate::families::decoder_spec(&ModelConfig::new(config.as_object().unwrap().clone())).unwrap()
    }

    fn sound(spec: &DecoderSpec) -> Shapes {
        Shapes(spec.tensors().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect())
    }

    /// What is said of a sound model with these tensors too.
    fn with_surplus(is_tied: bool, names: &[&str]) -> Result<(), String> {
        let spec = spec(is_tied);
        let mut source = sound(&spec);
        source.0.extend(names.iter().map(|&name| (name.to_owned(), vec![usize::MAX, 4])));
        check_tensors(&spec, &source).map_err(|error| error.to_string())
    }

    #[test]
    fn buffers_and_copies_are_tolerated_and_nothing_else() {
        with_surplus(
            true,
            &[
                "transformer.h.0.attn.bias",
                "h.0.attn.masked_bias",
                "gpt_neox.layers.0.attention.bias",
                "gpt_neox.layers.0.attention.masked_bias",
                "layers.0.attention.rotary_emb.inv_freq",
                "transformer.h.0.attn.causal_mask",
                "embeddings.position_ids",
                "lm_head.weight",
                "embed_out.weight",
            ],
        )
        .unwrap();
        for name in [
            "transformer.h.0.attn.c_attn.bias",
            "attn.weight",
            "model.layers.0.self_attn.bias",
            "score.weight",
        ] {
            let error = with_surplus(true, &[name]).unwrap_err();
            assert_eq!(error, format!("tensor {name} is not part of the model config.json describes"));
        }
        // Where the head is its own, there is no other.
        assert!(with_surplus(false, &["embed_out.weight"]).is_err());
    }

    #[test]
    fn every_difference_is_listed_at_once() {
        let spec = spec(false);
        let mut source = sound(&spec);
        source.0.retain(|(name, _)| !name.contains("up_proj") && name != "model.norm.weight");
        source
            .0
            .iter_mut()
            .filter(|(name, _)| name.contains("q_proj"))
            .for_each(|entry| entry.1 = vec![64, 65]);
        source.0.push(("a\n".repeat(1000), vec![1]));
        let error = check_tensors(&spec, &source).unwrap_err().to_string();
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines.len(), 4, "{error}");
        assert_eq!(
            lines[..3],
            [
                "tensor model.layers.0.mlp.up_proj.weight is missing, expected shape [128, 64]",
                "tensor model.norm.weight is missing, expected shape [64]",
                "tensor model.layers.0.self_attn.q_proj.weight has shape [64, 65], expected [64, 64] after config.json",
            ]
        );
        assert!(lines[3].starts_with("tensor a\\na\\n") && lines[3].len() < 300, "{}", lines[3]);
        source.0.clear();
        source.0.extend((0..1000).map(|n| (format!("extra.{n}"), vec![1])));
        let error = check_tensors(&spec, &source).unwrap_err().to_string();
        assert!(error.contains("… and 980 more of this kind"), "{error}");
    }
}
