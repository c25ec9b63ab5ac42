//! Top-k, top-p and typical-p. Each looks at as few tokens as it can.

use super::Candidate;

/// Tokens looked at first, times 8 each time they do not suffice: sorting these is quick, and they nearly always do.
const FIRST_LOOK: usize = 256;

/// The `n`-th largest logit; minus infinity when there are fewer. `scratch` is overwritten.
pub(super) fn nth_largest(logits: &[f32], n: usize, scratch: &mut Vec<Candidate>) -> f32 {
    collect(logits, scratch, |logit| logit);
    if n == 0 || scratch.len() < n {
        return f32::NEG_INFINITY;
    }
    scratch.select_nth_unstable_by(n - 1, |a, b| b.key.total_cmp(&a.key)).1.key
}

/// Keeps the `k` largest and what ties with the last of them.
pub(super) fn top_k(logits: &mut [f32], k: usize, scratch: &mut Vec<Candidate>) {
    let threshold = nth_largest(logits, k, scratch);
    mask(logits, |logit| logit < threshold);
}

/// Keeps the smallest set with at least mass `p`, lower ids first among equals, and at least one token. `softmax` is the
/// largest logit and the sum of exponentials relative to it.
pub(super) fn top_p(logits: &mut [f32], p: f32, softmax: (f32, f64), scratch: &mut Vec<Candidate>) {
    let (highest, total) = softmax;
    collect(logits, scratch, |logit| -logit);
    let wanted = f64::from(p) * total;
    let kept = smallest_prefix(scratch, |key| f64::from((-key - highest).exp()), wanted);
    keep_only(logits, &scratch[..kept]);
}

/// Keeps those whose surprise is nearest to the expected one (arXiv:2202.00666) up to mass `p`, and what ties with the
/// last of them. `shift` is the logarithm of the sum of exponentials.
pub(super) fn typical_p(logits: &mut [f32], p: f32, shift: f32, scratch: &mut Vec<Candidate>) {
    let logprob = |logit: f32| logit - shift;
    let possible = || logits.iter().filter(|&&logit| logit > f32::NEG_INFINITY);
    let entropy: f64 = possible().map(|&logit| -f64::from(logprob(logit).exp() * logprob(logit))).sum();
    let distance = |logit: f32| (-logprob(logit) - entropy as f32).abs();
    collect(logits, scratch, distance);
    // The mass below an id is needed beside its distance, so it is looked up.
    let mass = |candidate: &Candidate| f64::from(logprob(logits[candidate.id as usize]).exp());
    let kept = smallest_prefix_of(scratch, mass, f64::from(p));
    let Some(last) = scratch[..kept].last().map(|candidate| candidate.key) else { return };
    mask(logits, |logit| distance(logit) > last);
}

/// All possible tokens with `key` of their logit.
fn collect(logits: &[f32], scratch: &mut Vec<Candidate>, key: impl Fn(f32) -> f32) {
    scratch.clear();
    let possible = logits.iter().enumerate().filter(|&(_, &logit)| logit > f32::NEG_INFINITY);
    scratch.extend(possible.map(|(id, &logit)| Candidate { id: id as u32, key: key(logit) }));
}

fn mask(logits: &mut [f32], is_dropped: impl Fn(f32) -> bool) {
    for logit in logits {
        if is_dropped(*logit) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn keep_only(logits: &mut [f32], kept: &[Candidate]) {
    // Kept tokens' logits are put aside in order of id, so that one pass over the row suffices.
    let saved: Vec<(u32, f32)> =
        kept.iter().map(|candidate| (candidate.id, logits[candidate.id as usize])).collect();
    logits.fill(f32::NEG_INFINITY);
    for (id, logit) in saved {
        logits[id as usize] = logit;
    }
}

fn smallest_prefix(candidates: &mut [Candidate], mass: impl Fn(f32) -> f64, wanted: f64) -> usize {
    smallest_prefix_of(candidates, |candidate| mass(candidate.key), wanted)
}

/// Orders candidates by key, then id, as far as needed, and says how many of the first have at least mass `wanted`: at
/// least one, if there is one, and all when the mass does not suffice.
fn smallest_prefix_of(candidates: &mut [Candidate], mass: impl Fn(&Candidate) -> f64, wanted: f64) -> usize {
    let order = |a: &Candidate, b: &Candidate| a.key.total_cmp(&b.key).then(a.id.cmp(&b.id));
    let mut sorted = 0;
    let mut sum = 0.0;
    let mut look = FIRST_LOOK;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let count = look.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, order);
        }
        rest[..count].sort_unstable_by(order);
        for (index, candidate) in rest[..count].iter().enumerate() {
            sum += mass(candidate);
            if sum >= wanted {
                return sorted + index + 1;
            }
        }
        sorted += count;
        look *= 8;
    }
    candidates.len()
}
