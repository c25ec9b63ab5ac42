//! Chooses experts from router logits.

use crate::{ExpertGroups, GroupRank, RouterScores, Routing, WeightNormalization};

/// An expert that a token is sent to, and its weight.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Choice {
    pub(super) expert: usize,
    pub(super) weight: f32,
}

/// Memory for one token.
#[derive(Debug, Default)]
pub(super) struct Router {
    /// Weights of experts.
    scores: Vec<f32>,
    /// What they are chosen by.
    ranks: Vec<f32>,
    is_taken: Vec<bool>,
    groups: Vec<f32>,
}

impl Router {
    /// Chooses `chosen.len()` experts of one token, written in the order of their indices.
    pub(super) fn choose(
        &mut self,
        logits: &[f32],
        correction: Option<&[f32]>,
        routing: &Routing,
        chosen: &mut [Choice],
    ) {
        self.is_taken.clear();
        self.is_taken.resize(logits.len(), false);
        match routing.scores {
            RouterScores::SparseMixer { jitter } => self.choose_sparse(logits, jitter, chosen),
            RouterScores::Softmax | RouterScores::Sigmoid => {
                self.score(logits, routing.scores);
                self.ranks.clone_from(&self.scores);
                if let Some(correction) = correction {
                    self.ranks.iter_mut().zip(correction).for_each(|(rank, correction)| *rank += correction);
                }
                if let Some(groups) = &routing.groups {
                    self.limit(groups);
                }
                for choice in chosen.iter_mut() {
                    let expert = largest(&self.ranks, &self.is_taken);
                    self.is_taken[expert] = true;
                    *choice = Choice { expert, weight: self.scores[expert] };
                }
            }
        }
        weigh(chosen, routing);
        chosen.sort_unstable_by_key(|choice| choice.expert);
    }

    fn score(&mut self, logits: &[f32], kind: RouterScores) {
        self.scores.clear();
        if kind == RouterScores::Sigmoid {
            self.scores.extend(logits.iter().map(|&logit| 1.0 / (1.0 + (-logit).exp())));
            return;
        }
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.scores.extend(logits.iter().map(|&logit| (logit - highest).exp()));
        let total: f32 = self.scores.iter().sum();
        self.scores.iter_mut().for_each(|score| *score /= total);
    }

    /// Makes the ranks of all but the best groups zero.
    fn limit(&mut self, groups: &ExpertGroups) {
        let size = self.ranks.len() / groups.count;
        self.groups.clear();
        self.groups.extend(self.ranks.chunks_exact(size).map(|ranks| {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &rank in ranks {
                if rank > first {
                    (first, second) = (rank, first);
                } else if rank > second {
                    second = rank;
                }
            }
            match groups.rank {
                GroupRank::Largest => first,
                GroupRank::LargestTwo => first + second,
            }
        }));
        let is_best = &mut self.is_taken[..groups.count];
        for _ in 0..groups.num_chosen {
            let best = largest(&self.groups, is_best);
            is_best[best] = true;
        }
        for (ranks, is_best) in self.ranks.chunks_exact_mut(size).zip(is_best) {
            if !std::mem::take(is_best) {
                ranks.fill(0.0);
            }
        }
    }

    fn choose_sparse(&mut self, logits: &[f32], jitter: f32, chosen: &mut [Choice]) {
        for choice in chosen {
            let expert = largest(logits, &self.is_taken);
            let highest = logits[expert];
            let is_far = |logit: f32| (highest - logit) / logit.abs().max(highest) > 2.0 * jitter;
            let left =
                logits.iter().zip(&self.is_taken).filter(|&(&logit, &is_taken)| !is_taken && !is_far(logit));
            let total: f32 = left.map(|(&logit, _)| (logit - highest).exp()).sum();
            self.is_taken[expert] = true;
            *choice = Choice { expert, weight: 1.0 / total };
        }
    }
}

/// Index of the largest value that is not taken, the first of equals.
fn largest(values: &[f32], is_taken: &[bool]) -> usize {
    let mut best = is_taken.iter().position(|&is_taken| !is_taken).unwrap_or(0);
    for (index, &value) in values.iter().enumerate() {
        if !is_taken[index] && value > values[best] {
            best = index;
        }
    }
    best
}

/// Divides and multiplies the weights.
fn weigh(chosen: &mut [Choice], routing: &Routing) {
    let weights = chosen.iter().map(|choice| choice.weight);
    let divisor = match routing.normalization {
        WeightNormalization::None => 1.0,
        // Logistic scores may all vanish.
        WeightNormalization::Sum => weights.sum::<f32>() + 1e-20,
        WeightNormalization::Norm(p) => weights.map(|weight| weight.abs().powf(p)).sum::<f32>().powf(1.0 / p),
    };
    chosen.iter_mut().for_each(|choice| choice.weight = choice.weight / divisor * routing.scale);
}
