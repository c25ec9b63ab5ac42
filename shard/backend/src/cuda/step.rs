//! The inputs of a step on the device, at fixed addresses, so that recorded graphs depend on nothing else.

use std::cell::Cell;
use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr, PinnedMemory, Stream};
use crate::step_check::{self, CacheUse};
use crate::{BackendError, StepInput};

/// Queries that one block of the prefill attention computes, see [`StepInputs::prefill_tiles`].
pub(super) const QUERY_TILE: usize = 128;

/// Elements of the header: number of tokens, of sequences, width of the block tables, number of prefill tiles, of sequences
/// with one token.
const HEADER: usize = 8;
/// Where in the header the width of the block tables is.
const BLOCK_TABLE_STRIDE: usize = 2;

/// What the host knows of the step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StepFacts {
    /// Tokens of all sequences.
    pub(super) num_tokens: usize,
    /// Sequences.
    pub(super) num_seqs: usize,
    /// Every sequence has one token.
    pub(super) is_decode: bool,
    /// Tiles of sequences with more than one token.
    pub(super) num_prefill_tiles: usize,
    /// Sequences with one token.
    pub(super) num_decode_seqs: usize,
    /// Longest context.
    pub(super) max_context: usize,
    /// Largest position; none without tokens.
    pub(super) max_position: Option<usize>,
}

/// Offsets of the arrays in elements of 32 bits; each begins at a multiple of 128 bytes.
#[derive(Debug, Clone, Copy)]
struct Layout {
    cu_seqlens_q: usize,
    context_lens: usize,
    prompt_lens: usize,
    decode_seqs: usize,
    logits_rows: usize,
    prefill_tiles: usize,
    input_ids: usize,
    position_ids: usize,
    slot_mapping: usize,
    token_seqs: usize,
    block_tables: usize,
    end: usize,
}

impl Layout {
    fn new(max_tokens: usize, max_seqs: usize, table_elements: usize) -> Self {
        let mut next = 0;
        let mut array = |elements: usize| {
            let at = next;
            next += elements.next_multiple_of(32);
            at
        };
        array(HEADER);
        let max_tiles = max_tokens / QUERY_TILE + max_seqs;
        Self {
            cu_seqlens_q: array(max_seqs + 1),
            context_lens: array(max_seqs),
            prompt_lens: array(max_seqs),
            decode_seqs: array(max_seqs),
            logits_rows: array(max_tokens),
            prefill_tiles: array(2 * max_tiles),
            input_ids: array(max_tokens),
            position_ids: array(max_tokens),
            slot_mapping: array(max_tokens),
            token_seqs: array(max_tokens),
            block_tables: array(table_elements),
            end: next,
        }
    }
}

/// The step's arrays, all of them 32-bit integers.
pub(super) struct StepInputs {
    layout: Layout,
    max_tokens: usize,
    max_seqs: usize,
    staging: PinnedMemory,
    memory: DeviceMemory,
    facts: StepFacts,
    /// Sequences with one token are tiles like others, so that a token is computed in one way wherever it stands.
    is_deterministic: bool,
    /// The cache that slots and tables are known to lie in, as blocks and their size: every layer asks.
    checked: Cell<Option<(usize, usize)>>,
}

impl StepInputs {
    /// Room for steps of `max_tokens` tokens and `max_seqs` sequences, whose block tables have `table_elements` in all;
    /// `is_deterministic` makes tiles of all of them.
    pub(super) fn new(
        context: &Arc<Context>,
        max_tokens: usize,
        max_seqs: usize,
        table_elements: usize,
        is_deterministic: bool,
    ) -> Result<Self, BackendError> {
        let layout = Layout::new(max_tokens, max_seqs, table_elements);
        let bytes = layout.end * size_of::<i32>();
        Ok(Self {
            layout,
            max_tokens,
            max_seqs,
            staging: PinnedMemory::new(context, bytes, "the inputs of steps")?,
            memory: DeviceMemory::zeroed(context, bytes, "the inputs of steps")?,
            facts: StepFacts::default(),
            is_deterministic,
            checked: Cell::new(None),
        })
    }

