//! Rotary embeddings: cosines and sines are computed once a step and serve all layers.

use crate::{RopeFrequencies, RopeStyle, StepInput};

/// A rotary embedding, by its place among the backend's.
#[derive(Debug)]
pub struct CpuRope {
    pub(super) id: usize,
    pub(super) frequencies: RopeFrequencies,
}

/// Cosines and sines of one step.
#[derive(Debug, Default)]
pub(super) struct RopeTable {
    /// The step it was made for.
    step: u64,
    /// `[num_tokens, rotary_dim / 2]`, cosine and sine.
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Makes the table for step number `step_number`, unless it is there.
    pub(super) fn prepare(&mut self, frequencies: &RopeFrequencies, step_number: u64, step: &StepInput) {
        if self.step == step_number {
            return;
        }
        self.step = step_number;
        self.turns.clear();
        for (bounds, &prompt_len) in step.cu_seqlens_q.windows(2).zip(&step.prompt_lens) {
            let (inv_freq, scale) = frequencies.for_prompt(prompt_len);
            for &position in &step.position_ids[bounds[0] as usize..bounds[1] as usize] {
                // In f32, as the models were trained: an exact angle would differ from theirs at large positions.
                self.turns.extend(inv_freq.iter().map(|&frequency| {
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    (cos * scale, sin * scale)
                }));
            }
        }
    }

    /// Turns one head of token `token` in place.
    pub(super) fn rotate(&self, frequencies: &RopeFrequencies, token: usize, head: &mut [f32]) {
        let half = frequencies.inv_freq.len();
        let turns = &self.turns[token * half..(token + 1) * half];
        match frequencies.style {
            RopeStyle::Half => {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(turns) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
            RopeStyle::Interleaved => {
                for (pair, &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                    *pair = [pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin];
                }
            }
        }
    }
}
