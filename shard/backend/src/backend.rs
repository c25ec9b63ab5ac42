//! The contract between the executor and a device.

use std::borrow::Cow;
use std::ops::Range;

use crate::sampling::{Sampled, SamplingRow};
use crate::{
    BackendError, DType, Fp8Matrix, HostMatrix, KvDType, KvLayout, QuantizedMatrix, Routing, StepInput,
};

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu` or `cuda`, as `Info.device_type` reports it.
    pub device_type: &'static str,
    /// For people: the processor and the kernels chosen for it.
    pub description: String,
    /// Operations return before they are done; what reads a result waits.
    pub is_asynchronous: bool,
}

/// Memory of the device, in bytes. For the CPU: of the machine, or of its control group where that is less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// All of it.
    pub total_bytes: usize,
    /// What can still be allocated.
    pub available_bytes: usize,
}

/// Which two components of a head a rotation pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(i, i + rotary_dim / 2)`: GPT-NeoX, Llama in Hugging Face's layout.
    Half,
    /// `(2i, 2i + 1)`: GPT-J, Llama in Meta's layout.
    Interleaved,
}

/// A rotary embedding (RoFormer, arXiv:2104.09864): component pair `i` of a token at position `p` turns by
/// `p * inv_freq[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// `[rotary_dim / 2]`; the rotary dimension may be less than the head's, the rest is left as it is.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (YaRN's attention factor), usually 1.
    pub scale: f32,
    /// Pairing.
    pub style: RopeStyle,
    /// What holds for long prompts instead; none: the same for all.
    pub beyond: Option<LongContext>,
}

/// Other frequencies for sequences with a long prompt.
///
/// The length of the *prompt* decides, once for the sequence's whole life: keys that are in the cache were turned already, so
/// a sequence that changed frequencies as it grew would compare queries with keys of another rotation. For the same reason
/// sequences may only share cached keys when [`RopeFrequencies::for_prompt`] answers both of them the same.
#[derive(Debug, Clone, PartialEq)]
pub struct LongContext {
    /// Prompts of more tokens than this are long.
    pub context: u32,
    /// What holds for them.
    pub frequencies: LongFrequencies,
}

/// Frequencies of long prompts.
#[derive(Debug, Clone, PartialEq)]
pub enum LongFrequencies {
    /// The same for all of them (LongRoPE, arXiv:2402.13753).
    Fixed {
        /// As many as in [`RopeFrequencies::inv_freq`].
        inv_freq: Vec<f32>,
        /// Factor on cosine and sine.
        scale: f32,
    },
    /// Dynamic NTK: the base of the frequencies grows with the prompt.
    Ntk {
        /// Base of the frequencies of prompts that are not long.
        theta: f64,
        /// How steeply it grows.
        factor: f64,
    },
}

impl RopeFrequencies {
    /// Frequencies `[rotary_dim / 2]` and factor on cosine and sine of a sequence whose prompt has `prompt_len` tokens.
    pub fn for_prompt(&self, prompt_len: u32) -> (Cow<'_, [f32]>, f32) {
        match &self.beyond {
            Some(LongContext { context, frequencies }) if prompt_len > *context => match frequencies {
                LongFrequencies::Fixed { inv_freq, scale } => (Cow::Borrowed(inv_freq), *scale),
                LongFrequencies::Ntk { theta, factor } => {
                    let dim = 2.0 * self.inv_freq.len() as f64;
                    let stretch = factor * f64::from(prompt_len) / f64::from(*context) - (factor - 1.0);
                    let theta = theta * stretch.powf(dim / (dim - 2.0));
                    let pairs = 0..self.inv_freq.len();
                    (pairs.map(|pair| theta.powf(-2.0 * pair as f64 / dim) as f32).collect(), self.scale)
                }
            },
            _ => (Cow::Borrowed(&self.inv_freq), self.scale),
        }
    }
}

