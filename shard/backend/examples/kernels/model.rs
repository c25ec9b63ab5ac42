//! A transformer of SmolLM2-135M's shapes with random weights.

use std::borrow::Cow;

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuBuffer, CpuKvCache, CpuOptions, CpuRope, CpuVector, PackedLinear};
use backend::sampling::{SamplingParams, SamplingRow};
use backend::{
    Activation, AttentionShape, Backend, BackendError, DType, HostMatrix, KvLayout, QuantizedMatrix,
    RopeFrequencies, RopeStyle, StepInput,
};

use crate::measure::PartsClock;

pub(crate) const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49_152;
const MAX_TOKENS: usize = 512;
const MAX_CONTEXT: usize = 1024;
/// Blocks of the cache: a long sequence, or sixteen shorter ones.
const BLOCKS: usize = 2 * MAX_CONTEXT / 16 + 1;
const SHAPE: AttentionShape = AttentionShape {
    num_heads: 9,
    num_kv_heads: 3,
    head_dim: 64,
    scale: 0.125,
    window: None,
    soft_cap: None,
    alibi: None,
};

struct Layer {
    qkv: PackedLinear,
    output: PackedLinear,
    gate_up: PackedLinear,
    down: PackedLinear,
}

struct Buffers {
    hidden: CpuBuffer,
    normed: CpuBuffer,
    qkv: CpuBuffer,
    attended: CpuBuffer,
    gate_up: CpuBuffer,
    activated: CpuBuffer,
    last: CpuBuffer,
    logits: CpuBuffer,
}

pub(crate) struct Model {
    backend: CpuBackend,
    layers: Vec<Layer>,
    head: PackedLinear,
    norm: CpuVector,
    rope: CpuRope,
    cache: CpuKvCache,
    buffers: Buffers,
    logits_rows: Vec<u32>,
    clock: PartsClock,
}

/// A matrix of small random numbers, as `dtype`.
fn random_matrix(rows: usize, cols: usize, dtype: DType) -> HostMatrix<'static> {
    let mut state = (rows * cols) as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.1
    };
    let count = rows * cols;
    let bytes: Vec<u8> = match dtype {
        DType::F32 => (0..count).flat_map(|_| next().to_le_bytes()).collect(),
        DType::F16 => (0..count).flat_map(|_| half::f16::from_f32(next()).to_le_bytes()).collect(),
        DType::BF16 => (0..count).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect(),
    };
    HostMatrix { dtype, rows, cols, row_stride: cols, bytes: Cow::Owned(bytes) }
}

/// A matrix of random small integers: of 4 bits as Q4_1 has them, of 8 as Q8_0.
fn random_quantized(rows: usize, cols: usize, bits: u32) -> QuantizedMatrix {
    let mut state = (rows * cols) as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    };
    let values = (0..rows * cols).map(|_| (next() >> (16 - bits)) as u8).collect();
    let scales: Vec<f32> =
        (0..rows * cols / 32).map(|_| half::f16::from_f32(next() as f32 * 1e-9).to_f32()).collect();
    let offsets = match bits {
        8 => scales.iter().map(|scale| -128.0 * scale).collect(),
        _ => (0..scales.len()).map(|_| half::f16::from_f32(next() as f32 * -1e-8).to_f32()).collect(),
    };
    QuantizedMatrix { rows, cols, bits, group_size: 32, values, scales, offsets }
}

/// How weights are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights {
    Plain(DType),
    /// So many bits.
    Quantized(u32),
}

