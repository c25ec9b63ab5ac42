//! Layers of a decode step in one launch against the same layers launch by launch, on CUDA.

use backend::cuda::{CudaBackend, CudaBuffer, CudaKvCache, CudaLinear, CudaRope, CudaVector};
use backend::{
    Activation, AttentionShape, Backend, BackendError, DType, KvLayout, RopeFrequencies, RopeStyle,
    StepInput, StepPart,
};

use crate::cases::{Random, cuda, matrix, random_as, upload_as};

const BLOCK_SIZE: usize = 16;
const VOCABULARY: usize = 50;

/// Sizes of a model.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    dtype: DType,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
}

struct Layer {
    norms: [CudaVector; 2],
    qkv: CudaLinear,
    out: CudaLinear,
    gate_up: CudaLinear,
    down: CudaLinear,
}

struct Buffers {
    residual: CudaBuffer,
    delta: CudaBuffer,
    normed: CudaBuffer,
    qkv: CudaBuffer,
    mixed: CudaBuffer,
    gate_up: CudaBuffer,
    activated: CudaBuffer,
}

struct Model {
    shape: AttentionShape,
    table: CudaLinear,
    layers: Vec<Layer>,
    rope: CudaRope,
    buffers: Buffers,
    cache: CudaKvCache,
}

fn weight(
    backend: &CudaBackend,
    random: &mut Random,
    [outputs, inputs]: [usize; 2],
    dtype: DType,
) -> CudaLinear {
    let scale = 1.0 / (inputs as f32).sqrt();
    let values: Vec<f32> = random.vector(outputs * inputs).into_iter().map(|value| value * scale).collect();
    backend.linear(&[matrix(&values, outputs, inputs, dtype)], dtype).unwrap()
}

impl Model {
    fn new(backend: &CudaBackend, random: &mut Random, sizes: Sizes, (rows, blocks): (usize, usize)) -> Self {
        let Sizes { dtype, hidden, inner, heads, kv_heads, head_dim, layers } = sizes;
        let shape = AttentionShape {
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: None,
            soft_cap: None,
            alibi: None,
        };
        let layer = |random: &mut Random| Layer {
            norms: [0, 1].map(|_| {
                let values = random.vector(hidden).into_iter().map(|value| 1.0 + value / 8.0).collect();
                backend.vector(values).unwrap()
            }),
            qkv: weight(backend, random, [shape.qkv_width(), hidden], dtype),
            out: weight(backend, random, [hidden, heads * head_dim], dtype),
            gate_up: weight(backend, random, [2 * inner, hidden], dtype),
            down: weight(backend, random, [hidden, inner], dtype),
        };
        let inv_freq =
            (0..head_dim / 2).map(|pair| 10_000f32.powf(-2.0 * pair as f32 / head_dim as f32)).collect();
        let frequencies = RopeFrequencies { inv_freq, scale: 1.0, style: RopeStyle::Half, beyond: None };
        let buffer = |width: usize, dtype: DType| backend.buffer(rows, width, dtype).unwrap();
        let layout = KvLayout {
            num_layers: layers,
            num_kv_heads: kv_heads,
            head_dim,
            block_size: BLOCK_SIZE,
            dtype: dtype.into(),
        };
        Self {
            shape,
            table: backend
                .linear(&[matrix(&random.vector(VOCABULARY * hidden), VOCABULARY, hidden, dtype)], dtype)
                .unwrap(),
            layers: (0..layers).map(|_| layer(random)).collect(),
            rope: backend.rope(frequencies).unwrap(),
            buffers: Buffers {
                residual: buffer(hidden, DType::F32),
                delta: buffer(hidden, dtype),
                normed: buffer(hidden, dtype),
                qkv: buffer(shape.qkv_width(), dtype),
                mixed: buffer(heads * head_dim, dtype),
                gate_up: buffer(2 * inner, dtype),
                activated: buffer(inner, dtype),
            },
            cache: backend.kv_cache(layout, blocks).unwrap(),
        }
    }

    /// The layers of the step that has begun, as an executor runs them.
    fn layers(&mut self, backend: &mut CudaBackend) -> Result<(), BackendError> {
        let Self { shape, table, layers, rope, buffers, cache } = self;
        let Buffers { residual, delta, normed, qkv, mixed, gate_up, activated } = buffers;
        backend.embed(table, 0, residual)?;
        for (index, Layer { norms: [norm, mlp_norm], qkv: weight, out, gate_up: gate_up_weight, down }) in
            layers.iter().enumerate()
        {
            if index == 0 {
                backend.rms_norm(residual, norm, 1e-5, normed)?;
            } else {
                backend.add_rms_norm(residual, delta, (norm, 1e-5), normed)?;
            }
            backend.matmul(normed, weight, None, qkv)?;
            backend.rope_and_store_kv(qkv, Some(rope), shape, index, cache)?;
            backend.attention(qkv, shape, index, cache, mixed)?;
            backend.matmul(mixed, out, None, delta)?;
            backend.add_rms_norm(residual, delta, (mlp_norm, 1e-5), normed)?;
            backend.gated_matmul(normed, (gate_up_weight, None), Activation::Silu, (gate_up, activated))?;
            backend.matmul(activated, down, None, delta)?;
        }
        Ok(())
    }

