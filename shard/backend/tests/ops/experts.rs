//! Mixtures of experts: the choice and the sum, on its own f64 arithmetic.

use backend::{
    Activation, Backend, DType, ExpertGroups, GroupRank, QuantizedMatrix, RouterScores, Routing,
    WeightNormalization,
};

use crate::cases::{
    Random, activations_beside, matrix, on_every_backend, random_as, rounded, upload, upload_as,
};
use crate::tolerances::{self, assert_close};

const PLAIN: Routing = Routing {
    num_chosen: 2,
    scores: RouterScores::Softmax,
    groups: None,
    normalization: WeightNormalization::None,
    scale: 1.0,
};

/// Indices of the `count` largest, the first of equals.
fn top(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

/// Experts and weights of one token.
fn choose(logits: &[f64], correction: Option<&[f32]>, routing: &Routing) -> Vec<(usize, f64)> {
    let mut chosen: Vec<(usize, f64)> = if let RouterScores::SparseMixer { jitter } = routing.scores {
        let mut left = logits.to_vec();
        let pick = |_| {
            let best = top(&left, 1)[0];
            let highest = left[best];
            let near =
                |logit: &&f64| (highest - **logit) / logit.abs().max(highest) <= 2.0 * f64::from(jitter);
            let total: f64 = left.iter().filter(near).map(|logit| (logit - highest).exp()).sum();
            left[best] = f64::NEG_INFINITY;
            (best, 1.0 / total)
        };
        (0..routing.num_chosen).map(pick).collect()
    } else {
        let scores: Vec<f64> = match routing.scores {
            RouterScores::Softmax => {
                let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
                logits.iter().map(|logit| logit.exp() / total).collect()
            }
            _ => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        };
        let correct = |index: usize| correction.map_or(0.0, |correction| f64::from(correction[index]));
        let mut ranks: Vec<f64> = (0..scores.len()).map(|index| scores[index] + correct(index)).collect();
        if let Some(groups) = routing.groups {
            let size = ranks.len() / groups.count;
            let counted = if groups.rank == GroupRank::Largest { 1 } else { 2 };
            let rank = |group: &[f64]| top(group, counted).iter().map(|&index| group[index]).sum();
            let best = top(&ranks.chunks(size).map(rank).collect::<Vec<f64>>(), groups.num_chosen);
            for (index, rank) in ranks.iter_mut().enumerate() {
                if !best.contains(&(index / size)) {
                    *rank = 0.0;
                }
            }
        }
        top(&ranks, routing.num_chosen).into_iter().map(|index| (index, scores[index])).collect()
    };
    let weights = chosen.iter().map(|&(_, weight)| weight);
    let divisor = match routing.normalization {
        WeightNormalization::None => 1.0,
        WeightNormalization::Sum => weights.sum(),
        WeightNormalization::Norm(p) => {
            weights.map(|weight| weight.powf(f64::from(p))).sum::<f64>().powf(1.0 / f64::from(p))
        }
    };
    chosen.iter_mut().for_each(|(_, weight)| *weight *= f64::from(routing.scale) / divisor);
    chosen
}

/// Sizes of a mixture.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    hidden: usize,
    width: usize,
    experts: usize,
}

/// Random experts on a device and their values, as rounded there.
struct Mixture<B: Backend> {
    experts: B::Experts,
    gate_up: Vec<Vec<f32>>,
    down: Vec<Vec<f32>>,
}

impl<B: Backend> Mixture<B> {
    fn random(backend: &B, random: &mut Random, sizes: Sizes, activation: Activation, dtype: DType) -> Self {
        let Sizes { hidden, width, experts, .. } = sizes;
        let mut values = |len: usize| -> Vec<f32> {
            random.vector(len).into_iter().map(|value| rounded(value * 0.3, dtype)).collect()
        };
        let gate_up: Vec<_> = (0..experts).map(|_| values(2 * width * hidden)).collect();
        let down: Vec<_> = (0..experts).map(|_| values(hidden * width)).collect();
        let pack = |values: &[f32], rows: usize, columns: usize| {
            backend.linear(&[matrix(values, rows, columns, DType::F32)], dtype).unwrap()
        };
        let linears = gate_up
            .iter()
            .zip(&down)
            .map(|(gate_up, down)| (pack(gate_up, 2 * width, hidden), pack(down, hidden, width)))
            .collect();
        Self { experts: backend.experts(linears, activation).unwrap(), gate_up, down }
    }