/// Attention with linear biases (ALiBi, arXiv:2108.12409): a key `n` tokens before the query gets `-slope * n`, added to
/// the score after the factor and before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alibi {
    /// Query heads of the whole model, from which the slopes follow.
    pub total_heads: usize,
    /// The first of them that is this rank's.
    pub first_head: usize,
    /// The slopes of `2^k` heads fall geometrically to `2^-max_bias`.
    pub max_bias: f32,
    /// Factor on all slopes, usually 1.
    pub multiplier: f32,
}

impl Alibi {
    /// The slope of this rank's head `head`. A model whose heads are no power of two takes the slopes of the next lower one
    /// first, then every other one of the next higher.
    pub fn slope(&self, head: usize) -> f32 {
        let head = self.first_head + head;
        let lower = 1 << self.total_heads.max(1).ilog2();
        let (power, heads) =
            if head < lower { (head + 1, lower) } else { (2 * (head - lower) + 1, 2 * lower) };
        let exponent = f64::from(self.max_bias) * power as f64 / heads as f64;
        (-exponent).exp2() as f32 * self.multiplier
    }
}

/// Norm of columns that are spread over the ranks.
#[derive(Debug)]
pub struct SplitNorm<'a, V> {
    /// Weight of this rank's columns.
    pub weight: &'a V,
    /// Added under the root.
    pub eps: f32,
    /// Columns of all ranks together, each counted once.
    pub total_width: usize,
    /// Ranks that have these same columns, this one included.
    pub copies: usize,
}

/// Heads of this rank and what bounds their attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A token sees itself and the `window - 1` before it; none: all.
    pub window: Option<usize>,
    /// Scores become `soft_cap * tanh(score / soft_cap)`.
    pub soft_cap: Option<f32>,
    /// Biases on the scores.
    pub alibi: Option<Alibi>,
}

impl AttentionShape {
    /// Width of a packed row of queries, keys and values.
    pub const fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// The non-linearity of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU with the tanh approximation.
    GeluTanh,
    /// GELU with the error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// Columns of a buffer that are cut into heads: head `h` has the columns `first + h * stride..first + h * stride + width`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadColumns {
    /// First column of the first head.
    pub first: usize,
    /// Columns from one head's first to the next one's.
    pub stride: usize,
    /// Columns of a head, at most `stride` where there are several.
    pub width: usize,
}

/// A part of a step, see [`Backend::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StepPart {
    /// From the embedding through all layers.
    Layers,
    /// From the hidden states to the logits.
    Logits,
}

