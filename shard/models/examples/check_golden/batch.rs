//! Runs prompts through a model, some at a time, and compares.

use backend::Backend;
use backend::sampling::{SamplingParams, SamplingRow};
use models::{CausalLm, Decoder};

use crate::Failure;
use crate::golden::Case;
use crate::steps::{self, Sequence, parts, step};

/// Below this gap the reference itself could have chosen otherwise, unless `--near-tie` says another.
pub(crate) const NEAR_TIE: f64 = 0.02;

/// What came of one prompt.
#[derive(Clone, PartialEq, Default)]
pub(crate) struct Outcome {
    pub(crate) ids: Vec<u32>,
    /// Steps before the first near-tie.
    pub(crate) comparable: usize,
    /// Steps of those whose ids are equal.
    pub(crate) equal: usize,
    pub(crate) worst_generated: f64,
    pub(crate) worst_last: f64,
    pub(crate) worst_prefill: f64,
}

/// A prompt under way.
struct Kept<'a> {
    case: &'a Case,
    outcome: Outcome,
}

/// Blocks that a prompt and its answer take.
pub(crate) fn num_blocks(case: &Case) -> usize {
    steps::num_blocks(case.input_ids.len() + case.generated_ids.len())
}

/// Computes all `cases` in the same steps, at most `chunk` tokens of a prompt at a time; ids are compared up to the first gap
/// below `near_tie`.
pub(crate) fn check<B: Backend>(
    decoder: &mut Decoder<B>,
    cases: &[&Case],
    (chunk, near_tie): (usize, f64),
) -> Result<Vec<Outcome>, Failure> {
    let mut next_block = 1;
    let mut sequences: Vec<Sequence<Kept<'_>>> = cases
        .iter()
        .map(|case| {
            let comparable = case.gaps.iter().position(|&gap| gap < near_tie).unwrap_or(case.gaps.len());
            let kept = Kept { case, outcome: Outcome { comparable, ..Outcome::default() } };
            Sequence::new(case.input_ids.clone(), case.generated_ids.len(), &mut next_block, kept)
        })
        .collect();
    loop {
        let parts = parts(&mut sequences, chunk, decoder.info().max_step_tokens);
        if parts.is_empty() {
            return Ok(sequences.into_iter().map(|sequence| sequence.kept.outcome).collect());
        }
        decoder.forward(&step(&parts))?;
        compare(decoder, parts)?;
    }
}

/// Compares what a step gave, and appends the generated tokens.
fn compare<B: Backend>(
    decoder: &mut Decoder<B>,
    parts: Vec<(&mut Sequence<Kept<'_>>, usize)>,
) -> Result<(), Failure> {
    let worst = |worst: &mut f64, found: f64, expected: f64| *worst = worst.max((found - expected).abs());
    let mut first_row = 0;
    let mut sampled = Vec::new();
    for (sequence, len) in parts {
        let Sequence { ids, cached, kept: Kept { case, outcome }, .. } = &mut *sequence;
        let prompt = &case.input_ids;
        // The targets are the prompt's following tokens; after its last one there is none.
        let targets = prompt.get(*cached + 1..(*cached + len + 1).min(prompt.len())).unwrap_or_default();
        if !targets.is_empty() {
            let rows: Vec<u32> = (first_row as u32..).take(targets.len()).collect();
            let logprobs = decoder.token_logprobs(&rows, targets)?;
            for (logprob, &expected) in logprobs.iter().zip(case.prefill.iter().skip(*cached)) {
                worst(&mut outcome.worst_prefill, f64::from(*logprob), expected);
            }
        }
        first_row += len;
        *cached += len;
        if *cached < ids.len() {
            continue;
        }
        if ids.len() == prompt.len() {
            let logprobs = log_softmax(&decoder.read_logits(&[first_row as u32 - 1])?);
            for (logprob, &expected) in logprobs.iter().zip(&case.last_logprobs) {
                worst(&mut outcome.worst_last, *logprob, expected);
            }
        }
        sampled.push(sequence);
    }
    let histories: Vec<Vec<u32>> = sampled.iter().map(|sequence| sequence.ids.clone()).collect();
    let rows: Vec<_> =
        histories.iter().map(|history| SamplingRow { params: &GREEDY, history, top_n: 0 }).collect();
    let tokens = if rows.is_empty() { Vec::new() } else { decoder.sample(&rows)? };
    for (sequence, token) in sampled.into_iter().zip(tokens) {
        let Sequence { ids, is_done, kept: Kept { case, outcome }, .. } = sequence;
        let index = ids.len() - case.input_ids.len();
        outcome.ids.push(token.id);
        if index >= outcome.comparable || token.id != case.generated_ids[index] {
            *is_done = true;
            continue;
        }
        outcome.equal += 1;
        worst(&mut outcome.worst_generated, f64::from(token.logprob), case.logprobs[index]);
        ids.push(token.id);
        *is_done = index + 1 == case.generated_ids.len();
    }
    Ok(())
}

const GREEDY: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    typical_p: 1.0,
    do_sample: false,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
};

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - max) - sum.ln()).collect()
}