    /// What the step leaves: the stream without the last projection, and that.
    fn run(&mut self, backend: &mut CudaBackend, step: &StepInput) -> (Vec<f32>, Vec<f32>) {
        backend.begin_step(step).unwrap();
        backend.run(StepPart::Layers, |backend| self.layers(backend)).unwrap();
        (backend.read(&self.buffers.residual).unwrap(), backend.read(&self.buffers.delta).unwrap())
    }

    /// Puts random keys and values of all sequences into the cache.
    fn fill_cache(
        &mut self,
        backend: &mut CudaBackend,
        random: &mut Random,
        contexts: &[usize],
        dtype: DType,
    ) {
        let width = self.shape.qkv_width();
        for layer in 0..self.layers.len() {
            let tokens = contexts.iter().sum::<usize>();
            let mut qkv = upload_as(backend, &random_as(random, tokens * width, dtype), width, dtype);
            backend.begin_step(&step_of(contexts, |context| context)).unwrap();
            backend
                .rope_and_store_kv(&mut qkv, Some(&self.rope), &self.shape, layer, &mut self.cache)
                .unwrap();
        }
    }
}

/// A step with `tokens(context)` last tokens of every context, whose blocks lie scattered.
fn step_of(contexts: &[usize], tokens: impl Fn(usize) -> usize) -> StepInput {
    let max_blocks = contexts.iter().map(|context| context.div_ceil(BLOCK_SIZE)).max().unwrap_or(0);
    // Blocks 1, 2, ... go round the sequences from the last one on.
    let block = |seq: usize, index: usize| 1 + index * contexts.len() + (contexts.len() - 1 - seq);
    let mut step = StepInput { cu_seqlens_q: vec![0], max_blocks, ..StepInput::default() };
    for (seq, &context) in contexts.iter().enumerate() {
        for position in context - tokens(context)..context {
            step.input_ids.push(((seq * 31 + position * 7) % VOCABULARY) as u32);
            step.position_ids.push(position as u32);
            let slot = block(seq, position / BLOCK_SIZE) * BLOCK_SIZE + position % BLOCK_SIZE;
            step.slot_mapping.push(slot as u32);
        }
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(context as u32);
        step.prompt_lens.push(context as u32);
        step.block_tables.extend((0..max_blocks).map(|index| block(seq, index) as u32));
    }
    step.logits_rows = step.cu_seqlens_q[1..].iter().map(|end| end - 1).collect();
    step
}

fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let square =
        |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (difference / square(&mut expected.iter().copied())).sqrt()
}

fn check(sizes: Sizes, contexts: &[usize]) {
    let Some(mut backend) = cuda() else { return };
    let mut random = Random(contexts[0] as u64);
    let rows = contexts.len();
    let blocks = 1 + rows * contexts.iter().map(|context| context.div_ceil(BLOCK_SIZE)).max().unwrap();
    let mut model = Model::new(&backend, &mut random, sizes, (rows, blocks));
    model.fill_cache(&mut backend, &mut random, contexts, sizes.dtype);
    let step = step_of(contexts, |_| 1);
    let (residual, delta) = model.run(&mut backend, &step);
    // The second time it runs launch by launch too, and is recorded.
    let recorded = model.run(&mut backend, &step);
    assert!(distance(&recorded.0, &residual) < 1e-6 && distance(&recorded.1, &delta) < 1e-6);
    if !backend.merges_steps() {
        eprintln!("no merged steps on this device");
        return;
    }
    assert!(backend.has_merged_step(rows), "{sizes:?} with {rows} sequences is not merged");
    let first = model.run(&mut backend, &step);
    let most = if sizes.dtype == DType::F16 { 2e-3 } else { 1.5e-2 };
    for (what, found, expected) in [("residual", &first.0, &residual), ("delta", &first.1, &delta)] {
        let distance = distance(found, expected);
        eprintln!("{sizes:?}, contexts {contexts:?}: {what} {distance:.2e}");
        assert!(distance < most, "{what} of {sizes:?} with contexts {contexts:?}: {distance:.2e}");
    }
    for _ in 0..8 {
        let again = model.run(&mut backend, &step);
        assert!(again.0 == first.0 && again.1 == first.1, "{sizes:?}: not the same bits again");
    }
}

#[test]
fn one_launch_computes_what_many_do() {
    let llama = Sizes {
        dtype: DType::BF16,
        hidden: 512,
        inner: 1408,
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        layers: 3,
    };
    let small =
        Sizes { dtype: DType::F16, hidden: 576, inner: 1536, heads: 9, kv_heads: 3, head_dim: 64, layers: 4 };
    for (sizes, contexts) in [
        (llama, &[37][..]),
        (Sizes { dtype: DType::F16, ..llama }, &[1025]),
        (Sizes { heads: 16, kv_heads: 2, ..llama }, &[5000]),
        (Sizes { heads: 4, kv_heads: 4, ..llama }, &[777, 20]),
        (Sizes { heads: 8, kv_heads: 1, ..small }, &[900]),
        (small, &[1]),
        (small, &[129, 2000]),
        (Sizes { dtype: DType::BF16, ..small }, &[16, 17]),
        // More pieces of a row than places in the ring.
        (Sizes { hidden: 1024, inner: 14_336, layers: 2, ..llama }, &[130]),
    ] {
        check(sizes, contexts);
    }
}
