//! Attention through the paged cache: whole prompts, chunks of prompts and decoding sequences in one step.

use backend::{Alibi, AttentionShape, Backend, BackendError, DType, Fp8Format, KvDType, KvLayout, StepInput};

use crate::cases::{
    Random, activations_beside, best_cpu, cached, on_every_backend, rounded, upload, upload_as,
};
use crate::tolerances::{self, assert_close};

const BLOCK_SIZE: usize = 16;

/// A sequence: keys and values of all its tokens, and where its blocks are.
struct Sequence {
    /// `[context, qkv_width]`.
    qkv: Vec<f32>,
    context: usize,
    blocks: Vec<u32>,
}

/// Sequences of these context lengths in scattered blocks.
fn sequences(random: &mut Random, contexts: &[usize], width: usize) -> (Vec<Sequence>, usize) {
    let total: usize = contexts.iter().map(|context| context.div_ceil(BLOCK_SIZE)).sum();
    let mut free: Vec<u32> = (1..=total as u32).collect();
    let mut take = |random: &mut Random| free.swap_remove(random.below(free.len()));
    let found = contexts.iter().map(|&context| {
        let blocks = (0..context.div_ceil(BLOCK_SIZE)).map(|_| take(random)).collect();
        Sequence { qkv: random.vector(context * width), context, blocks }
    });
    (found.collect(), total + 1)
}

/// A step with the tokens `first..end` of each sequence.
fn step_of(parts: &[(&Sequence, usize, usize)]) -> StepInput {
    let max_blocks = parts.iter().map(|(sequence, ..)| sequence.blocks.len()).max().unwrap();
    let mut step = StepInput { cu_seqlens_q: vec![0], max_blocks, ..StepInput::default() };
    for &(sequence, first, end) in parts {
        for token in first..end {
            step.input_ids.push(0);
            step.position_ids.push(token as u32);
            step.slot_mapping
                .push(sequence.blocks[token / BLOCK_SIZE] * BLOCK_SIZE as u32 + (token % BLOCK_SIZE) as u32);
        }
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(end as u32);
        step.prompt_lens.push(end as u32);
        let used = end.div_ceil(BLOCK_SIZE);
        step.block_tables.extend(&sequence.blocks[..used]);
        // What is past the context is never read: an impossible block shows that.
        step.block_tables.extend(vec![u32::MAX; max_blocks - used]);
    }
    step
}

fn reference(sequence: &Sequence, token: usize, shape: &AttentionShape, dtype: KvDType) -> Vec<f64> {
    let width = shape.qkv_width();
    let dim = shape.head_dim;
    let vector = |token: usize, head: usize| &sequence.qkv[token * width + head * dim..][..dim];
    let stored = |x: f32| f64::from(cached(x, dtype));
    let mut out = Vec::new();
    let first = shape.window.map_or(0, |window| (token + 1).saturating_sub(window));
    for head in 0..shape.num_heads {
        let kv_head = head / (shape.num_heads / shape.num_kv_heads);
        let query = vector(token, head);
        let scores: Vec<f64> = (first..=token)
            .map(|key| {
                let stored_key = vector(key, shape.num_heads + kv_head);
                let dot: f64 = query.iter().zip(stored_key).map(|(&q, &k)| f64::from(q) * stored(k)).sum();
                let score = dot * f64::from(shape.scale);
                let score =
                    shape.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                score - shape.alibi.map_or(0.0, |alibi| slope(&alibi, head) * (token - key) as f64)
            })
            .collect();
        let highest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..dim {
            let values = (first..=token)
                .map(|key| stored(vector(key, shape.num_heads + shape.num_kv_heads + kv_head)[d]));
            out.push(weights.iter().zip(values).map(|(w, v)| w * v).sum::<f64>() / total);
        }
    }
    out
}

/// The slope after the paper: of `n` heads the first has `2^(-max_bias / n)`, each next one that much again; the heads beyond a
/// power of two take every other slope of twice as many.
fn slope(alibi: &Alibi, head: usize) -> f64 {
    let head = alibi.first_head + head;
    let mut power_of_two = 1;
    while 2 * power_of_two <= alibi.total_heads {
        power_of_two *= 2;
    }
    let slopes = |heads: usize| {
        let base = 2.0_f64.powf(-f64::from(alibi.max_bias) / heads as f64);
        (0..heads).map(move |head| base.powi(head as i32 + 1))
    };
    let all: Vec<f64> = slopes(power_of_two).chain(slopes(2 * power_of_two).step_by(2)).collect();
    all[head] * f64::from(alibi.multiplier)
}