    /// The result of one row and what rounding errors are relative to.
    fn reference(&self, x: &[f32], chosen: &[(usize, f64)], activation: Activation) -> (Vec<f64>, Vec<f64>) {
        let (mut sums, mut magnitudes) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let dot = |weights: &[f32], magnitude: bool| -> f64 {
            let products = weights.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b));
            products.map(|product| if magnitude { product.abs() } else { product }).sum()
        };
        for &(expert, weight) in chosen {
            let width = self.down[expert].len() / x.len();
            let (gate, up) = self.gate_up[expert].split_at(width * x.len());
            let inner: Vec<(f64, f64)> = gate
                .chunks(x.len())
                .zip(up.chunks(x.len()))
                .map(|(gate, up)| {
                    let value = dot(gate, false);
                    let activated = match activation {
                        Activation::Relu => value.max(0.0),
                        _ => value / (1.0 + (-value).exp()),
                    };
                    (activated * dot(up, false), dot(gate, true) * dot(up, true))
                })
                .collect();
            for (index, down) in self.down[expert].chunks(width).enumerate() {
                for (&down, &(value, magnitude)) in down.iter().zip(&inner) {
                    sums[index] += weight * f64::from(down) * value;
                    magnitudes[index] += (weight * f64::from(down) * magnitude).abs();
                }
            }
        }
        (sums, magnitudes)
    }
}

fn agrees<B: Backend>(backend: &mut B, sizes: Sizes, routing: &Routing, has_correction: bool) {
    let Sizes { rows, hidden, experts, .. } = sizes;
    for (dtype, activation) in
        [(DType::F32, Activation::Silu), (DType::F16, Activation::Relu), (DType::BF16, Activation::Silu)]
    {
        let mut random = Random(rows as u64 + 31);
        let mixture = Mixture::random(backend, &mut random, sizes, activation, dtype);
        let activations = activations_beside(backend, dtype);
        let x = random_as(&mut random, rows * hidden, activations);
        let logits = random.vector(rows * experts);
        let correction = has_correction.then(|| random.vector(experts));
        let correction_vector = correction.clone().map(|correction| backend.vector(correction).unwrap());
        let logits_buffer = upload(backend, &logits, experts);
        let input = upload_as(backend, &x, hidden, activations);
        let mut out = backend.buffer(rows, hidden, activations).unwrap();
        backend
            .mixture_of_experts(
                &input,
                &logits_buffer,
                (routing, correction_vector.as_ref()),
                &mixture.experts,
                &mut out,
            )
            .unwrap();
        let (mut expected, mut magnitudes) = (Vec::new(), Vec::new());
        for (x, logits) in x.chunks(hidden).zip(logits.chunks(experts)) {
            let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
            let chosen = choose(&logits, correction.as_deref(), routing);
            let (sums, magnitude) = mixture.reference(x, &chosen, activation);
            expected.extend(sums);
            magnitudes.extend(magnitude);
        }
        assert_close(
            &format!("{rows} rows, {routing:?}, {dtype}"),
            &backend.read(&out).unwrap(),
            &expected,
            &magnitudes,
            tolerances::experts(dtype).stored_as(activations),
        );
    }
}

fn sizes_agree<B: Backend>(backend: &mut B) {
    for (rows, hidden, width, experts) in [
        (1, 33, 17, 4),
        (1, 64, 48, 7),
        (3, 16, 5, 2),
        (8, 264, 136, 9),
        (29, 40, 65, 5),
        (130, 47, 31, 3),
        (70, 80, 16, 33),
        (40, 136, 72, 5),
        (300, 64, 144, 4),
        (100, 64, 72, 6),
        (130, 520, 264, 4),
        (40, 520, 136, 5),
        (600, 64, 72, 2),
    ] {
        agrees(backend, Sizes { rows, hidden, width, experts }, &PLAIN, false);
    }
}

