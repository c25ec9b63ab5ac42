//! Greedy choice, penalties, log-probabilities and best tokens: what is exact.

use backend::Backend;
use backend::sampling::{Sampled, SamplingParams, SamplingRow};

use crate::cases::{Random, on_every_backend, upload};
use crate::tolerances::{LOGPROB, assert_close};

/// Nothing on.
pub(crate) fn plain() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        do_sample: false,
        seed: 0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
    }
}

/// Samples one row.
pub(crate) fn one<B: Backend>(backend: &mut B, logits: &[f32], row: SamplingRow<'_>) -> Sampled {
    let mut buffer = upload(backend, logits, logits.len());
    backend.sample(&mut buffer, &[row]).unwrap().remove(0)
}

/// Log-softmax.
pub(crate) fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let highest = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let total: f64 = logits.iter().map(|x| (x - highest).exp()).sum();
    logits.iter().map(|x| x - highest - total.ln()).collect()
}

pub(crate) fn wide(logits: &[f32]) -> Vec<f64> {
    logits.iter().map(|&x| f64::from(x)).collect()
}

fn greedy<B: Backend>(backend: &mut B) {
    let mut random = Random(10);
    let params = plain();
    for vocab in [1, 3, 17, 1000, 49_152] {
        let rows = 5;
        let mut logits: Vec<f32> = random.vector(rows * vocab).iter().map(|x| x * 4.0).collect();
        // A tie: the lower id is to win.
        if vocab > 20 {
            (logits[vocab - 1], logits[vocab / 2]) = (50.0, 50.0);
        }
        let mut buffer = upload(backend, &logits, vocab);
        let inputs = vec![SamplingRow { params: &params, history: &[1, 2], top_n: 0 }; rows];
        let sampled = backend.sample(&mut buffer, &inputs).unwrap();
        let targets: Vec<u32> = sampled.iter().map(|sampled| sampled.id).collect();
        let buffer = upload(backend, &logits, vocab);
        let logprobs = backend.token_logprobs(&buffer, &targets).unwrap();
        for (row, (logits, sampled)) in logits.chunks(vocab).zip(&sampled).enumerate() {
            let expected = log_softmax(&wide(logits));
            let best = expected.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
            assert_eq!(sampled.id as usize, best.0);
            let found = [sampled.logprob, logprobs[row]];
            assert_close("logprob", &found, &[*best.1; 2], &[20.0; 2], LOGPROB);
        }
    }
}

#[test]
fn greedy_takes_the_first_of_the_best_and_its_logprob() {
    on_every_backend!(greedy);
}

fn penalties<B: Backend>(backend: &mut B) {
    let logits = [2.0, 1.9, -1.0, 0.5, 1.8];
    let params = SamplingParams { repetition_penalty: 2.0, frequency_penalty: 0.5, ..plain() };
    // Id 9 is outside of this vocabulary.
    let history = [0, 0, 2, 9];
    let found = one(backend, &logits, SamplingRow { params: &params, history: &history, top_n: 5 });
    let expected = log_softmax(&[1.0 - 0.5 * 2.0 / 4.0, 1.9, -2.0 - 0.5 / 4.0, 0.5, 1.8]);
    assert_eq!(found.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 4, 0, 3, 2]);
    for (id, logprob) in found.top {
        assert_close("penalized", &[logprob], &[expected[id as usize]], &[1.0], LOGPROB);
    }
    assert_eq!(found.id, 1);
}

#[test]
fn penalties_come_before_logprobs() {
    on_every_backend!(penalties);
}

fn best_tokens<B: Backend>(backend: &mut B) {
    let logits = [0.0, 3.0, 1.0, 3.0, 1.0, 1.0, -2.0];
    let params = plain();
    let ids = |backend: &mut B, params: &SamplingParams, top_n: u32| {
        let found = one(backend, &logits, SamplingRow { params, history: &[], top_n });
        found.top.iter().map(|top| top.0).collect::<Vec<_>>()
    };
    assert_eq!(ids(backend, &params, 0), []);
    assert_eq!(ids(backend, &params, 1), [1, 3]);
    assert_eq!(ids(backend, &params, 3), [1, 3, 2, 4, 5]);
    assert_eq!(ids(backend, &params, 6), [1, 3, 2, 4, 5, 0]);
    assert_eq!(ids(backend, &params, 20), [1, 3, 2, 4, 5, 0, 6]);
    // Masked tokens are not reported.
    let params = SamplingParams { top_k: 2, ..plain() };
    assert_eq!(ids(backend, &params, 5), [1, 3]);
}

#[test]
fn best_tokens_come_with_their_ties() {
    on_every_backend!(best_tokens);
}

/// One of the parameters on.
fn mixed_params(seed: u64) -> [SamplingParams; 6] {
    let on = SamplingParams { do_sample: true, seed, ..plain() };
    [
        plain(),
        on.clone(),
        SamplingParams { temperature: 0.7, top_k: 20, ..on.clone() },
        SamplingParams { top_p: 0.9, ..on.clone() },
        SamplingParams { typical_p: 0.8, repetition_penalty: 1.3, ..on.clone() },
        SamplingParams {
            temperature: 1.5,
            top_k: 50,
            top_p: 0.8,
            typical_p: 0.9,
            frequency_penalty: 0.4,
            ..on
        },
    ]
}

fn batch_equals_single<B: Backend>(backend: &mut B) {
    let mut random = Random(11);
    let vocab = 3001;
    let params: Vec<SamplingParams> = (0..4).flat_map(mixed_params).collect();
    let logits: Vec<f32> = random.vector(params.len() * vocab).iter().map(|x| x * 2.0).collect();
    let history = [3, 4, 4, 5];
    let row = |params| SamplingRow { params, history: &history, top_n: 3 };
    let mut buffer = upload(backend, &logits, vocab);
    let rows: Vec<_> = params.iter().map(row).collect();
    let together = backend.sample(&mut buffer, &rows).unwrap();
    for (index, params) in params.iter().enumerate() {
        let alone = one(backend, &logits[index * vocab..(index + 1) * vocab], row(params));
        assert_eq!(alone, together[index], "{params:?}");
    }
}

#[test]
fn a_row_alone_equals_the_row_in_a_batch() {
    on_every_backend!(batch_equals_single);
}
