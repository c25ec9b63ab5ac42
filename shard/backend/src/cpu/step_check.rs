//! Checks a step's arrays against one another, so that kernels may trust them.

use crate::{BackendError, StepInput};

/// An error that names the first array that does not fit.
pub(super) fn check(step: &StepInput) -> Result<(), BackendError> {
    let tokens = step.num_tokens();
    let seqs = step.num_seqs();
    let refuse =
        |reason: String| Err(BackendError::Device { operation: "beginning a step".to_owned(), reason });
    for (name, len, expected) in [
        ("position_ids", step.position_ids.len(), tokens),
        ("slot_mapping", step.slot_mapping.len(), tokens),
        ("cu_seqlens_q", step.cu_seqlens_q.len(), seqs + 1),
        ("block_tables", step.block_tables.len(), seqs * step.max_blocks),
    ] {
        if len != expected {
            return refuse(format!(
                "{name} has {len} elements, {tokens} tokens of {seqs} sequences need {expected}"
            ));
        }
    }
    if step.cu_seqlens_q.first() != Some(&0)
        || step.cu_seqlens_q.last().map(|&last| last as usize) != Some(tokens)
    {
        return refuse(format!("cu_seqlens_q does not go from 0 to {tokens}"));
    }
    for (seq, (bounds, &context)) in step.cu_seqlens_q.windows(2).zip(&step.context_lens).enumerate() {
        if bounds[0] > bounds[1] || bounds[1] - bounds[0] > context {
            return refuse(format!(
                "sequence {seq} has tokens {}..{} and a context of {context}",
                bounds[0], bounds[1]
            ));
        }
    }
    if let Some(row) = step.logits_rows.iter().find(|&&row| row as usize >= tokens) {
        return refuse(format!("logits of token {row} of {tokens}"));
    }
    Ok(())
}
