//! From sequences to the arrays a forward pass reads.

use backend::StepInput;

use super::sequence::Sequence;

/// Consecutive tokens of one sequence that a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    /// Index of the sequence in its batch.
    pub sequence: usize,
    /// Its first token.
    pub from: usize,
    /// How many, at least one.
    pub len: usize,
}

/// Distributes rows over passes of at most `max_tokens` tokens, in order; a row that does not fit is continued in the
/// next pass.
pub(super) fn cut_into_passes(rows: impl Iterator<Item = Row>, max_tokens: usize) -> Vec<Vec<Row>> {
    let max_tokens = max_tokens.max(1);
    let mut passes: Vec<Vec<Row>> = Vec::new();
    let mut room = 0;
    for mut row in rows {
        while row.len > 0 {
            if room == 0 {
                passes.push(Vec::new());
                room = max_tokens;
            }
            let part = Row { len: row.len.min(room), ..row };
            room -= part.len;
            row.from += part.len;
            row.len -= part.len;
            if let Some(pass) = passes.last_mut() {
                pass.push(part);
            }
        }
    }
    passes
}

/// Whether the logits after the row's last token choose the sequence's next token.
pub(super) fn is_sampled(row: &Row, sequence: &Sequence) -> bool {
    row.from + row.len == sequence.ids.len()
}

/// Fills `step` with the tokens of one pass. Its memory is used again.
pub(super) fn write_step(step: &mut StepInput, sequences: &[Sequence], rows: &[Row], block_size: usize) {
    step.input_ids.clear();
    step.position_ids.clear();
    step.slot_mapping.clear();
    step.cu_seqlens_q.clear();
    step.context_lens.clear();
    step.prompt_lens.clear();
    step.block_tables.clear();
    step.logits_rows.clear();
    step.max_blocks = rows.iter().map(|row| (row.from + row.len).div_ceil(block_size)).max().unwrap_or(0);
    step.cu_seqlens_q.push(0);
    for row in rows {
        let sequence = &sequences[row.sequence];
        let end = row.from + row.len;
        step.input_ids.extend_from_slice(&sequence.ids[row.from..end]);
        // Positions and slots are below the number of blocks times their size, which the pool keeps in 32 bits.
        step.position_ids.extend(row.from as u32..end as u32);
        step.slot_mapping.extend((row.from..end).map(|position| {
            sequence.blocks[position / block_size] * block_size as u32 + (position % block_size) as u32
        }));
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(end as u32);
        step.prompt_lens.push(sequence.prompt_len as u32);
        let blocks = &sequence.blocks[..end.div_ceil(block_size)];
        step.block_tables.extend_from_slice(blocks);
        step.block_tables.resize(step.context_lens.len() * step.max_blocks, 0);
        if is_sampled(row, sequence) {
            step.logits_rows.push(step.input_ids.len() as u32 - 1);
        }
    }
}

/// The prompt tokens of one pass whose successors' log-probabilities are wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PromptTargets {
    /// Indices into the pass's tokens.
    pub rows: Vec<u32>,
    /// The token that follows each in its prompt.
    pub targets: Vec<u32>,
    /// For each sequence concerned, its index and how many of the rows are its.
    pub counts: Vec<(usize, usize)>,
}

/// Finds the [`PromptTargets`] of a pass.
pub(super) fn prompt_targets(sequences: &[Sequence], rows: &[Row]) -> PromptTargets {
    let mut answer = PromptTargets::default();
    let mut first = 0;
    for row in rows {
        let sequence = &sequences[row.sequence];
        if sequence.prompt_logprobs.is_some() {
            // The last token of the prompt is followed by the answer.
            let end = (row.from + row.len).min(sequence.prompt_len - 1);
            let count = end.saturating_sub(row.from);
            answer.rows.extend(first..first + count as u32);
            answer.targets.extend_from_slice(&sequence.ids[row.from + 1..row.from + 1 + count]);
            answer.counts.push((row.sequence, count));
        }
        first += row.len as u32;
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{Fixture, request};

    #[test]
    fn long_rows_are_continued_in_the_next_pass() {
        let rows = [
            Row { sequence: 0, from: 4, len: 3 },
            Row { sequence: 1, from: 0, len: 6 },
            Row { sequence: 2, from: 9, len: 1 },
        ];
        let passes = cut_into_passes(rows.into_iter(), 5);
        let row = |sequence, from, len| Row { sequence, from, len };
        assert_eq!(passes, [vec![row(0, 4, 3), row(1, 0, 2)], vec![row(1, 2, 4), row(2, 9, 1)]]);
        assert!(cut_into_passes(std::iter::empty(), 5).is_empty());
    }

    #[test]
    fn arrays_describe_ragged_sequences() {
        let fixture = Fixture::new();
        let mut long = request(1, 20);
        long.blocks = vec![7, 3];
        long.slots = (112..128).chain(48..52).collect();
        let mut short = request(2, 2);
        short.blocks = vec![5];
        let sequences = [fixture.sequence(long), fixture.sequence(short)];
        let rows = [Row { sequence: 0, from: 14, len: 4 }, Row { sequence: 1, from: 0, len: 2 }];
        let mut step = StepInput { logits_rows: vec![9], ..StepInput::default() };
        write_step(&mut step, &sequences, &rows, 16);
        assert_eq!(step.input_ids, [&sequences[0].ids[14..18], &sequences[1].ids].concat());
        assert_eq!(step.position_ids, [14, 15, 16, 17, 0, 1]);
        assert_eq!(step.slot_mapping, [126, 127, 48, 49, 80, 81]);
        assert_eq!(step.cu_seqlens_q, [0, 4, 6]);
        assert_eq!(step.context_lens, [18, 2]);
        assert_eq!(step.prompt_lens, [20, 2], "of the whole prompt, not of the chunk");
        assert_eq!((step.max_blocks, step.block_tables), (2, vec![7, 3, 5, 0]));
        assert_eq!(step.logits_rows, [5], "the first sequence has prompt left");
    }

    #[test]
    fn the_last_prompt_token_has_no_target() {
        let fixture = Fixture::new();
        let mut wanted = request(1, 4);
        wanted.prefill_logprobs = true;
        let sequences = [fixture.sequence(request(2, 3)), fixture.sequence(wanted)];
        let rows = [Row { sequence: 0, from: 0, len: 3 }, Row { sequence: 1, from: 0, len: 4 }];
        let found = prompt_targets(&sequences, &rows);
        assert_eq!((found.rows, found.counts), (vec![3, 4, 5], vec![(1, 3)]));
        assert_eq!(found.targets, sequences[1].ids[1..]);
    }
}
