//! Random choice: its distribution over many draws, what it never draws, and what decides it.

use backend::sampling::{Sampled, SamplingParams, SamplingRow};
use backend::{Backend, DType};

use crate::cases::{Random, best_cpu, matrix, on_every_backend, prompt, upload};
use crate::sampling::{log_softmax, one, plain, wide};

const DRAWS: usize = 20_000;

/// The distribution that the warpers leave, by full sorts.
fn reference(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut logits: Vec<f64> = wide(logits).iter().map(|x| x / f64::from(params.temperature)).collect();
    let probabilities =
        |logits: &[f64]| -> Vec<f64> { log_softmax(logits).iter().map(|x| x.exp()).collect() };
    if params.top_k > 0 {
        let mut sorted = logits.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let threshold = sorted[(params.top_k as usize).min(sorted.len()) - 1];
        logits.iter_mut().filter(|x| **x < threshold).for_each(|x| *x = f64::NEG_INFINITY);
    }
    let keep = |logits: &mut Vec<f64>, mut order: Vec<usize>, mass: f64| {
        let p = probabilities(logits);
        let mut sum = 0.0;
        let kept = order.iter().position(|&id| {
            sum += p[id];
            sum >= mass
        });
        for id in order.split_off(kept.map_or(order.len(), |kept| kept + 1)) {
            logits[id] = f64::NEG_INFINITY;
        }
    };
    if params.top_p < 1.0 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        keep(&mut logits, order, f64::from(params.top_p));
    }
    if params.typical_p < 1.0 {
        let logprobs = log_softmax(&logits);
        let possible = logprobs.iter().filter(|x| x.is_finite());
        let entropy: f64 = possible.map(|x| -x.exp() * x).sum();
        let distance = |id: usize| (-logprobs[id] - entropy).abs();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        keep(&mut logits, order, f64::from(params.typical_p));
    }
    probabilities(&logits)
}

/// Draws at many positions at once: each row of the batch has its own history length.
fn draw<B: Backend>(backend: &mut B, logits: &[f32], params: &SamplingParams, draws: usize) -> Vec<u32> {
    const ROWS: usize = 500;
    let vocab = logits.len();
    let history = vec![vocab as u32; draws];
    let repeated = logits.repeat(ROWS);
    let mut found = Vec::new();
    for start in (0..draws).step_by(ROWS) {
        let mut buffer = upload(backend, &repeated, vocab);
        let rows: Vec<_> = (start..start + ROWS)
            .map(|length| SamplingRow { params, history: &history[..length], top_n: 0 })
            .collect();
        found.extend(backend.sample(&mut buffer, &rows).unwrap().iter().map(|sampled| sampled.id));
    }
    found
}

fn draws_follow<B: Backend>(backend: &mut B, params: &SamplingParams, vocab: usize) {
    let mut random = Random(12 + vocab as u64);
    let logits: Vec<f32> = random.vector(vocab).iter().map(|x| x * 1.5).collect();
    let expected = reference(&logits, params);
    let mut counts = vec![0usize; vocab];
    draw(backend, &logits, params, DRAWS).iter().for_each(|&id| counts[id as usize] += 1);
    let mut chi_square = 0.0;
    let mut degrees = -1.0;
    for (id, (&count, &probability)) in counts.iter().zip(&expected).enumerate() {
        if probability == 0.0 {
            assert_eq!(count, 0, "{params:?} drew the forbidden token {id}");
        } else {
            let mean = probability * DRAWS as f64;
            chi_square += (count as f64 - mean).powi(2) / mean;
            degrees += 1.0;
        }
    }
    // Mean plus five standard deviations of the chi-square distribution; seeds are fixed, so it never fails by chance.
    let bound = degrees + 5.0 * (2.0 * f64::max(degrees, 1.0)).sqrt();
    assert!(chi_square <= bound, "{params:?}: chi square {chi_square} for {degrees} degrees of freedom");
}