/// Stores and attends the given parts of sequences, and compares each token.
fn check<B: Backend>(
    backend: &mut B,
    cache: &mut B::KvCache,
    parts: &[(&Sequence, usize, usize)],
    shape: &AttentionShape,
    (activations, dtype): (DType, KvDType),
) {
    let width = shape.qkv_width();
    let rows: Vec<f32> = parts
        .iter()
        .flat_map(|&(sequence, first, end)| sequence.qkv[first * width..end * width].to_vec())
        .collect();
    let of_activations = activations_beside(backend, activations);
    let mut qkv = upload_as(backend, &rows, width, of_activations);
    let step = step_of(parts);
    let out_width = shape.num_heads * shape.head_dim;
    let nothing = vec![f32::NAN; step.num_tokens() * out_width];
    let mut out = upload_as(backend, &nothing, out_width, of_activations);
    backend.begin_step(&step).unwrap();
    backend.rope_and_store_kv(&mut qkv, None, shape, 1, cache).unwrap();
    backend.attention(&qkv, shape, 1, cache, &mut out).unwrap();
    let expected: Vec<f64> = parts
        .iter()
        .flat_map(|&(sequence, first, end)| (first..end).map(move |token| (sequence, token)))
        .flat_map(|(sequence, token)| reference(sequence, token, shape, dtype))
        .collect();
    let what = format!("{shape:?} {activations} {dtype}");
    let tolerance = tolerances::attention_of(activations);
    assert_close(&what, &backend.read(&out).unwrap(), &expected, &expected, tolerance);
}

fn agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(8);
    let base = AttentionShape {
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    for (shape, dtype) in [
        (base, DType::F32),
        (base, DType::BF16),
        (base, DType::F16),
        (
            AttentionShape { num_heads: 2, num_kv_heads: 2, head_dim: 20, window: Some(37), ..base },
            DType::F32,
        ),
        (
            AttentionShape { num_heads: 8, num_kv_heads: 1, head_dim: 128, soft_cap: Some(2.0), ..base },
            DType::F32,
        ),
        (
            AttentionShape {
                num_heads: 6,
                num_kv_heads: 6,
                head_dim: 32,
                alibi: Some(Alibi { total_heads: 12, first_head: 6, max_bias: 8.0, multiplier: 0.5 }),
                ..base
            },
            DType::F32,
        ),
        (
            AttentionShape { num_heads: 32, num_kv_heads: 1, head_dim: 16, window: Some(1), ..base },
            DType::BF16,
        ),
        (
            AttentionShape {
                num_heads: 5,
                num_kv_heads: 1,
                head_dim: 8,
                window: Some(200),
                soft_cap: Some(5.0),
                ..base
            },
            DType::F16,
        ),
    ] {
        attends_in_chunks(backend, &mut random, &shape, (DType::F32, dtype.into()), 600);
    }
}

/// Four sequences in several steps: prompts in chunks, then beside sequences that decode.
fn attends_in_chunks<B: Backend>(
    backend: &mut B,
    random: &mut Random,
    shape: &AttentionShape,
    dtypes: (DType, KvDType),
    longest: usize,
) {
    let (mut found, blocks) = sequences(random, &[70, 17, longest, 1], shape.qkv_width());
    for sequence in &mut found {
        sequence.qkv.iter_mut().for_each(|x| *x = rounded(*x, dtypes.0));
    }
    let [a, b, c, d] = &found[..] else { unreachable!() };
    let mut cache = backend.kv_cache(layout_of(shape, dtypes.1), blocks).unwrap();
    check(backend, &mut cache, &[(a, 0, 63), (b, 0, 15), (c, 0, 129)], shape, dtypes);
    check(backend, &mut cache, &[(b, 15, 16), (c, 129, longest - 2), (d, 0, 1), (a, 63, 66)], shape, dtypes);
    check(backend, &mut cache, &[(a, 66, 67), (b, 16, 17), (c, longest - 2, longest - 1)], shape, dtypes);
    check(backend, &mut cache, &[(c, longest - 1, longest)], shape, dtypes);
    assert_eq!((a.context, c.context), (70, longest));
}