/// A device and the operations a model needs of it.
///
/// A [`Backend::Buffer`] holds activations `[rows, width]`, row-major; `width` and the largest number of rows are fixed
/// when it is made, the number of rows is set by whatever operation writes it. Nothing here allocates after start-up.
/// Every operation that reads positions, slots or tables reads those of the last [`Backend::begin_step`].
///
/// With several ranks every rank calls the same operations in the same order; [`Backend::all_reduce`] and
/// [`Backend::all_gather`] are where they meet, and their results are bitwise equal on all ranks.
pub trait Backend: Send + Sized + 'static {
    /// Activations `[rows, width]`.
    type Buffer: Send;
    /// A linear layer's weight `[out_features, in_features]`, packed for this device.
    type Linear: Send;
    /// A small parameter `[width]`: a norm's weight, a bias.
    type Vector: Send;
    /// Feed-forward layers of equal sizes, of which a token passes a few.
    type Experts: Send;
    /// A rotary embedding.
    type Rope: Send;
    /// The paged KV cache of all layers.
    type KvCache: Send;

    /// What this backend runs on.
    fn device(&self) -> DeviceInfo;
    /// Memory now.
    fn memory(&self) -> Result<MemoryInfo, BackendError>;
    /// This process's rank and the number of ranks.
    fn rank_and_world(&self) -> (usize, usize);
    /// The element type weights of type `stored` are kept in when nobody asks for another.
    fn default_dtype(&self, stored: DType) -> DType;
    /// The element type of the KV cache of a model with weights of `dtype` when nobody asks for another.
    fn default_kv_dtype(&self, dtype: DType) -> DType;
    /// Whether the KV cache can have elements of `dtype`.
    ///
    /// # Errors
    /// It cannot: one line.
    fn check_kv_dtype(&self, dtype: KvDType) -> Result<(), BackendError>;
    /// Whether weights that are stored quantized are run so when nobody asks for a type; else they become
    /// [`Backend::default_dtype`].
    fn keeps_quantized(&self) -> bool;
    /// Whether [`Backend::fp8_linear`] keeps weights in eight bits, so that [`Backend::quantized_to_fp8`] makes a model smaller.
    fn keeps_fp8(&self) -> bool {
        false
    }
    /// The type that weights stored as fp8 are multiplied in when nobody asks for one, in a model whose other weights are of
    /// `dtype`: of the activations where they stay in eight bits, else one that holds number times scale.
    fn fp8_dtype(&self, _dtype: DType) -> DType {
        DType::F32
    }
    /// The number of sequences a step of one token each has to have: `num_seqs` or more, where the device has prepared steps
    /// of some sizes only. The executor fills up with sequences whose results nobody reads.
    fn padded_batch(&self, num_seqs: usize) -> usize {
        num_seqs
    }
    /// The largest number of tokens a step should have; longer prompts are cut into several.
    fn max_step_tokens(&self) -> usize;

    /// Makes a buffer of at most `max_rows` rows, zeroed. Its elements have at least the precision of `dtype`.
    fn buffer(&self, max_rows: usize, width: usize, dtype: DType) -> Result<Self::Buffer, BackendError>;
    /// Packs the matrices `parts`, stacked along their rows (outputs), in `dtype`. All have the same number of columns.
    fn linear(&self, parts: &[HostMatrix<'_>], dtype: DType) -> Result<Self::Linear, BackendError>;
    /// Makes experts of each one's projections: gate and up as one, `[2 * width, hidden]` with the gate first, and down,
    /// `[hidden, width]`. All have the same shapes and types.
    fn experts(
        &self,
        projections: Vec<(Self::Linear, Self::Linear)>,
        activation: Activation,
    ) -> Result<Self::Experts, BackendError>;
    /// Packs the quantized matrices `parts`, stacked along their rows (outputs), without loss. All have the same number of columns;
    /// group sizes are powers of two from 16.
    fn quantized_linear(&self, parts: &[QuantizedMatrix]) -> Result<Self::Linear, BackendError>;
    /// Packs the fp8 matrices `parts`, stacked along their rows (outputs), to be multiplied with activations of `dtype`. All have
    /// the same number of columns. Where the backend does not keep eight bits they are dequantized to `dtype`.
    fn fp8_linear(&self, parts: &[Fp8Matrix<'_>], dtype: DType) -> Result<Self::Linear, BackendError> {
        let dequantized: Vec<HostMatrix<'_>> = parts.iter().map(Fp8Matrix::dequantized).collect();
        self.linear(&dequantized, dtype)
    }
    /// Packs the matrices `parts`, stacked along their rows (outputs), rounded to E4M3 with a scale for each row, the row's largest
    /// magnitude over 448, to be multiplied with activations of `dtype`. Only where [`Backend::keeps_fp8`].
    fn quantized_to_fp8(
        &self,
        _parts: &[HostMatrix<'_>],
        _dtype: DType,
    ) -> Result<Self::Linear, BackendError> {
        Err(BackendError::Device {
            operation: "quantizing a weight to fp8".to_owned(),
            reason: "this device does not keep weights in eight bits".to_owned(),
        })
    }
    /// Makes a small parameter.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector, BackendError>;
    /// Makes a rotary embedding.
    fn rope(&self, frequencies: RopeFrequencies) -> Result<Self::Rope, BackendError>;
    /// Makes a KV cache of `num_blocks` blocks.
    fn kv_cache(&self, layout: KvLayout, num_blocks: usize) -> Result<Self::KvCache, BackendError>;
    /// Bytes a packed weight occupies, for the memory ledger.
    fn linear_bytes(&self, weight: &Self::Linear) -> usize;

    /// Takes the inputs of the next forward pass.
    fn begin_step(&mut self, step: &StepInput) -> Result<(), BackendError>;
    /// Runs `operations`, which is one `part` of a step. In a step of one token a sequence they depend on nothing but the
    /// number of rows, the weights and the buffers, so that a device may record what they launch and replay that for a
    /// later step with as many rows; `operations` is called in any case, and twice where it is run and recorded.
    fn run<E: From<BackendError>>(
        &mut self,
        part: StepPart,
        mut operations: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let _ = part;
        operations(self)
    }

    /// `out[t] = table[input_ids[t] - first_id]`, zeros where the id is not in this rank's part
    /// (`first_id..first_id + table rows`). `out`: `[num_tokens, in_features]`.
    fn embed(
        &mut self,
        table: &Self::Linear,
        first_id: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `out[t] += table[position_ids[t] + offset]`: learned positions.
    fn add_positions(
        &mut self,
        table: &Self::Linear,
        offset: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// RMSNorm (arXiv:1910.07467): `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
    fn rms_norm(
        &mut self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `x = rms_norm(x)`.
    fn rms_norm_in_place(
        &mut self,
        x: &mut Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(), BackendError>;
    /// `residual += delta; out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        norm: (&Self::Vector, f32),
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// LayerNorm (arXiv:1607.06450): `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, row by row, with the
    /// variance over all elements.
    fn layer_norm(
        &mut self,
        x: &Self::Buffer,
        weight_and_bias: (&Self::Vector, &Self::Vector),
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `x = layer_norm(x)`.
    fn layer_norm_in_place(
        &mut self,
        x: &mut Self::Buffer,
        weight_and_bias: (&Self::Vector, &Self::Vector),
        eps: f32,
    ) -> Result<(), BackendError>;
    /// `residual += delta; out = layer_norm(residual)`.
    fn add_layer_norm(
        &mut self,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        norm: (&Self::Vector, &Self::Vector, f32),
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// RMSNorm of each head in place: the columns `columns` of every row of `x` are heads as wide as the weight, and each is
    /// normalised by itself.
    fn rms_norm_heads(
        &mut self,
        x: &mut Self::Buffer,
        columns: Range<usize>,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(), BackendError>;
    /// LayerNorm without a bias of each head in place: the columns `columns` of every row of `x` are heads of `head_dim`, and
    /// each is normalised by itself with its part of `weight` (`[columns.len()]`).
    fn layer_norm_heads(
        &mut self,
        x: &mut Self::Buffer,
        columns: Range<usize>,
        head_dim: usize,
        norm: (&Self::Vector, f32),
    ) -> Result<(), BackendError>;
    /// RMSNorm in place of the columns `columns` of all ranks together, as one. `squares` (`[max rows, 1]`) is where the ranks
    /// meet.
    fn rms_norm_across_ranks(
        &mut self,
        x: &mut Self::Buffer,
        columns: Range<usize>,
        norm: SplitNorm<'_, Self::Vector>,
        squares: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `x += y`.
    fn add(&mut self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<(), BackendError>;
    /// `x = min(max(x, -limit), limit)`.
    fn clamp(&mut self, x: &mut Self::Buffer, limit: f32) -> Result<(), BackendError>;
    /// `x *= factor`.
    fn scale(&mut self, x: &mut Self::Buffer, factor: f32) -> Result<(), BackendError>;
    /// `x = cap * tanh(x / cap)`, with a positive `cap`.
    fn soft_cap(&mut self, x: &mut Self::Buffer, cap: f32) -> Result<(), BackendError>;
    /// `out = x weight^T (+ bias)`: `[rows, in_features] -> [rows, out_features]`.
    fn matmul(
        &mut self,
        x: &Self::Buffer,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `out = activation(gate) * up` with `gate_up = x weight^T (+ bias)`: gate first, then up. `gate_up` is room for what is in
    /// between and may stay as it is.
    fn gated_matmul(
        &mut self,
        x: &Self::Buffer,
        (weight, bias): (&Self::Linear, Option<&Self::Vector>),
        activation: Activation,
        (gate_up, out): (&mut Self::Buffer, &mut Self::Buffer),
    ) -> Result<(), BackendError> {
        self.matmul(x, weight, bias, gate_up)?;
        self.gated_activation(gate_up, activation, out)
    }
    /// `out += x weight^T (+ bias)` with the product's sums as they are, not rounded to a narrower type; `out` is float32. False: the
    /// device does not do this at once for as many rows, and has done nothing.
    fn add_matmul(
        &mut self,
        _x: &Self::Buffer,
        _weight_and_bias: (&Self::Linear, Option<&Self::Vector>),
        _out: &mut Self::Buffer,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }
    /// Rotates the queries and keys in `qkv` (`[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`: all queries, then
    /// keys, then values) in place and stores keys and values of `layer` at the step's slots.
    fn rope_and_store_kv(
        &mut self,
        qkv: &mut Self::Buffer,
        rope: Option<&Self::Rope>,
        shape: &AttentionShape,
        layer: usize,
        cache: &mut Self::KvCache,
    ) -> Result<(), BackendError>;
    /// Says which weight the result of the next operation is multiplied with, and that nothing else is done with it: a device may
    /// leave it in a form that only this product reads.
    fn comes_next(&self, _weight: &Self::Linear) {}
    /// Causal attention of the queries in `qkv` over the cache of `layer`: `out` is `[num_tokens, num_heads * head_dim]`.
    fn attention(
        &mut self,
        qkv: &Self::Buffer,
        shape: &AttentionShape,
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// `out = activation(gate) * up` with `gate_up` `[rows, 2 * width]`: gate first, then up.
    fn gated_activation(
        &mut self,
        gate_up: &Self::Buffer,
        activation: Activation,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// A mixture of experts (arXiv:1701.06538): chooses experts for each row of `x` (`[rows, hidden]`) from its router logits
    /// (`[rows, experts]`) by the rule `routing`, with a correction bias `[experts]` or none, and gives
    /// `out = sum over the chosen of weight * down(activation(gate(x)) * up(x))`, added up in the order of the experts. Every
    /// rank has the same logits and a part of every expert's width.
    fn mixture_of_experts(
        &mut self,
        x: &Self::Buffer,
        router_logits: &Self::Buffer,
        routing: (&Routing, Option<&Self::Vector>),
        experts: &Self::Experts,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;
    /// Multiplies each head with a matrix of its own: head `h` of `out` becomes head `h` of `x` times `weights[h]^T`, of
    /// `[out width, x width]`. Other columns of `out` stay as they are.
    fn matmul_heads(
        &mut self,
        x: (&Self::Buffer, HeadColumns),
        weights: &[Self::Linear],
        out: (&mut Self::Buffer, HeadColumns),
    ) -> Result<(), BackendError>;
    /// Copies `num_heads` heads of the same width from some columns to others. Other columns of `out` stay as they are.
    fn copy_heads(
        &mut self,
        x: (&Self::Buffer, HeadColumns),
        num_heads: usize,
        out: (&mut Self::Buffer, HeadColumns),
    ) -> Result<(), BackendError>;
    /// `x = activation(x)`.
    fn activate(&mut self, x: &mut Self::Buffer, activation: Activation) -> Result<(), BackendError>;
    /// `out[i] = x[rows[i]]`.
    fn gather_rows(
        &mut self,
        x: &Self::Buffer,
        rows: &[u32],
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `x = sum of x over the ranks`. With one rank: nothing.
    fn all_reduce(&mut self, x: &mut Self::Buffer) -> Result<(), BackendError>;
    /// Puts the ranks' columns side by side: rank `r` brings `local` `[rows, widths[r]]`, `out` becomes
    /// `[rows, sum(widths)]` on every rank.
    fn all_gather(
        &mut self,
        local: &Self::Buffer,
        widths: &[usize],
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Chooses one token a row of `logits` (`[rows.len(), vocab_size]`), which it may overwrite.
    fn sample(
        &mut self,
        logits: &mut Self::Buffer,
        rows: &[SamplingRow<'_>],
    ) -> Result<Vec<Sampled>, BackendError>;
    /// `log_softmax(logits[i])[targets[i]]`, for prompt log-probabilities.
    fn token_logprobs(&mut self, logits: &Self::Buffer, targets: &[u32]) -> Result<Vec<f32>, BackendError>;
    /// Copies a buffer to the host, `[rows * width]`: tests and the log-softmax of a whole row.
    fn read(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, BackendError>;
}