fn follow_the_distribution<B: Backend>(backend: &mut B) {
    let on = SamplingParams { do_sample: true, seed: 17, ..plain() };
    for params in [
        on.clone(),
        SamplingParams { temperature: 0.5, ..on.clone() },
        SamplingParams { temperature: 2.0, top_k: 7, ..on.clone() },
        SamplingParams { top_p: 0.8, ..on.clone() },
        SamplingParams { top_p: 0.01, ..on.clone() },
        SamplingParams { typical_p: 0.6, ..on.clone() },
        SamplingParams { temperature: 1.3, top_k: 30, top_p: 0.9, typical_p: 0.7, ..on },
    ] {
        draws_follow(backend, &params, 40);
    }
}

#[test]
fn draws_follow_the_warped_distribution() {
    on_every_backend!(follow_the_distribution);
}

/// Beyond the first look of the warpers (256 tokens) and over several parts of the search.
fn keep_the_same_tokens<B: Backend>(backend: &mut B) {
    let mut random = Random(13);
    let vocab = 5000;
    let logits: Vec<f32> = random.vector(vocab).iter().map(|x| x * 0.3).collect();
    let on = SamplingParams { do_sample: true, ..plain() };
    for params in [
        SamplingParams { top_p: 0.9, ..on.clone() },
        SamplingParams { typical_p: 0.9, ..on.clone() },
        SamplingParams { top_k: 1000, top_p: 0.95, ..on },
    ] {
        let expected = reference(&logits, &params);
        let found = one(backend, &logits, SamplingRow { params: &params, history: &[], top_n: vocab as u32 });
        let kept = expected.iter().filter(|&&p| p > 0.0).count();
        // The last token is at the edge, where f32 and f64 may differ.
        assert!(
            found.top.len().abs_diff(kept) <= 1,
            "{params:?}: {} tokens instead of {kept}",
            found.top.len()
        );
        let total: f64 = found.top.iter().map(|top| f64::from(top.1).exp()).sum();
        assert!((total - 1.0).abs() < 1e-4, "{params:?}: the reported tokens have mass {total}");
    }
}

#[test]
fn large_vocabularies_keep_the_same_tokens() {
    on_every_backend!(keep_the_same_tokens);
}

/// Parameters that shape the distribution of a whole vocabulary, and histories for them.
fn shapes(random: &mut Random, vocab: usize) -> Vec<(SamplingParams, Vec<u32>)> {
    let on = SamplingParams { do_sample: true, ..plain() };
    let shapes = [
        on.clone(),
        SamplingParams { temperature: 0.6, ..on.clone() },
        SamplingParams { top_k: 40, ..on.clone() },
        SamplingParams { top_k: 3000, temperature: 1.7, ..on.clone() },
        SamplingParams { top_p: 0.95, temperature: 0.8, ..on.clone() },
        SamplingParams { top_p: 0.3, ..on.clone() },
        SamplingParams { top_k: 50, top_p: 0.9, temperature: 0.7, repetition_penalty: 1.2, ..on.clone() },
        SamplingParams { top_p: 0.99, repetition_penalty: 0.8, frequency_penalty: 2.0, ..on.clone() },
        SamplingParams { typical_p: 0.7, ..on },
        plain(),
        SamplingParams { repetition_penalty: 1.4, frequency_penalty: 0.3, ..plain() },
    ];
    let mut rows = Vec::new();
    for seed in 0..8 {
        for params in &shapes {
            let length = 1 + random.below(700);
            let history = (0..length).map(|_| random.below(vocab.min(900)) as u32).collect();
            rows.push((SamplingParams { seed, ..params.clone() }, history));
        }
    }
    rows
}

