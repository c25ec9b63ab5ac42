//! The contract between the executor and a device.

use std::ops::Range;

use crate::sampling::{Sampled, SamplingRow};
use crate::{BackendError, DType, HostMatrix, KvLayout, QuantizedMatrix, StepInput};

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu` or `cuda`, as `Info.device_type` reports it.
    pub device_type: &'static str,
    /// For people: the processor and the kernels chosen for it.
    pub description: String,
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
    /// The largest number of tokens a step should have; longer prompts are cut into several.
    fn max_step_tokens(&self) -> usize;

    /// Makes a buffer of at most `max_rows` rows, zeroed.
    fn buffer(&self, max_rows: usize, width: usize) -> Result<Self::Buffer, BackendError>;
    /// Packs the matrices `parts`, stacked along their rows (outputs), in `dtype`. All have the same number of columns.
    fn linear(&self, parts: &[HostMatrix<'_>], dtype: DType) -> Result<Self::Linear, BackendError>;
    /// Packs quantized matrices as they are, stacked along their rows. All have the same number of columns; bits and groups
    /// may differ.
    fn quantized_linear(&self, parts: &[QuantizedMatrix]) -> Result<Self::Linear, BackendError>;
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

    /// `out[t] = table[input_ids[t] - first_id]`, zeros where the id is not in this rank's part
    /// (`first_id..first_id + table rows`). `out`: `[num_tokens, in_features]`.
    fn embed(
        &mut self,
        table: &Self::Linear,
        first_id: usize,
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
