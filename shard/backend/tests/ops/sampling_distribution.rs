//! Random choice: its distribution over many draws, what it never draws, and what decides it.

use backend::sampling::{SamplingParams, SamplingRow};
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
#[test]
fn large_vocabularies_keep_the_same_tokens() {
    let mut backend = best_cpu();
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
        let found =
            one(&mut backend, &logits, SamplingRow { params: &params, history: &[], top_n: vocab as u32 });
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

#[test]
fn logits_that_are_no_numbers_do_no_harm() {
    let mut backend = best_cpu();
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