#[test]
fn every_size_agrees_with_plain_sums() {
    on_every_backend!(sizes_agree);
}

fn rules_agree<B: Backend>(backend: &mut B) {
    let sizes = Sizes { rows: 37, hidden: 24, width: 19, experts: 12 };
    let groups = |rank| Some(ExpertGroups { count: 4, num_chosen: 2, rank });
    for (routing, has_correction) in [
        (Routing { num_chosen: 1, ..PLAIN }, false),
        (Routing { num_chosen: 12, normalization: WeightNormalization::Sum, ..PLAIN }, false),
        (Routing { num_chosen: 3, normalization: WeightNormalization::Norm(1.0), ..PLAIN }, false),
        (Routing { num_chosen: 4, normalization: WeightNormalization::Norm(2.0), ..PLAIN }, false),
        (Routing { groups: groups(GroupRank::Largest), scale: 16.0, ..PLAIN }, false),
        (
            Routing {
                num_chosen: 3,
                scores: RouterScores::Sigmoid,
                groups: groups(GroupRank::LargestTwo),
                normalization: WeightNormalization::Sum,
                scale: 2.5,
            },
            true,
        ),
        (Routing { scores: RouterScores::Sigmoid, ..PLAIN }, false),
        (Routing { scores: RouterScores::SparseMixer { jitter: 0.01 }, ..PLAIN }, false),
        (Routing { scores: RouterScores::SparseMixer { jitter: 0.4 }, ..PLAIN }, false),
    ] {
        agrees(backend, sizes, &routing, has_correction);
    }
}

#[test]
fn every_rule_agrees_with_its_description() {
    on_every_backend!(rules_agree);
}

/// Of equal logits the first experts are chosen, with equal weights.
fn first_of_equals<B: Backend>(backend: &mut B) {
    let sizes = Sizes { rows: 1, hidden: 16, width: 16, experts: 6 };
    let mut random = Random(4);
    let mixture = Mixture::random(backend, &mut random, sizes, Activation::Silu, DType::F32);
    let x = random.vector(16);
    let input = upload(backend, &x, 16);
    let logits = upload(backend, &[0.5, 1.0, 1.0, 0.0, 1.0, 1.0], 6);
    let mut out = backend.buffer(1, 16, DType::F32).unwrap();
    let routing = Routing { normalization: WeightNormalization::Sum, ..PLAIN };
    backend.mixture_of_experts(&input, &logits, (&routing, None), &mixture.experts, &mut out).unwrap();
    let (expected, magnitude) = mixture.reference(&x, &[(1, 0.5), (2, 0.5)], Activation::Silu);
    let found = backend.read(&out).unwrap();
    assert_close("equal logits", &found, &expected, &magnitude, tolerances::experts(DType::F32));
}

#[test]
fn the_first_of_equal_experts_is_chosen() {
    on_every_backend!(first_of_equals);
}