    /// Puts a step on the device, in stream order. The one before must be done.
    pub(super) fn upload(&mut self, stream: &Stream, step: &StepInput) -> Result<(), BackendError> {
        step_check::check(step)?;
        self.check_room(step)?;
        let layout = self.layout;
        let words = words(self.staging.as_mut_slice());
        let (mut decode_seqs, mut tiles) = (0, 0);
        for (seq, bounds) in step.cu_seqlens_q.windows(2).enumerate() {
            let queries = bounds[1] - bounds[0];
            words[layout.token_seqs + bounds[0] as usize..layout.token_seqs + bounds[1] as usize]
                .fill(seq as u32);
            if queries == 1 && !self.is_deterministic {
                words[layout.decode_seqs + decode_seqs] = seq as u32;
                decode_seqs += 1;
                continue;
            }
            for first in (0..queries).step_by(QUERY_TILE) {
                words[layout.prefill_tiles + 2 * tiles] = seq as u32;
                words[layout.prefill_tiles + 2 * tiles + 1] = first;
                tiles += 1;
            }
        }
        let (num_tokens, num_seqs) = (step.num_tokens(), step.num_seqs());
        let header = [num_tokens, num_seqs, step.max_blocks, tiles, decode_seqs];
        for (at, value) in header.into_iter().enumerate() {
            words[at] = value as u32;
        }
        for (at, array) in [
            (layout.cu_seqlens_q, &step.cu_seqlens_q),
            (layout.context_lens, &step.context_lens),
            (layout.prompt_lens, &step.prompt_lens),
            (layout.logits_rows, &step.logits_rows),
            (layout.input_ids, &step.input_ids),
            (layout.position_ids, &step.position_ids),
            (layout.slot_mapping, &step.slot_mapping),
            (layout.block_tables, &step.block_tables),
        ] {
            words[at..at + array.len()].copy_from_slice(array);
        }
        self.facts = StepFacts {
            num_tokens,
            num_seqs,
            is_decode: step.cu_seqlens_q.windows(2).all(|bounds| bounds[1] - bounds[0] == 1),
            num_prefill_tiles: tiles,
            num_decode_seqs: decode_seqs,
            max_context: step.context_lens.iter().copied().max().unwrap_or(0) as usize,
            max_position: step.position_ids.iter().max().map(|&position| position as usize),
        };
        self.checked.set(None);
        // One copy of everything up to the end of the tables that are used: a few microseconds more than the arrays alone
        // and a call less each.
        let used = (layout.block_tables + step.block_tables.len()) * size_of::<u32>();
        stream.upload(self.memory.ptr(), &self.staging.as_slice()[..used])
    }

    fn check_room(&self, step: &StepInput) -> Result<(), BackendError> {
        let tables = self.layout.end - self.layout.block_tables;
        for (what, found, most) in [
            ("tokens", step.num_tokens(), self.max_tokens),
            ("sequences", step.num_seqs(), self.max_seqs),
            ("logits rows", step.logits_rows.len(), self.max_tokens),
            ("elements of block tables", step.block_tables.len(), tables),
        ] {
            if found > most {
                return Err(BackendError::Device {
                    operation: "beginning a step".to_owned(),
                    reason: format!("{found} {what}, expected at most {most}"),
                });
            }
        }
        Ok(())
    }

    /// That slots and blocks lie within a cache: kernels rely on it.
    pub(super) fn check_cache(&self, num_blocks: usize, block_size: usize) -> Result<(), BackendError> {
        if self.checked.get() == Some((num_blocks, block_size)) {
            return Ok(());
        }
        let words: &[u32] = bytemuck::cast_slice(self.staging.as_slice());
        let (num_tokens, num_seqs) = (self.facts.num_tokens, self.facts.num_seqs);
        let max_blocks = words[BLOCK_TABLE_STRIDE] as usize;
        let array = |at: usize, len: usize| &words[at..at + len];
        CacheUse {
            slot_mapping: array(self.layout.slot_mapping, num_tokens),
            context_lens: array(self.layout.context_lens, num_seqs),
            block_tables: array(self.layout.block_tables, num_seqs * max_blocks),
            max_blocks,
        }
        .check(num_blocks, block_size)?;
        self.checked.set(Some((num_blocks, block_size)));
        Ok(())
    }

    /// What the host knows of the step.
    pub(super) fn facts(&self) -> StepFacts {
        self.facts
    }

    /// Most sequences of a step.
    pub(super) fn max_seqs(&self) -> usize {
        self.max_seqs
    }

    fn at(&self, offset: usize) -> DevicePtr {
        self.memory.ptr() + (offset * size_of::<u32>()) as DevicePtr
    }

    /// `[5]`: see `StepHeader` in `common.cuh`.
    pub(super) fn header(&self) -> DevicePtr {
        self.at(0)
    }

    /// `[num_seqs + 1]`.
    pub(super) fn cu_seqlens_q(&self) -> DevicePtr {
        self.at(self.layout.cu_seqlens_q)
    }

    /// `[num_seqs]`.
    pub(super) fn context_lens(&self) -> DevicePtr {
        self.at(self.layout.context_lens)
    }

    /// `[num_seqs]`.
    pub(super) fn prompt_lens(&self) -> DevicePtr {
        self.at(self.layout.prompt_lens)
    }

    /// `[num_decode_seqs]`: the sequences with one token.
    pub(super) fn decode_seqs(&self) -> DevicePtr {
        self.at(self.layout.decode_seqs)
    }

    /// `[num_prefill_tiles, 2]`: sequence, and index of the tile's first query among the sequence's.
    pub(super) fn prefill_tiles(&self) -> DevicePtr {
        self.at(self.layout.prefill_tiles)
    }

    /// `[num_tokens]`.
    pub(super) fn input_ids(&self) -> DevicePtr {
        self.at(self.layout.input_ids)
    }

    /// `[num_tokens]`.
    pub(super) fn position_ids(&self) -> DevicePtr {
        self.at(self.layout.position_ids)
    }

    /// `[num_tokens]`.
    pub(super) fn slot_mapping(&self) -> DevicePtr {
        self.at(self.layout.slot_mapping)
    }

    /// `[num_tokens]`: each token's sequence.
    pub(super) fn token_seqs(&self) -> DevicePtr {
        self.at(self.layout.token_seqs)
    }

    /// `[num_seqs, header[2]]`.
    pub(super) fn block_tables(&self) -> DevicePtr {
        self.at(self.layout.block_tables)
    }
}

/// Page-locked memory as words.
fn words(bytes: &mut [u8]) -> &mut [u32] {
    bytemuck::cast_slice_mut(bytes)
}
