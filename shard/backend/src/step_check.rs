//! Checks a step's arrays against one another, so that kernels may trust them.

use crate::{BackendError, StepInput};

/// An error that names the first array that does not fit.
pub(crate) fn check(step: &StepInput) -> Result<(), BackendError> {
    let tokens = step.num_tokens();
    let seqs = step.num_seqs();
    let refuse =
        |reason: String| Err(BackendError::Device { operation: "beginning a step".to_owned(), reason });
    for (name, len, expected) in [
        ("position_ids", step.position_ids.len(), tokens),
        ("slot_mapping", step.slot_mapping.len(), tokens),
        ("cu_seqlens_q", step.cu_seqlens_q.len(), seqs + 1),
        ("prompt_lens", step.prompt_lens.len(), seqs),
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

/// The arrays of a step that point into a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheUse<'a> {
    /// `[num_tokens]`.
    pub(crate) slot_mapping: &'a [u32],
    /// `[num_seqs]`.
    pub(crate) context_lens: &'a [u32],
    /// `[num_seqs, max_blocks]`.
    pub(crate) block_tables: &'a [u32],
    pub(crate) max_blocks: usize,
}

impl<'a> CacheUse<'a> {
    /// Those of `step`.
    pub(crate) fn of(step: &'a StepInput) -> Self {
        Self {
            slot_mapping: &step.slot_mapping,
            context_lens: &step.context_lens,
            block_tables: &step.block_tables,
            max_blocks: step.max_blocks,
        }
    }

    /// That slots and block tables lie within a cache: the attention kernels rely on it.
    pub(crate) fn check(&self, num_blocks: usize, block_size: usize) -> Result<(), BackendError> {
        let refuse = |reason: String| Err(BackendError::Device { operation: "attention".to_owned(), reason });
        let slots = num_blocks * block_size;
        if let Some(slot) = self.slot_mapping.iter().find(|&&slot| slot as usize >= slots) {
            return refuse(format!("slot {slot} in a cache of {slots}"));
        }
        for (seq, &context) in self.context_lens.iter().enumerate() {
            let needed = (context as usize).div_ceil(block_size);
            let table = &self.block_tables[seq * self.max_blocks..(seq + 1) * self.max_blocks];
            let Some(used) = table.get(..needed) else {
                return refuse(format!(
                    "sequence {seq} of {context} tokens has a table of {} blocks",
                    table.len()
                ));
            };
            if let Some(block) = used.iter().find(|&&block| block as usize >= num_blocks) {
                return refuse(format!("block {block} in a cache of {num_blocks}"));
            }
        }
        Ok(())
    }
}
