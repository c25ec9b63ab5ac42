//! Sequences of tokens under way, and the steps that compute them: what the checks share.

use std::ops::Range;

use backend::StepInput;

/// Tokens of a KV block.
pub(crate) const BLOCK_SIZE: usize = 16;

/// A prompt and what followed, with what a check keeps of it.
pub(crate) struct Sequence<T> {
    /// Prompt, then what was generated.
    pub(crate) ids: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// How many of the ids the cache holds.
    pub(crate) cached: usize,
    blocks: Range<u32>,
    /// Nothing more is to be computed.
    pub(crate) is_done: bool,
    pub(crate) kept: T,
}

impl<T> Sequence<T> {
    /// A prompt that up to `answer_len` tokens will follow, in the blocks from `next_block` on.
    pub(crate) fn new(ids: Vec<u32>, answer_len: usize, next_block: &mut u32, kept: T) -> Self {
        let begin = *next_block;
        *next_block += num_blocks(ids.len() + answer_len) as u32;
        Self { prompt_len: ids.len(), ids, cached: 0, blocks: begin..*next_block, is_done: false, kept }
    }
}

/// Blocks that so many tokens take.
pub(crate) fn num_blocks(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// The sequences that a step computes, and how many tokens of each: at most `chunk` of one and `room` of all. None when all
/// are done.
pub(crate) fn parts<T>(
    sequences: &mut [Sequence<T>],
    chunk: usize,
    mut room: usize,
) -> Vec<(&mut Sequence<T>, usize)> {
    let mut parts = Vec::new();
    for sequence in sequences.iter_mut().filter(|sequence| !sequence.is_done) {
        let len = (sequence.ids.len() - sequence.cached).min(chunk).min(room);
        if len > 0 {
            room -= len;
            parts.push((sequence, len));
        }
    }
    parts
}

/// The step that computes these parts.
pub(crate) fn step<T>(parts: &[(&mut Sequence<T>, usize)]) -> StepInput {
    let max_blocks = parts.iter().map(|(sequence, _)| sequence.blocks.len()).max().unwrap_or(0);
    let mut step = StepInput { cu_seqlens_q: vec![0], max_blocks, ..StepInput::default() };
    for (sequence, len) in parts {
        let end = sequence.cached + len;
        step.input_ids.extend_from_slice(&sequence.ids[sequence.cached..end]);
        step.position_ids.extend(sequence.cached as u32..end as u32);
        step.slot_mapping.extend((sequence.cached..end).map(|position| {
            let block = sequence.blocks.start + (position / BLOCK_SIZE) as u32;
            block * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
        }));
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(end as u32);
        step.prompt_lens.push(sequence.prompt_len as u32);
        step.block_tables.extend(sequence.blocks.clone());
        step.block_tables.resize(step.context_lens.len() * max_blocks, 0);
        if end == sequence.ids.len() {
            step.logits_rows.push(step.input_ids.len() as u32 - 1);
        }
    }
    step
}