impl Model {
    pub(crate) fn new(options: CpuOptions, weights: Weights) -> Result<Self, BackendError> {
        let backend = CpuBackend::new(options, Box::new(Single))?;
        let pack = |count, rows, cols| match weights {
            Weights::Plain(dtype) => {
                let matrix = [random_matrix(rows, cols, dtype)];
                (0..count).map(|_| backend.linear(&matrix, dtype)).collect::<Result<Vec<_>, _>>()
            }
            Weights::Quantized(bits) => {
                let matrix = [random_quantized(rows, cols, bits)];
                (0..count).map(|_| backend.quantized_linear(&matrix)).collect()
            }
        };
        let (qkv, output) = (pack(LAYERS, SHAPE.qkv_width(), HIDDEN)?, pack(LAYERS, HIDDEN, HIDDEN)?);
        let (gate_up, down) = (pack(LAYERS, 2 * INTERMEDIATE, HIDDEN)?, pack(LAYERS, HIDDEN, INTERMEDIATE)?);
        let layers = qkv.into_iter().zip(output).zip(gate_up.into_iter().zip(down));
        let layers =
            layers.map(|((qkv, output), (gate_up, down))| Layer { qkv, output, gate_up, down }).collect();
        let head = pack(1, VOCAB, HIDDEN)?.remove(0);
        let dtype = match weights {
            Weights::Plain(dtype) => dtype,
            Weights::Quantized(_) => DType::BF16,
        };
        let inv_freq = (0..32u8).map(|i| 10_000f32.powf(-f32::from(i) / 32.0)).collect();
        let rope =
            backend.rope(RopeFrequencies { inv_freq, scale: 1.0, style: RopeStyle::Half, beyond: None })?;
        let layout = KvLayout {
            num_layers: LAYERS,
            num_kv_heads: 3,
            head_dim: 64,
            block_size: 16,
            dtype: dtype.into(),
        };
        let cache = backend.kv_cache(layout, BLOCKS)?;
        let buffer = |width| backend.buffer(MAX_TOKENS, width, DType::F32);
        let buffers = Buffers {
            hidden: buffer(HIDDEN)?,
            normed: buffer(HIDDEN)?,
            qkv: buffer(SHAPE.qkv_width())?,
            attended: buffer(HIDDEN)?,
            gate_up: buffer(2 * INTERMEDIATE)?,
            activated: buffer(INTERMEDIATE)?,
            last: backend.buffer(16, HIDDEN, DType::F32)?,
            logits: backend.buffer(16, VOCAB, DType::F32)?,
        };
        let norm = backend.vector(vec![1.0; HIDDEN])?;
        let clock = PartsClock::default();
        Ok(Model { backend, layers, head, norm, rope, cache, buffers, logits_rows: vec![0], clock })
    }

    pub(crate) fn description(&self) -> String {
        self.backend.device().description
    }

    pub(crate) fn weight_bytes(&self) -> usize {
        let bytes = |weight| self.backend.linear_bytes(weight);
        let layer = &self.layers[0];
        LAYERS * (bytes(&layer.qkv) + bytes(&layer.output) + bytes(&layer.gate_up) + bytes(&layer.down))
            + bytes(&self.head)
    }

    pub(crate) fn layer_parameters(&self) -> usize {
        LAYERS * HIDDEN * (SHAPE.qkv_width() + HIDDEN + 3 * INTERMEDIATE)
    }

    /// The last `tokens` tokens of a sequence of `context`.
    pub(crate) fn begin(&mut self, tokens: usize, context: usize) -> Result<(), BackendError> {
        let positions = (context - tokens) as u32..context as u32;
        self.logits_rows = vec![tokens as u32 - 1];
        let blocks = context.div_ceil(16);
        self.backend.begin_step(&StepInput {
            input_ids: positions.clone().collect(),
            position_ids: positions.clone().collect(),
            slot_mapping: positions.map(|position| position + 16).collect(),
            cu_seqlens_q: vec![0, tokens as u32],
            context_lens: vec![context as u32],
            prompt_lens: vec![context as u32],
            block_tables: (1..=blocks as u32).collect(),
            max_blocks: blocks,
            logits_rows: self.logits_rows.clone(),
        })?;
        self.buffers.hidden.resize(tokens);
        self.buffers.qkv.resize(tokens);
        self.buffers.gate_up.resize(tokens);
        Ok(())
    }

    /// The next token of `seqs` sequences of `context`.
    pub(crate) fn begin_batch(&mut self, seqs: usize, context: usize) -> Result<(), BackendError> {
        let blocks = context.div_ceil(16);
        let position = context as u32 - 1;
        self.logits_rows = (0..seqs as u32).collect();
        self.backend.begin_step(&StepInput {
            input_ids: self.logits_rows.clone(),
            position_ids: vec![position; seqs],
            slot_mapping: (0..seqs).map(|seq| (16 + seq * blocks * 16) as u32 + position).collect(),
            cu_seqlens_q: (0..=seqs as u32).collect(),
            context_lens: vec![context as u32; seqs],
            prompt_lens: vec![context as u32; seqs],
            block_tables: (1..=(seqs * blocks) as u32).collect(),
            max_blocks: blocks,
            logits_rows: self.logits_rows.clone(),
        })
    }

    /// All products of a step, the output layer for each row.
    pub(crate) fn weights_only(&mut self, rows: usize) {
        self.layers_only(rows);
        let buffers = &mut self.buffers;
        buffers.last.resize(rows);
        self.backend
            .matmul(&buffers.last, &self.head, None, &mut buffers.logits)
            .expect("a CPU product cannot fail");
    }

