//! Attention in Llama's shapes, of decoding sequences and of prompts, over scattered blocks of caches that no L2 memory holds.
//!
//! That the results are right is what the op tests are for.

use backend::cuda::{CudaBackend, CudaKvCache};
use backend::{AttentionShape, Backend, BackendError, DType, KvLayout, StepInput};

use crate::measure::{Figure, MAX_ROWS, Random, buffer, microseconds_of_step};

const BLOCK_SIZE: usize = 16;
/// Bytes of keys and values that are rotated through.
const ROTATED_BYTES: usize = 512 << 20;
/// An operation of this size stands for a ceiling: any does.
const CEILING_BYTES: f64 = 1e9;
const CEILING_FLOPS: f64 = 1e12;

const LLAMA_8B: (usize, usize, usize) = (32, 8, 128);
const LLAMA_1B: (usize, usize, usize) = (32, 8, 64);

/// What the hardware allows, then decoding, then prompts.
pub(crate) fn measure(backend: &mut CudaBackend) -> Result<Vec<Figure>, BackendError> {
    let ceilings = backend.measure_ceilings()?;
    let mut figures = vec![
        Figure {
            name: "ceiling of reading".to_owned(),
            microseconds: CEILING_BYTES / ceilings.read_bytes_per_second * 1e6,
            bytes: CEILING_BYTES,
            flops: 0.0,
        },
        Figure {
            name: "ceiling of multiplying".to_owned(),
            microseconds: CEILING_FLOPS / ceilings.bf16.burst * 1e6,
            bytes: 0.0,
            flops: CEILING_FLOPS,
        },
    ];
    for (heads, batch, context) in [
        (LLAMA_8B, 1, 1024),
        (LLAMA_8B, 8, 1024),
        (LLAMA_8B, 32, 1024),
        (LLAMA_8B, 128, 1024),
        (LLAMA_8B, 1, 131_072),
        (LLAMA_1B, 1, 1024),
        (LLAMA_1B, 32, 1024),
        (LLAMA_1B, 128, 1024),
        ((16, 8, 256), 32, 1024),
        ((16, 1, 128), 32, 4096),
    ] {
        figures.push(one(backend, heads, (batch, context, 1))?);
    }
    for (heads, batch, context, queries) in [
        (LLAMA_8B, 1, 1024, 1024),
        (LLAMA_8B, 1, 4096, 4096),
        (LLAMA_8B, 4, 2048, 2048),
        (LLAMA_8B, 1, 16_384, 2048),
        (LLAMA_1B, 4, 2048, 2048),
        ((16, 8, 256), 4, 2048, 2048),
    ] {
        figures.push(one(backend, heads, (batch, context, queries))?);
    }
    Ok(figures)
}

/// `batch` sequences of `context` tokens, of which the last `queries` are this step's.
fn one(
    backend: &mut CudaBackend,
    (num_heads, num_kv_heads, head_dim): (usize, usize, usize),
    (batch, context, queries): (usize, usize, usize),
) -> Result<Figure, BackendError> {
    let shape = AttentionShape {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        soft_cap: None,
        alibi: None,
    };
    let bytes = batch * context * num_kv_heads * head_dim * 4;
    let num_layers = (ROTATED_BYTES / bytes + 1).clamp(2, 64);
    let layout =
        KvLayout { num_layers, num_kv_heads, head_dim, block_size: BLOCK_SIZE, dtype: DType::BF16.into() };
    let blocks = batch * context.div_ceil(BLOCK_SIZE) + 1;
    let mut cache = backend.kv_cache(layout, blocks)?;
    let mut random = Random(4);
    fill(backend, &mut random, &shape, (&mut cache, num_layers), blocks * BLOCK_SIZE)?;
    let step = step(batch, context, queries, blocks);
    let qkv = buffer(backend, &mut random, (step.num_tokens(), shape.qkv_width()), DType::BF16)?;
    let mut out = backend.buffer(step.num_tokens(), num_heads * head_dim, DType::BF16)?;
    let microseconds = microseconds_of_step(backend, &step, num_layers, |backend, layer| {
        backend.attention(&qkv, &shape, layer, &cache, &mut out)
    })?;
    let pairs: usize = (context - queries + 1..=context).sum();
    Ok(Figure {
        name: format!("attention {batch} x {queries} of {context}, {num_heads}/{num_kv_heads} x {head_dim}"),
        microseconds,
        bytes: bytes as f64,
        flops: 4.0 * (batch * pairs * num_heads * head_dim) as f64,
    })
}

/// Random keys and values in all slots: zeros would be read and multiplied faster.
fn fill(
    backend: &mut CudaBackend,
    random: &mut Random,
    shape: &AttentionShape,
    (cache, num_layers): (&mut CudaKvCache, usize),
    slots: usize,
) -> Result<(), BackendError> {
    let mut qkv = buffer(backend, random, (slots.min(MAX_ROWS), shape.qkv_width()), DType::BF16)?;
    for first in (0..slots).step_by(MAX_ROWS) {
        // The last step begins early enough to be as long as the others.
        let first = first.min(slots.saturating_sub(MAX_ROWS)) as u32;
        let count = slots.min(MAX_ROWS) as u32;
        backend.begin_step(&StepInput {
            input_ids: vec![0; count as usize],
            position_ids: (0..count).collect(),
            slot_mapping: (first..first + count).collect(),
            cu_seqlens_q: vec![0, count],
            context_lens: vec![count],
            prompt_lens: vec![count],
            block_tables: vec![0; (count as usize).div_ceil(BLOCK_SIZE)],
            max_blocks: (count as usize).div_ceil(BLOCK_SIZE),
            logits_rows: Vec::new(),
        })?;
        for layer in 0..num_layers {
            backend.rope_and_store_kv(&mut qkv, None, shape, layer, cache)?;
        }
        backend.read(&qkv)?;
    }
    Ok(())
}

/// The step, in blocks that are scattered over the cache.
fn step(batch: usize, context: usize, queries: usize, blocks: usize) -> StepInput {
    let per_sequence = context.div_ceil(BLOCK_SIZE);
    // 7919 is a prime that divides no number of blocks here: every block but the first comes once.
    let block_tables: Vec<u32> =
        (0..batch * per_sequence).map(|block| (1 + block * 7919 % (blocks - 1)) as u32).collect();
    let tokens = || (0..batch).flat_map(|seq| (context - queries..context).map(move |token| (seq, token)));
    StepInput {
        input_ids: vec![0; batch * queries],
        position_ids: tokens().map(|(_, token)| token as u32).collect(),
        slot_mapping: tokens()
            .map(|(seq, token)| {
                let block = block_tables[seq * per_sequence + token / BLOCK_SIZE];
                block * BLOCK_SIZE as u32 + (token % BLOCK_SIZE) as u32
            })
            .collect(),
        cu_seqlens_q: (0..=batch).map(|seq| (seq * queries) as u32).collect(),
        context_lens: vec![context as u32; batch],
        prompt_lens: vec![context as u32; batch],
        block_tables,
        max_blocks: per_sequence,
        logits_rows: Vec::new(),
    }
}
