//! Rotary embeddings: cosines and sines are computed once a step and serve all layers.

use crate::{RopeFrequencies, RopeStyle};

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
    /// Makes the table for step number `step`, unless it is there.
    pub(super) fn prepare(&mut self, frequencies: &RopeFrequencies, step: u64, position_ids: &[u32]) {
        if self.step == step {
            return;
        }
        self.step = step;
        self.turns.clear();
        let scale = frequencies.scale;
        for &position in position_ids {
            // In f32, as the models were trained: an exact angle would differ from theirs at large positions.
            self.turns.extend(frequencies.inv_freq.iter().map(|&frequency| {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                (cos * scale, sin * scale)
            }));
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
