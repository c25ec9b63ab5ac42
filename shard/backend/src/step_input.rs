//! What one forward pass reads besides weights and cache.

/// The tokens of one forward pass, sequences one after the other. A sequence in decode has one token; one in prefill
/// has its prompt or a chunk of it. Field names are the field's standard ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInput {
    /// `[num_tokens]`.
    pub input_ids: Vec<u32>,
    /// `[num_tokens]`: index of each token in its sequence.
    pub position_ids: Vec<u32>,
    /// `[num_tokens]`: where each token's key and value are stored.
    pub slot_mapping: Vec<u32>,
    /// `[num_seqs + 1]`: sequence `i` owns the tokens `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[num_seqs]`: tokens of the sequence whose keys are in the cache once this step has stored its own. The last
    /// query token of a sequence sees all of them, the one before it one fewer, and so on.
    pub context_lens: Vec<u32>,
    /// `[num_seqs]`: tokens of the sequence's whole prompt, whichever part of it this step has; the same in every step of
    /// the sequence. Rotary embeddings that depend on length choose by it (see [`LongContext`](crate::LongContext)).
    pub prompt_lens: Vec<u32>,
    /// `[num_seqs, max_blocks]` row-major: the sequence's blocks in order; what is past its context is not read.
    pub block_tables: Vec<u32>,
    /// Row width of `block_tables`.
    pub max_blocks: usize,
    /// Indices into the tokens whose logits are wanted, ascending; usually the last token of each sequence.
    pub logits_rows: Vec<u32>,
}

impl StepInput {
    /// The same with sequences added up to `num_seqs`, of one token each, which lie in the reserved block 0 and see only
    /// themselves. For steps of one token a sequence.
    #[must_use]
    pub fn with_idle_sequences(&self, num_seqs: usize) -> Self {
        let mut step = self.clone();
        step.max_blocks = step.max_blocks.max(1);
        step.block_tables = vec![0; num_seqs * step.max_blocks];
        for seq in 0..self.num_seqs() {
            step.block_tables[seq * step.max_blocks..][..self.max_blocks]
                .copy_from_slice(self.block_table(seq));
        }
        let mut tokens = step.num_tokens() as u32;
        for _ in self.num_seqs()..num_seqs {
            tokens += 1;
            step.input_ids.push(0);
            step.position_ids.push(0);
            step.slot_mapping.push(0);
            step.cu_seqlens_q.push(tokens);
            step.context_lens.push(1);
            step.prompt_lens.push(1);
        }
        step
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of sequences.
    pub fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    /// The blocks of sequence `seq`, `[max_blocks]`.
    pub fn block_table(&self, seq: usize) -> &[u32] {
        &self.block_tables[seq * self.max_blocks..(seq + 1) * self.max_blocks]
    }
}
