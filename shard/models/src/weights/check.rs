//! Whether the files hold the tensors a spec needs: every difference at once.

use std::collections::HashSet;

use backend::DType;

use super::WeightSource;
use crate::ModelError;
use crate::spec::{DecoderSpec, ExpectedTensor, LmHeadSpec};

/// Lines of one kind before the rest is only counted: enough to see the pattern.
const MAX_LINES: usize = 20;
/// Characters of a name from a file in a message.
const MAX_NAME: usize = 100;
/// Buffers that old checkpoints carry along and that are computed instead.
const HARMLESS_SUFFIXES: [&str; 2] = ["rotary_emb.inv_freq", "rope_freqs.weight"];

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
                "tensor {} is stored as {}, expected F32, F16, BF16, or in GGUF also Q4_0, Q4_1, Q8_0",
                tensor.name, meta.stored
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

/// The type most elements of the model are stored in.
pub(crate) fn prevailing_dtype(spec: &DecoderSpec, source: &dyn WeightSource) -> DType {
    let mut elements = [(DType::BF16, 0), (DType::F16, 0), (DType::F32, 0)];
    for ExpectedTensor { name, shape } in spec.tensors() {
        let dtype = source.meta(&name).and_then(|meta| meta.dtype);
        if let Some(entry) = elements.iter_mut().find(|entry| Some(entry.0) == dtype) {
            entry.1 += shape.iter().product::<usize>();
        }
    }
    elements.into_iter().max_by_key(|entry| entry.1).map_or(DType::F32, |entry| entry.0)
}

fn is_harmless(name: &str, spec: &DecoderSpec) -> bool {
    HARMLESS_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
        || (spec.lm_head == LmHeadSpec::Tied && name == "lm_head.weight")
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
