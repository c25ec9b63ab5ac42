//! From a row of logits to a token, without sorting the vocabulary.
//!
//! Log-probabilities, also of the best tokens, are of the distribution after penalties and warpers, as TGI reports them;
//! a greedy row has penalties only. A masked token's is minus infinity, and it is never reported or drawn.

pub(crate) mod random;
mod warpers;

#[cfg(feature = "cuda")]
use super::isa::Isa;
use super::kernels::Kernels;
use crate::sampling::{Sampled, SamplingRow};

/// Chooses tokens; one for each thread, since it keeps scratch.
pub(crate) struct Sampler {
    kernels: &'static Kernels,
    /// `[vocab_size]`, all zero between calls.
    counts: Vec<u32>,
    candidates: Vec<Candidate>,
}

/// A token that the warpers have left, and its logit, or what the step at work orders by.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    key: f32,
}

impl Sampler {
    pub(super) fn new(kernels: &'static Kernels) -> Self {
        Sampler { kernels, counts: Vec::new(), candidates: Vec::new() }
    }

    /// One with the best kernels of this processor, for backends that leave rare requests to it.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_this_processor() -> Self {
        Self::new(Kernels::of(Isa::detect()))
    }

    /// Chooses one token; `logits` `[vocab_size]` is overwritten.
    pub(crate) fn sample(&mut self, logits: &mut [f32], row: &SamplingRow<'_>) -> Sampled {
        self.penalize(logits, row);
        if row.params.is_greedy() {
            let highest = self.maximum(logits);
            // The lowest id wins a tie. Nothing compares equal when no logit is a number; the first id then.
            let id = logits.iter().position(|&logit| logit == highest).unwrap_or(0);
            let shift = highest + self.sum_exp(logits, highest).ln() as f32;
            return Sampled {
                id: id as u32,
                logprob: logits[id] - shift,
                top: self.top(logits, shift, row.top_n),
            };
        }
        self.warp(logits, row);
        let highest = self.maximum(logits);
        let total = self.sum_exp(logits, highest);
        let shift = highest + total.ln() as f32;
        let id = self.choose(logits, row, shift);
        Sampled { id: id as u32, logprob: logits[id] - shift, top: self.top(logits, shift, row.top_n) }
    }

    fn maximum(&self, logits: &[f32]) -> f32 {
        // SAFETY: the backend chose kernels that the processor has.
        unsafe { (self.kernels.maximum)(logits) }
    }

    fn sum_exp(&self, logits: &[f32], shift: f32) -> f64 {
        // SAFETY: the backend chose kernels that the processor has.
        unsafe { (self.kernels.sum_exp)(logits, shift) }
    }

    /// Repetition penalty, once for each id in the history, then frequency penalty by the id's share of it.
    fn penalize(&mut self, logits: &mut [f32], row: &SamplingRow<'_>) {
        let params = row.params;
        if (params.repetition_penalty == 1.0 && params.frequency_penalty == 0.0) || row.history.is_empty() {
            return;
        }
        if self.counts.len() < logits.len() {
            self.counts.resize(logits.len(), 0);
        }
        let known = || row.history.iter().map(|&id| id as usize).filter(|&id| id < logits.len());
        known().for_each(|id| self.counts[id] += 1);
        let length = row.history.len() as f32;
        for id in known().collect::<Vec<_>>() {
            let count = std::mem::take(&mut self.counts[id]);
            if count > 0 {
                let logit = &mut logits[id];
                let penalty = params.repetition_penalty;
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
                *logit -= params.frequency_penalty * count as f32 / length;
            }
        }
    }

    /// Temperature, top-k, top-p, typical-p: what they drop becomes minus infinity.
    fn warp(&mut self, logits: &mut [f32], row: &SamplingRow<'_>) {
        let params = row.params;
        if params.temperature != 1.0 {
            logits.iter_mut().for_each(|logit| *logit /= params.temperature);
        }
        if params.top_k != 0 {
            warpers::top_k(logits, params.top_k as usize, &mut self.candidates);
        }
        if params.top_p < 1.0 {
            let highest = self.maximum(logits);
            let total = self.sum_exp(logits, highest);
            warpers::top_p(logits, params.top_p, (highest, total), &mut self.candidates);
        }
        if params.typical_p < 1.0 {
            let highest = self.maximum(logits);
            let shift = highest + self.sum_exp(logits, highest).ln() as f32;
            warpers::typical_p(logits, params.typical_p, shift, &mut self.candidates);
        }
    }

    /// Inverts the distribution function, ids ascending, at a random number that only seed and position decide.
    fn choose(&self, logits: &[f32], row: &SamplingRow<'_>, shift: f32) -> usize {
        let uniform = random::uniform(row.params.seed, row.history.len() as u64);
        // First by parts, whose sums are quick, then within the part.
        const PART: usize = 256;
        let parts: Vec<f64> = logits.chunks(PART).map(|part| self.sum_exp(part, shift)).collect();
        let mut target = uniform * parts.iter().sum::<f64>();
        let mut chosen = None;
        for (index, (part, &mass)) in logits.chunks(PART).zip(&parts).enumerate() {
            if mass <= 0.0 {
                continue;
            }
            if target >= mass {
                target -= mass;
                // Should rounding carry the target past the end, the last token with any mass is it.
                chosen = last_possible(part).map(|at| index * PART + at).or(chosen);
                continue;
            }
            for (at, &logit) in part.iter().enumerate() {
                let probability = f64::from((logit - shift).exp());
                if probability > 0.0 {
                    chosen = Some(index * PART + at);
                    if target < probability {
                        break;
                    }
                    target -= probability;
                }
            }
            break;
        }
        chosen.unwrap_or(0)
    }

    /// The `n` best tokens and all that tie with the last of them, best first, lower ids first among equals.
    fn top(&mut self, logits: &[f32], shift: f32, n: u32) -> Vec<(u32, f32)> {
        let n = n as usize;
        if n == 0 {
            return Vec::new();
        }
        let threshold = warpers::nth_largest(logits, n, &mut self.candidates);
        let is_reported = |logit: f32| logit >= threshold && logit > f32::NEG_INFINITY;
        let reported = logits.iter().enumerate().filter(|&(_, &logit)| is_reported(logit));
        let mut top: Vec<(u32, f32)> = reported.map(|(id, &logit)| (id as u32, logit - shift)).collect();
        // Stable: ids stay ascending among equals.
        top.sort_by(|a, b| b.1.total_cmp(&a.1));
        top
    }
}

fn last_possible(part: &[f32]) -> Option<usize> {
    part.iter().rposition(|&logit| logit > f32::NEG_INFINITY)
}
