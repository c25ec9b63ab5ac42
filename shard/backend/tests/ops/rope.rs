//! Rotary embeddings, seen through the queries and keys that the operation leaves in place.

use backend::{
    AttentionShape, Backend, DType, KvLayout, LongContext, LongFrequencies, RopeFrequencies, RopeStyle,
    StepInput,
};

use crate::cases::{Random, on_every_backend, prompt, rounded, upload, upload_as};
use crate::tolerances::{ROPE, assert_close, rope_of};

/// Ignores what holds for long prompts.
fn reference(head: &mut [f64], frequencies: &RopeFrequencies, position: u32) {
    let half = frequencies.inv_freq.len();
    for (i, &frequency) in frequencies.inv_freq.iter().enumerate() {
        let angle = f64::from(position as f32 * frequency);
        let (sin, cos) =
            (angle.sin() * f64::from(frequencies.scale), angle.cos() * f64::from(frequencies.scale));
        let (a, b) = match frequencies.style {
            RopeStyle::Half => (i, i + half),
            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
        };
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
    }
}

fn agrees<B: Backend>(backend: &mut B) {
    let mut random = Random(7);
    for (tokens, head_dim, rotary, style, dtype) in [
        (1, 64, 64, RopeStyle::Half, DType::F32),
        (17, 20, 8, RopeStyle::Half, DType::F32),
        (65, 64, 32, RopeStyle::Interleaved, DType::F32),
        (3, 6, 6, RopeStyle::Interleaved, DType::F32),
        (129, 128, 128, RopeStyle::Half, DType::BF16),
        (7, 128, 64, RopeStyle::Interleaved, DType::F16),
        (2, 20, 20, RopeStyle::Half, DType::BF16),
    ] {
        let shape = AttentionShape {
            num_heads: 3,
            num_kv_heads: 1,
            head_dim,
            scale: 1.0,
            window: None,
            soft_cap: None,
            alibi: None,
        };
        let inv_freq = (0..rotary / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary as f32)).collect();
        let frequencies = RopeFrequencies { inv_freq, scale: 1.25, style, beyond: None };
        let rope = backend.rope(frequencies.clone()).unwrap();
        let layout =
            KvLayout { num_layers: 2, num_kv_heads: 1, head_dim, block_size: 16, dtype: dtype.into() };
        let mut cache = backend.kv_cache(layout, 10).unwrap();
        for offset in [0, 1000] {
            let mut x = random.vector(tokens * shape.qkv_width());
            x.iter_mut().for_each(|x| *x = rounded(*x, dtype));
            let mut qkv = upload_as(backend, &x, shape.qkv_width(), dtype);
            let mut step = prompt(tokens);
            step.position_ids.iter_mut().for_each(|position| *position += offset);
            backend.begin_step(&step).unwrap();
            backend.rope_and_store_kv(&mut qkv, Some(&rope), &shape, 1, &mut cache).unwrap();
            let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for (row, &position) in expected.chunks_mut(shape.qkv_width()).zip(&step.position_ids) {
                row[..4 * head_dim]
                    .chunks_mut(head_dim)
                    .for_each(|head| reference(head, &frequencies, position));
            }
            let magnitude = vec![4.0; expected.len()];
            let what = format!("{style:?} {dtype}");
            assert_close(&what, &backend.read(&qkv).unwrap(), &expected, &magnitude, rope_of(dtype));

            let mut untouched = upload_as(backend, &x, shape.qkv_width(), dtype);
            backend.begin_step(&step).unwrap();
            backend.rope_and_store_kv(&mut untouched, None, &shape, 0, &mut cache).unwrap();
            assert_eq!(backend.read(&untouched).unwrap(), x, "without rope nothing turns");
        }
    }
}

#[test]
fn rope_turns_queries_and_keys() {
    on_every_backend!(agrees);
}

/// Three sequences in one step: a chunk in the middle of a long prompt, a short prompt, and a token that was generated after a
/// short prompt and lies beyond the context.
fn mixed_step() -> StepInput {
    StepInput {
        input_ids: vec![0; 9],
        position_ids: vec![2, 3, 4, 5, 0, 1, 2, 3, 47],
        slot_mapping: (16..25).collect(),
        cu_seqlens_q: vec![0, 4, 8, 9],
        context_lens: vec![6, 4, 48],
        prompt_lens: vec![90, 32, 32],
        block_tables: vec![1, 0, 0, 1, 0, 0, 1, 2, 3],
        max_blocks: 3,
        logits_rows: vec![8],
    }
}

fn follows_the_prompt<B: Backend>(backend: &mut B) {
    let shape = AttentionShape {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 12,
        scale: 1.0,
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let layout =
        KvLayout { num_layers: 1, num_kv_heads: 1, head_dim: 12, block_size: 16, dtype: DType::F32.into() };
    let mut cache = backend.kv_cache(layout, 4).unwrap();
    let plain = |theta: f64| (0..6).map(|pair| theta.powf(f64::from(pair) / -6.0) as f32).collect::<Vec<_>>();
    let short = RopeFrequencies { inv_freq: plain(100.0), scale: 1.25, style: RopeStyle::Half, beyond: None };
    let fixed = LongFrequencies::Fixed { inv_freq: plain(700.0), scale: 1.75 };
    let ntk = LongFrequencies::Ntk { theta: 100.0, factor: 4.0 };
    // 4 * 90 / 32 - 3, to the power of 12 / 10.
    let stretched = 100.0 * 8.25_f64.powf(1.2);
    for (frequencies, long_inv_freq, long_scale) in
        [(fixed, plain(700.0), 1.75), (ntk, plain(stretched), 1.25)]
    {
        let long = RopeFrequencies { inv_freq: long_inv_freq, scale: long_scale, ..short.clone() };
        let beyond = Some(LongContext { context: 32, frequencies });
        let rope = backend.rope(RopeFrequencies { beyond, ..short.clone() }).unwrap();
        let x = Random(3).vector(9 * shape.qkv_width());
        let mut qkv = upload(backend, &x, shape.qkv_width());
        let step = mixed_step();
        backend.begin_step(&step).unwrap();
        backend.rope_and_store_kv(&mut qkv, Some(&rope), &shape, 0, &mut cache).unwrap();
        let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (token, row) in expected.chunks_mut(shape.qkv_width()).enumerate() {
            let frequencies = if token < 4 { &long } else { &short };
            row[..3 * 12]
                .chunks_mut(12)
                .for_each(|head| reference(head, frequencies, step.position_ids[token]));
        }
        let magnitude = vec![4.0; expected.len()];
        assert_close("long prompt", &backend.read(&qkv).unwrap(), &expected, &magnitude, ROPE);
    }
}

#[test]
fn the_prompt_decides_by_what_frequencies_a_sequence_turns() {
    on_every_backend!(follows_the_prompt);
}
