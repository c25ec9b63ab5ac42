//! Batch-invariant arithmetic on CUDA: a row's result has the same bits whatever is computed beside it.

use backend::collectives::Single;
use backend::cuda::{CudaBackend, CudaOptions};
use backend::{Activation, Backend, DType, HeadColumns, RouterScores, Routing, WeightNormalization};

use crate::cases::{Random, cuda, matrix, random_as, upload, upload_as};

/// Such a backend, where there is a device.
pub(crate) fn backend() -> Option<CudaBackend> {
    // Says why there is none.
    cuda()?;
    let options = CudaOptions { is_deterministic: true, ..CudaOptions::default() };
    Some(CudaBackend::new(options, Box::new(Single)).unwrap())
}

/// That `compute`, which takes rows of `width` columns and gives rows, gives each row of `x` the same bits in every part of
/// it.
fn is_invariant(
    backend: &mut CudaBackend,
    what: &str,
    (x, width): (&[f32], usize),
    mut compute: impl FnMut(&mut CudaBackend, &[f32]) -> Vec<f32>,
) {
    let rows = x.len() / width;
    let whole = compute(backend, x);
    assert!(whole.iter().all(|value| value.is_finite()), "{what}: a result is missing");
    let outputs = whole.len() / rows;
    for (first, count) in [(0, 1), (rows - 1, 1), (3, 2), (5, 8), (1, 33), (rows / 2, 129), (7, rows - 7)] {
        let count = count.min(rows - first);
        let part = compute(backend, &x[first * width..(first + count) * width]);
        let expected = &whole[first * outputs..(first + count) * outputs];
        let differ = part.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert_eq!(differ, 0, "{what}: elements of {count} rows from {first} on differ from those of {rows}");
    }
}

#[test]
fn products_do_not_depend_on_the_batch() {
    let Some(mut backend) = backend() else { return };
    let mut random = Random(11);
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for (inputs, outputs, has_bias, out_dtype) in [
            (776, 333, true, dtype),
            (1024, 512, false, dtype),
            (4096, 6144, true, dtype),
            (2048, 1000, true, DType::F32),
        ] {
            let weight = random.vector(outputs * inputs);
            let packed = backend.linear(&[matrix(&weight, outputs, inputs, dtype)], dtype).unwrap();
            let bias = has_bias.then(|| backend.vector(random.vector(outputs)).unwrap());
            let x = random_as(&mut random, 300 * inputs, dtype);
            let what = format!("{inputs} -> {outputs}, {dtype} to {out_dtype}");
            is_invariant(&mut backend, &what, (&x, inputs), |backend, x| {
                let rows = x.len() / inputs;
                let input = upload_as(backend, x, inputs, dtype);
                let mut out = upload_as(backend, &vec![f32::NAN; rows * outputs], outputs, out_dtype);
                backend.matmul(&input, &packed, bias.as_ref(), &mut out).unwrap();
                backend.read(&out).unwrap()
            });
        }
    }
}

#[test]
fn gated_products_do_not_depend_on_the_batch() {
    let Some(mut backend) = backend() else { return };
    let mut random = Random(12);
    let (inputs, width) = (1032, 264);
    for dtype in [DType::BF16, DType::F16] {
        let weight = random.vector(2 * width * inputs);
        let packed = backend.linear(&[matrix(&weight, 2 * width, inputs, dtype)], dtype).unwrap();
        let x = random_as(&mut random, 200 * inputs, dtype);
        is_invariant(&mut backend, &format!("gated, {dtype}"), (&x, inputs), |backend, x| {
            let rows = x.len() / inputs;
            let input = upload_as(backend, x, inputs, dtype);
            let mut gate_up = backend.buffer(rows, 2 * width, dtype).unwrap();
            let mut out = upload_as(backend, &vec![f32::NAN; rows * width], width, dtype);
            let weight = (&packed, None);
            backend.gated_matmul(&input, weight, Activation::Silu, (&mut gate_up, &mut out)).unwrap();
            backend.read(&out).unwrap()
        });
    }
}