/// Every backend chooses what the CPU chooses, except where rounding decides.
fn chooses_as_the_cpu<B: Backend>(backend: &mut B) {
    for (vocab, spread) in [(128_256, 2.5), (50_257, 1.0), (1000, 4.0)] {
        let mut random = Random(vocab as u64);
        let rows = shapes(&mut random, vocab);
        let logits: Vec<f32> = random.vector(rows.len() * vocab).iter().map(|x| x * spread).collect();
        let inputs: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(index, (params, history))| SamplingRow { params, history, top_n: index as u32 % 7 })
            .collect();
        let mut buffer = upload(backend, &logits, vocab);
        let found = backend.sample(&mut buffer, &inputs).unwrap();
        let mut cpu = best_cpu();
        let mut buffer = upload(&mut cpu, &logits, vocab);
        let expected = cpu.sample(&mut buffer, &inputs).unwrap();
        let mut different = 0;
        for ((found, expected), (params, _)) in found.iter().zip(&expected).zip(&rows) {
            let ids = |sampled: &Sampled| sampled.top.iter().map(|top| top.0).collect::<Vec<_>>();
            if found.id != expected.id || ids(found) != ids(expected) {
                different += 1;
                continue;
            }
            // The set that is kept may differ by its last token, of which the others share the mass.
            let near = (found.logprob - expected.logprob).abs() < 2e-4;
            assert!(near, "{params:?}: {} and {}", found.logprob, expected.logprob);
        }
        assert!(different <= rows.len() / 40, "{different} of {} rows of {vocab} differ", rows.len());
    }
}

#[test]
fn backends_choose_alike() {
    on_every_backend!(chooses_as_the_cpu);
}

fn decided_by_seed_and_position<B: Backend>(backend: &mut B) {
    let mut random = Random(14);
    let logits = random.vector(60);
    let params = |seed| SamplingParams { do_sample: true, seed, ..plain() };
    let first = draw(backend, &logits, &params(1), 500);
    assert_eq!(first, draw(backend, &logits, &params(1), 500), "the same seed and positions");
    let other = draw(backend, &logits, &params(2), 500);
    let equal = first.iter().zip(&other).filter(|(a, b)| a == b).count();
    assert!(equal < 60, "another seed draws other tokens: {equal} of 500 are equal");
    assert!(first.windows(2).any(|pair| pair[0] != pair[1]), "another position draws other tokens");
}

#[test]
fn seed_and_position_decide() {
    on_every_backend!(decided_by_seed_and_position);
}

#[test]
fn every_instruction_set_draws_the_same() {
    let mut random = Random(15);
    let logits = random.vector(300);
    let params = SamplingParams { do_sample: true, seed: 5, top_p: 0.9, ..plain() };
    let mut drawn: Vec<Vec<u32>> = Vec::new();
    for (_, mut backend) in crate::cases::cpu_backends() {
        drawn.push(draw(&mut backend, &logits, &params, 500));
    }
    for other in &drawn[1..] {
        // Sums differ in their last bits, which decides a draw about once in a million.
        let different = drawn[0].iter().zip(other).filter(|(a, b)| a != b).count();
        assert!(different <= 1, "{different} of 500 draws differ");
    }
}

fn survives_what_is_no_number<B: Backend>(backend: &mut B) {
    let params =
        [plain(), SamplingParams { do_sample: true, top_p: 0.9, top_k: 3, typical_p: 0.9, ..plain() }];
    for params in &params {
        for logits in
            [vec![f32::NAN; 40], vec![f32::NEG_INFINITY; 40], [vec![f32::NAN; 39], vec![1.0]].concat()]
        {
            let table =
                backend.linear(&[matrix(&logits, 1, 40, backend::DType::F32)], backend::DType::F32).unwrap();
            backend.begin_step(&prompt(1)).unwrap();
            let mut buffer = backend.buffer(1, 40, DType::F32).unwrap();
            backend.embed(&table, 0, &mut buffer).unwrap();
            let sampled =
                backend.sample(&mut buffer, &[SamplingRow { params, history: &[], top_n: 2 }]).unwrap();
            assert!(sampled[0].id < 40);
        }
    }
}

#[test]
fn logits_that_are_no_numbers_do_no_harm() {
    on_every_backend!(survives_what_is_no_number);
}