/// Experts of quantized weights, each of which may be packed in its own way.
fn quantized_agree<B: Backend>(backend: &mut B) {
    if !backend.keeps_quantized() {
        return;
    }
    let (hidden, width) = (64, 32);
    for (rows, num_experts) in [(1, 3), (2, 4), (45, 5)] {
        let mut random = Random(rows as u64);
        let mut quantized = |rows: usize, columns: usize, expert: usize| {
            let (bits, group_size) = [(4, 32), (8, 32), (6, 16)][expert % 3];
            let scales: Vec<f32> = (0..rows * columns / group_size)
                .map(|_| 0.5 / (1 << bits) as f32 * (1.0 + random.normal().abs()))
                .collect();
            let zero = (1 << (bits - 1)) as f32;
            QuantizedMatrix {
                rows,
                cols: columns,
                bits,
                group_size,
                values: (0..rows * columns).map(|_| (random.bits() >> (64 - bits)) as u8).collect(),
                offsets: scales.iter().map(|scale| -zero * scale).collect(),
                scales,
            }
        };
        let plain = |matrix: &QuantizedMatrix| {
            let mut values = vec![0.0; matrix.rows * matrix.cols];
            values.chunks_mut(matrix.cols).enumerate().for_each(|(row, out)| matrix.read_row(row, out));
            values
        };
        let (mut linears, mut gate_up, mut down) = (Vec::new(), Vec::new(), Vec::new());
        for expert in 0..num_experts {
            let pair = (quantized(2 * width, hidden, expert), quantized(hidden, width, expert + 1));
            gate_up.push(plain(&pair.0));
            down.push(plain(&pair.1));
            let pack = |matrix| backend.quantized_linear(&[matrix]).unwrap();
            linears.push((pack(pair.0), pack(pair.1)));
        }
        let experts = backend.experts(linears, Activation::Silu).unwrap();
        let mixture = Mixture::<B> { experts, gate_up, down };
        let activations = activations_beside(backend, DType::F16);
        let x = random_as(&mut random, rows * hidden, activations);
        let logits = random.vector(rows * num_experts);
        let logits_buffer = upload(backend, &logits, num_experts);
        let input = upload_as(backend, &x, hidden, activations);
        let mut out = backend.buffer(rows, hidden, activations).unwrap();
        let routing = (&PLAIN, None);
        backend.mixture_of_experts(&input, &logits_buffer, routing, &mixture.experts, &mut out).unwrap();
        let (mut expected, mut magnitudes) = (Vec::new(), Vec::new());
        for (x, logits) in x.chunks(hidden).zip(logits.chunks(num_experts)) {
            let logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
            let (sums, magnitude) = mixture.reference(x, &choose(&logits, None, &PLAIN), Activation::Silu);
            expected.extend(sums);
            magnitudes.extend(magnitude);
        }
        let what = format!("{rows} rows, quantized");
        let found = backend.read(&out).unwrap();
        let tolerance = tolerances::QUANTIZED_EXPERTS.stored_as(activations);
        assert_close(&what, &found, &expected, &magnitudes, tolerance);
    }
}

#[test]
fn quantized_experts_agree_with_their_plain_weights() {
    on_every_backend!(quantized_agree);
}

fn refuses_unequal_experts<B: Backend>(backend: &mut B) {
    let linear = |backend: &B, rows: usize, columns: usize| {
        backend.linear(&[matrix(&vec![0.0; rows * columns], rows, columns, DType::F32)], DType::F32).unwrap()
    };
    let pair = |backend: &B, width: usize| (linear(backend, 2 * width, 8), linear(backend, 8, width));
    let (equal, unequal) =
        (vec![pair(backend, 4), pair(backend, 4)], vec![pair(backend, 4), pair(backend, 5)]);
    assert!(backend.experts(equal, Activation::Silu).is_ok());
    let error = backend.experts(unequal, Activation::Silu).err().unwrap().to_string();
    assert!(error.contains("all of one shape"), "{error}");
    assert!(backend.experts(Vec::new(), Activation::Silu).is_err());
}

#[test]
fn experts_of_other_shapes_are_refused() {
    on_every_backend!(refuses_unequal_experts);
}

#[test]
fn impossible_rules_have_a_problem() {
    let groups =
        |count, num_chosen, rank| Routing { groups: Some(ExpertGroups { count, num_chosen, rank }), ..PLAIN };
    assert_eq!(PLAIN.problem(2), None);
    assert_eq!(PLAIN.problem(1).unwrap(), "2 experts for a token, expected 1 to 1");
    assert_eq!(groups(4, 1, GroupRank::LargestTwo).problem(8), None);
    for (routing, experts) in [
        (groups(3, 1, GroupRank::Largest), 8),
        (groups(0, 1, GroupRank::Largest), 8),
        (groups(8, 1, GroupRank::Largest), 8),
        (groups(4, 5, GroupRank::Largest), 8),
        (groups(8, 4, GroupRank::LargestTwo), 8),
        (Routing { num_chosen: 0, ..PLAIN }, 8),
    ] {
        assert!(routing.problem(experts).is_some(), "{routing:?}");
    }
}