fn layout_of(shape: &AttentionShape, dtype: KvDType) -> KvLayout {
    KvLayout {
        num_layers: 2,
        num_kv_heads: shape.num_kv_heads,
        head_dim: shape.head_dim,
        block_size: BLOCK_SIZE,
        dtype,
    }
}

#[test]
fn attention_agrees_with_plain_softmax() {
    on_every_backend!(agrees);
}

/// Activations of 16 bits, for which devices have other kernels: every size of heads they are made for, sizes between, groups of
/// more heads than a tile has rows, and everything that bounds or biases scores.
fn agrees_in_16_bits<B: Backend>(backend: &mut B) {
    let mut random = Random(11);
    let shape = |num_heads, num_kv_heads, head_dim: usize| AttentionShape {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let alibi = Some(Alibi { total_heads: 6, first_head: 2, max_bias: 8.0, multiplier: 1.0 });
    let both = [DType::BF16, DType::F16];
    for (shape, activations, cache) in [
        (shape(8, 2, 128), both[0], both[0]),
        (shape(8, 2, 128), both[1], both[1]),
        (AttentionShape { window: Some(37), ..shape(3, 3, 64) }, both[0], both[0]),
        (AttentionShape { window: Some(130), soft_cap: Some(2.0), ..shape(6, 1, 256) }, both[0], both[0]),
        (AttentionShape { alibi, ..shape(4, 4, 80) }, both[1], both[1]),
        (AttentionShape { soft_cap: Some(5.0), ..shape(2, 1, 192) }, both[1], both[1]),
        (shape(20, 1, 72), both[0], both[0]),
        (AttentionShape { window: Some(1), ..shape(4, 2, 16) }, both[0], both[0]),
        (shape(3, 1, 20), both[0], both[0]),
        (shape(2, 1, 264), both[1], both[1]),
        (shape(4, 2, 64), both[0], both[1]),
    ] {
        attends_in_chunks(backend, &mut random, &shape, (activations, cache.into()), 300);
    }
}

#[test]
fn attention_in_16_bits_agrees_with_plain_softmax() {
    on_every_backend!(agrees_in_16_bits);
}

/// A cache of eight bits, of which devices widen keys and values on their way: the same heads, bounds and biases.
fn agrees_over_8_bits<B: Backend>(backend: &mut B) {
    let mut random = Random(13);
    let shape = |num_heads, num_kv_heads, head_dim: usize| AttentionShape {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let alibi = Some(Alibi { total_heads: 6, first_head: 2, max_bias: 8.0, multiplier: 1.0 });
    let [e4m3, e5m2] = [Fp8Format::E4M3, Fp8Format::E5M2].map(KvDType::Fp8);
    if backend.check_kv_dtype(e4m3).is_err() {
        let text = backend.check_kv_dtype(e5m2).unwrap_err().to_string();
        assert!(text.starts_with("--kv-cache-dtype fp8_e5m2: ") && !text.contains('\n'), "{text}");
        return;
    }
    for (shape, activations, cache) in [
        (shape(8, 2, 128), DType::BF16, e4m3),
        (shape(8, 2, 128), DType::F16, e5m2),
        (shape(3, 3, 64), DType::F32, e4m3),
        (AttentionShape { window: Some(37), ..shape(3, 3, 64) }, DType::BF16, e5m2),
        (AttentionShape { window: Some(130), soft_cap: Some(2.0), ..shape(6, 1, 256) }, DType::BF16, e4m3),
        (AttentionShape { alibi, ..shape(4, 4, 80) }, DType::F16, e4m3),
        (AttentionShape { soft_cap: Some(5.0), ..shape(2, 1, 192) }, DType::F16, e4m3),
        (shape(20, 1, 64), DType::BF16, e4m3),
        (shape(20, 1, 72), DType::BF16, e4m3),
        (shape(3, 1, 20), DType::F32, e5m2),
    ] {
        attends_in_chunks(backend, &mut random, &shape, (activations, cache), 300);
    }
}

#[test]
fn attention_over_8_bits_agrees_with_plain_softmax() {
    on_every_backend!(agrees_over_8_bits);
}

/// A batch of sequences that decode: many short contexts, and one that is far longer than all others.
fn decodes_uneven_batches<B: Backend>(backend: &mut B) {
    let mut random = Random(12);
    let shape = AttentionShape {
        num_heads: 8,
        num_kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let contexts: Vec<usize> = (0..150).map(|seq| 1 + seq * 29 % 200).chain([5000]).collect();
    let (mut found, blocks) = sequences(&mut random, &contexts, shape.qkv_width());
    for sequence in &mut found {
        sequence.qkv.iter_mut().for_each(|x| *x = rounded(*x, DType::BF16));
    }
    let mut cache = backend.kv_cache(layout_of(&shape, DType::BF16.into()), blocks).unwrap();
    for sequence in found.iter().filter(|sequence| sequence.context > 1) {
        let before = sequence.context - 1;
        let width = shape.qkv_width();
        let mut qkv = upload_as(backend, &sequence.qkv[..before * width], width, DType::BF16);
        backend.begin_step(&step_of(&[(sequence, 0, before)])).unwrap();
        backend.rope_and_store_kv(&mut qkv, None, &shape, 1, &mut cache).unwrap();
    }
    let parts: Vec<_> =
        found.iter().map(|sequence| (sequence, sequence.context - 1, sequence.context)).collect();
    for parts in [&parts[..], &parts[150..], &parts[149..], &parts[3..40]] {
        check(backend, &mut cache, parts, &shape, (DType::BF16, DType::BF16.into()));
    }
}

#[test]
fn uneven_batches_decode() {
    on_every_backend!(decodes_uneven_batches);
}

/// How much the element type of the cache costs against an exact one.
#[test]
fn rounding_of_the_cache_stays_within_its_tolerance() {
    let mut backend = best_cpu();
    let mut random = Random(9);
    let shape = AttentionShape {
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let (found, blocks) = sequences(&mut random, &[200], shape.qkv_width());
    for dtype in [DType::F16, DType::BF16] {
        let layout = KvLayout {
            num_layers: 1,
            num_kv_heads: 3,
            head_dim: 64,
            block_size: BLOCK_SIZE,
            dtype: dtype.into(),
        };
        let mut cache = backend.kv_cache(layout, blocks).unwrap();
        let mut qkv = upload(&mut backend, &found[0].qkv, shape.qkv_width());
        backend.begin_step(&step_of(&[(&found[0], 0, 200)])).unwrap();
        let mut out = backend.buffer(200, 576, DType::F32).unwrap();
        backend.rope_and_store_kv(&mut qkv, None, &shape, 0, &mut cache).unwrap();
        backend.attention(&qkv, &shape, 0, &cache, &mut out).unwrap();
        let expected: Vec<f64> =
            (0..200).flat_map(|token| reference(&found[0], token, &shape, DType::F32.into())).collect();
        let magnitude = vec![1.0; expected.len()];
        assert_close(
            "cache",
            &backend.read(&out).unwrap(),
            &expected,
            &magnitude,
            tolerances::attention(dtype),
        );
    }
}

fn refuses<B: Backend>(backend: &mut B) {
    let shape = AttentionShape {
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 16,
        scale: 1.0,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let layout = KvLayout {
        num_layers: 1,
        num_kv_heads: 1,
        head_dim: 16,
        block_size: BLOCK_SIZE,
        dtype: DType::F32.into(),
    };
    let mut cache = backend.kv_cache(layout, 2).unwrap();
    let mut qkv = upload(backend, &[0.0; 48], 48);
    let mut step = crate::cases::prompt(1);
    let mut expect = |backend: &mut B, step: &StepInput, text: &str| {
        backend.begin_step(step).unwrap();
        let error: BackendError =
            backend.rope_and_store_kv(&mut qkv, None, &shape, 0, &mut cache).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    };
    step.slot_mapping = vec![32];
    expect(backend, &step, "slot 32 in a cache of 32");
    step.slot_mapping = vec![16];
    step.block_tables = vec![2];
    expect(backend, &step, "block 2 in a cache of 2");
    step.context_lens = vec![17];
    expect(backend, &step, "sequence 0 of 17 tokens has a table of 1 blocks");
    step.context_lens = vec![0];
    assert!(backend.begin_step(&step).unwrap_err().to_string().contains("context of 0"));
    step.context_lens = vec![1];
    step.prompt_lens.push(1);
    assert!(backend.begin_step(&step).unwrap_err().to_string().contains("prompt_lens has 2 elements"));
    step.prompt_lens.pop();
    step.position_ids.clear();
    assert!(backend.begin_step(&step).unwrap_err().to_string().contains("position_ids has 0 elements"));
}

#[test]
fn steps_outside_the_cache_are_refused() {
    on_every_backend!(refuses);
}