#[test]
fn products_that_are_added_do_not_depend_on_the_batch() {
    let Some(mut backend) = backend() else { return };
    let mut random = Random(15);
    let (inputs, outputs) = (1032, 520);
    for dtype in [DType::BF16, DType::F16] {
        let weight = random.vector(outputs * inputs);
        let packed = backend.linear(&[matrix(&weight, outputs, inputs, dtype)], dtype).unwrap();
        let x = random_as(&mut random, 200 * inputs, dtype);
        is_invariant(&mut backend, &format!("added, {dtype}"), (&x, inputs), |backend, x| {
            let rows = x.len() / inputs;
            let input = upload_as(backend, x, inputs, dtype);
            let mut out = upload_as(backend, &vec![0.5; rows * outputs], outputs, DType::F32);
            backend.add_matmul(&input, (&packed, None), &mut out).unwrap();
            backend.read(&out).unwrap()
        });
    }
}

#[test]
fn experts_do_not_depend_on_the_batch() {
    let Some(mut backend) = backend() else { return };
    let mut random = Random(13);
    let (hidden, width, experts) = (256, 128, 8);
    let routing = Routing {
        num_chosen: 2,
        scores: RouterScores::Softmax,
        groups: None,
        normalization: WeightNormalization::Sum,
        scale: 1.0,
    };
    for dtype in [DType::BF16, DType::F32] {
        let pairs = (0..experts)
            .map(|_| {
                let gate_up = random.vector(2 * width * hidden);
                let down = random.vector(hidden * width);
                let pack = |values: &[f32], rows, columns| {
                    backend.linear(&[matrix(values, rows, columns, dtype)], dtype).unwrap()
                };
                (pack(&gate_up, 2 * width, hidden), pack(&down, hidden, width))
            })
            .collect();
        let mixture = backend.experts(pairs, Activation::Silu).unwrap();
        // A row is its activations and its logits.
        let width_of_both = hidden + experts;
        let x = random_as(&mut random, 200 * width_of_both, dtype);
        is_invariant(&mut backend, &format!("experts, {dtype}"), (&x, width_of_both), |backend, x| {
            let rows = x.chunks(width_of_both);
            let activations: Vec<f32> = rows.clone().flat_map(|row| row[..hidden].to_vec()).collect();
            let logits: Vec<f32> = rows.flat_map(|row| row[hidden..].to_vec()).collect();
            let input = upload_as(backend, &activations, hidden, dtype);
            let logits = upload(backend, &logits, experts);
            let mut out = upload_as(backend, &vec![f32::NAN; activations.len()], hidden, dtype);
            backend.mixture_of_experts(&input, &logits, (&routing, None), &mixture, &mut out).unwrap();
            backend.read(&out).unwrap()
        });
    }
}

#[test]
fn products_of_heads_do_not_depend_on_the_batch() {
    let Some(mut backend) = backend() else { return };
    let mut random = Random(14);
    let (heads, inputs, outputs) = (3, 128, 72);
    let weights: Vec<_> = (0..heads)
        .map(|_| {
            let values = random.vector(outputs * inputs);
            backend.linear(&[matrix(&values, outputs, inputs, DType::BF16)], DType::BF16).unwrap()
        })
        .collect();
    let x = random_as(&mut random, 200 * heads * inputs, DType::BF16);
    is_invariant(&mut backend, "heads", (&x, heads * inputs), |backend, x| {
        let rows = x.len() / (heads * inputs);
        let input = upload_as(backend, x, heads * inputs, DType::BF16);
        let missing = vec![f32::NAN; rows * heads * outputs];
        let mut out = upload_as(backend, &missing, heads * outputs, DType::BF16);
        let columns = |width| HeadColumns { first: 0, stride: width, width };
        backend.matmul_heads((&input, columns(inputs)), &weights, (&mut out, columns(outputs))).unwrap();
        backend.read(&out).unwrap()
    });
}