    /// All products of the layers.
    pub(crate) fn layers_only(&mut self, rows: usize) {
        let (backend, b) = (&mut self.backend, &mut self.buffers);
        b.hidden.resize(rows);
        b.activated.resize(rows);
        for layer in &self.layers {
            backend.matmul(&b.hidden, &layer.qkv, None, &mut b.qkv).expect("a CPU product cannot fail");
            backend.matmul(&b.hidden, &layer.output, None, &mut b.normed).expect("a CPU product cannot fail");
            backend
                .matmul(&b.hidden, &layer.gate_up, None, &mut b.gate_up)
                .expect("a CPU product cannot fail");
            backend
                .matmul(&b.activated, &layer.down, None, &mut b.normed)
                .expect("a CPU product cannot fail");
        }
    }

    /// Attention of all layers.
    pub(crate) fn attention_only(&mut self) {
        let b = &mut self.buffers;
        for layer in 0..LAYERS {
            self.backend
                .attention(&b.qkv, &SHAPE, layer, &self.cache, &mut b.attended)
                .expect("the step fits");
        }
    }

    /// One gated activation.
    pub(crate) fn activation_only(&mut self, activation: Activation) {
        let b = &mut self.buffers;
        self.backend.gated_activation(&b.gate_up, activation, &mut b.activated).expect("it cannot fail");
    }

    /// A whole forward pass, with the output layer for the last token and a greedy choice.
    pub(crate) fn step(&mut self) {
        self.forward().expect("the step fits");
        self.sample_only();
    }

    fn forward(&mut self) -> Result<(), BackendError> {
        let (backend, b, clock) = (&mut self.backend, &mut self.buffers, &mut self.clock);
        let norm = (&self.norm, 1e-5);
        clock.time("embedding and norms", || {
            backend.embed(&self.head, 0, &mut b.hidden)?;
            backend.rms_norm(&b.hidden, &self.norm, 1e-5, &mut b.normed)
        })?;
        for (index, layer) in self.layers.iter().enumerate() {
            clock.time("products", || backend.matmul(&b.normed, &layer.qkv, None, &mut b.qkv))?;
            clock.time("rope and storing", || {
                backend.rope_and_store_kv(&mut b.qkv, Some(&self.rope), &SHAPE, index, &mut self.cache)
            })?;
            clock.time("attention", || {
                backend.attention(&b.qkv, &SHAPE, index, &self.cache, &mut b.attended)
            })?;
            clock.time("products", || backend.matmul(&b.attended, &layer.output, None, &mut b.normed))?;
            backend.all_reduce(&mut b.normed)?;
            // The product is also the norm's input: its result goes to the attention's buffer, free by now.
            clock.time("embedding and norms", || {
                backend.add_rms_norm(&mut b.hidden, &b.normed, norm, &mut b.attended)
            })?;
            clock.time("products", || backend.matmul(&b.attended, &layer.gate_up, None, &mut b.gate_up))?;
            clock.time("activation", || {
                backend.gated_activation(&b.gate_up, Activation::Silu, &mut b.activated)
            })?;
            clock.time("products", || backend.matmul(&b.activated, &layer.down, None, &mut b.attended))?;
            backend.all_reduce(&mut b.attended)?;
            clock.time("embedding and norms", || {
                backend.add_rms_norm(&mut b.hidden, &b.attended, norm, &mut b.normed)
            })?;
        }
        clock.time("products", || {
            backend.gather_rows(&b.normed, &self.logits_rows, &mut b.last)?;
            backend.matmul(&b.last, &self.head, None, &mut b.logits)
        })
    }

    /// Where the time of a step goes: each part's name and its median seconds.
    pub(crate) fn step_parts(&mut self, runs: usize) -> Vec<(&'static str, f64)> {
        self.clock.start();
        for _ in 0..runs {
            self.step();
            self.clock.end_step();
        }
        self.clock.medians()
    }

    /// Greedy choices from the last logits.
    pub(crate) fn sample_only(&mut self) {
        let params = SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            typical_p: 1.0,
            do_sample: false,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
        };
        let rows: Vec<_> = self
            .logits_rows
            .iter()
            .map(|_| SamplingRow { params: &params, history: &[], top_n: 0 })
            .collect();
        let logits = &mut self.buffers.logits;
        logits.resize(rows.len());
        let sampled = self.clock.time("sampling", || self.backend.sample(logits, &rows));
        sampled.expect("sampling cannot fail");
    }
}
