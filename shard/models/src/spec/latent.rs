//! Attention over latent vectors.

use backend::RopeFrequencies;

use super::{LinearSpec, NormSpec};

/// Multi-head latent attention (arXiv:2405.04434). Keys and values of all heads are projections of one latent vector a token,
/// which is what is cached, beside a rotated part of the key that all heads share.
///
/// A head's query is `[plain | rotated]`. Its plain part meets the key `key_up latent`, its rotated part the shared one.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentAttentionSpec {
    /// Heads.
    pub num_heads: usize,
    /// Elements of a head's query and key that are not rotated.
    pub plain_dim: usize,
    /// Elements that are, even.
    pub rotary_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Elements of the latent vector.
    pub latent_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Rotary embedding of `rotary_dim` elements.
    pub rope: RopeFrequencies,
    /// To a narrow vector that the queries are projections of; none: they are of the input itself.
    pub q_down: Option<LatentProjectionSpec>,
    /// `[num_heads * (plain_dim + rotary_dim), q_down's width or hidden_size]`.
    pub q_proj: LinearSpec,
    /// To the latent vector and, after it, the shared key: `[latent_dim + rotary_dim, hidden_size]`. The norm is of the latent
    /// vector alone.
    pub kv_down: LatentProjectionSpec,
    /// Of each head the plain part of its key and then its value: `[num_heads * (plain_dim + value_dim), latent_dim]`.
    pub kv_up: LinearSpec,
    /// `[hidden_size, num_heads * value_dim]`.
    pub o_proj: LinearSpec,
}

/// A projection to a narrow vector.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentProjectionSpec {
    /// Width of what is normalised.
    pub width: usize,
    /// The projection.
    pub proj: LinearSpec,
    /// RMSNorm of what comes out, `[width]`.
    pub norm: NormSpec,
}
