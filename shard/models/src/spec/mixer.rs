//! What mixes information between tokens.

use backend::RopeFrequencies;

use super::{LatentAttentionSpec, LinearSpec, NormSpec};

/// What mixes information between tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerSpec {
    /// Softmax attention over the paged KV cache.
    Attention(AttentionSpec),
    /// The same over latent vectors.
    LatentAttention(LatentAttentionSpec),
}

/// Grouped-query attention (arXiv:2305.13245); one KV head for every query head is the classic one, a single KV head
/// multi-query attention (arXiv:1911.02150).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Queries, keys and values are clamped to `-limit..=limit` as they leave their projections.
    pub clip_qkv: Option<f32>,
    /// Of queries and keys, before the rotation.
    pub qk_norm: Option<QkNormSpec>,
    /// Rotary embedding of queries and keys; none: positions are not rotary.
    pub rope: Option<RopeFrequencies>,
    /// Biases that grow with the distance; none: positions are elsewhere.
    pub alibi: Option<AlibiSpec>,
    /// A token sees itself and the `window - 1` before it; none: all.
    pub window: Option<usize>,
    /// Scores become `soft_cap * tanh(score / soft_cap)`.
    pub soft_cap: Option<f32>,
    /// `[num_heads * head_dim, hidden_size]`.
    pub q_proj: LinearSpec,
    /// `[num_kv_heads * head_dim, hidden_size]`.
    pub k_proj: LinearSpec,
    /// `[num_kv_heads * head_dim, hidden_size]`.
    pub v_proj: LinearSpec,
    /// `[hidden_size, num_heads * head_dim]`.
    pub o_proj: LinearSpec,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct QkNormSpec {
    /// What is normalised together.
    pub scope: QkNormScope,
    /// Of the queries.
    pub q: NormSpec,
    /// Of the keys.
    pub k: NormSpec,
}

/// What a norm of queries or keys goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNormScope {
    /// RMSNorm of each head by itself, all with the same weight `[head_dim]`.
    Head,
    /// LayerNorm of each head by itself, each with its row of the weight `[heads, head_dim]`; no bias.
    HeadWithOwnWeight,
    /// The same, each with a tensor `[head_dim]`, in whose name [`HEAD_NUMBER`](super::HEAD_NUMBER) stands for the head.
    HeadWithOwnTensor,
    /// RMSNorm of all heads together, with the weight `[heads * head_dim]`.
    AllHeads,
}

/// Attention with linear biases (arXiv:2108.12409): a key `n` tokens before the query gets `-slope * n`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AlibiSpec {
    /// The slopes of `2^k` heads fall geometrically to `2^-max_bias`.
    pub max_bias: f32,
    /// Factor on all slopes, usually 1.
    pub multiplier: f32,
}
