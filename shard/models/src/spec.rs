//! An architecture as data: what the executor runs, layer by layer, and which tensors it needs.
//!
//! A family (see `families/`) turns a `config.json` into a [`DecoderSpec`]; the executor knows no family. An enum
//! here has exactly the variants the executor runs; a new kind of layer is a new variant, never a question for a
//! family's name.

use std::ops::Range;

use backend::{Activation, RopeFrequencies};

/// A decoder-only transformer. All sizes are those of the whole model, before it is split over ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Rows of the embedding and of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence the positions allow.
    pub max_position_embeddings: usize,
    /// Name of the embedding, `[vocab_size, hidden_size]`.
    pub embed_tokens: String,
    /// Factor on the embedding where it enters the residual stream, usually 1.
    pub embedding_multiplier: f32,
    /// In the order they run.
    pub layers: Vec<LayerSpec>,
    /// Applied to the residual stream before the logits.
    pub norm: NormSpec,
    /// Where the logits come from.
    pub lm_head: LmHeadSpec,
    /// Factor on the logits, usually 1.
    pub logits_multiplier: f32,
    /// Logits become `soft_cap * tanh(logit / soft_cap)`, after the factor.
    pub logits_soft_cap: Option<f32>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// How mixer and feed-forward are joined to the residual stream.
    pub residual: ResidualSpec,
    /// What mixes information between tokens.
    pub mixer: MixerSpec,
    /// What works on each token alone.
    pub mlp: MlpSpec,
}

/// The place of the norms and additions of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum ResidualSpec {
    /// One after the other: `x += multiplier * post_norm(f(norm(x)))`, with the mixer for `f`, then the feed-forward.
    Sequential {
        /// Around the mixer.
        mixer: BranchSpec,
        /// Around the feed-forward.
        mlp: BranchSpec,
    },
}

/// What surrounds a mixer or feed-forward.
#[derive(Debug, Clone, PartialEq)]
pub struct BranchSpec {
    /// Of what goes in.
    pub norm: NormSpec,
    /// Of what comes out, where there is one.
    pub post_norm: Option<NormSpec>,
    /// Factor on what is added to the residual stream, usually 1.
    pub multiplier: f32,
}

/// A normalisation over the residual stream's width, or over a head's.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Which.
    pub kind: NormKind,
    /// Name of the weight, `[hidden_size]` or `[head_dim]`.
    pub weight: String,
    /// Name of the bias, as wide, where there is one; only LayerNorm has it.
    pub bias: Option<String>,
    /// Added to the weight: 1 where the file holds the difference from 1, else 0.
    pub weight_offset: f32,
    /// Added under the root.
    pub eps: f32,
}

/// Kinds of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (arXiv:1910.07467).
    Rms,
    /// LayerNorm (arXiv:1607.06450); not for heads.
    Layer,
}

/// What mixes information between tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerSpec {
    /// Softmax attention over the paged KV cache.
    Attention(AttentionSpec),
}

/// Grouped-query attention (arXiv:2305.13245); one KV head for every query head is the classic one.
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
    /// Over each query head, before the rotation.
    pub q_norm: Option<NormSpec>,
    /// Over each key head, before the rotation.
    pub k_norm: Option<NormSpec>,
    /// Rotary embedding of queries and keys; none: positions are not rotary.
    pub rope: Option<RopeFrequencies>,
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

/// What works on each token alone.
#[derive(Debug, Clone, PartialEq)]
pub enum MlpSpec {
    /// `down(activation(gate(x)) * up(x))` (arXiv:2002.05202).
    Gated {
        /// Width between the projections.
        intermediate_size: usize,
        /// On the gate.
        activation: Activation,
        /// `[intermediate_size, hidden_size]`.
        gate_proj: LinearSpec,
        /// `[intermediate_size, hidden_size]`.
        up_proj: LinearSpec,
        /// `[hidden_size, intermediate_size]`.
        down_proj: LinearSpec,
    },
}

/// Tensor names of a linear layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// `[out_features, in_features]`, or of more rows when it is fused with others.
    pub weight: String,
    /// `[out_features]`, where there is one.
    pub bias: Option<String>,
    /// Which rows of a fused tensor these are; none: all of one of its own.
    pub fused: Option<FusedRows>,
}

/// The place of a projection in a tensor that holds several, stacked along their rows. Together they are the whole tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedRows {
    /// Its first row.
    pub first: usize,
    /// Rows of the tensor.
    pub total: usize,
}

impl LinearSpec {
    /// `PREFIX.weight`, and `PREFIX.bias` when `has_bias`.
    pub fn new(prefix: &str, has_bias: bool) -> Self {
        Self {
            weight: format!("{prefix}.weight"),
            bias: has_bias.then(|| format!("{prefix}.bias")),
            fused: None,
        }
    }

    /// Projections of `sizes` outputs that are one tensor, one after the other.
    pub fn fused<const N: usize>(prefix: &str, has_bias: bool, sizes: [usize; N]) -> [Self; N] {
        let total = sizes.iter().sum();
        let mut next = 0;
        sizes.map(|size| {
            let first = next;
            next += size;
            Self { fused: Some(FusedRows { first, total }), ..Self::new(prefix, has_bias) }
        })
    }

    /// Where the outputs `rows` are in the tensor.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Range<usize> {
        let first = self.fused.map_or(0, |fused| fused.first);
        first + rows.start..first + rows.end
    }
}

/// Where the logits come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LmHeadSpec {
    /// The embedding, transposed.
    Tied,
    /// A matrix of its own, `[vocab_size, hidden_size]`.
    Own(LinearSpec),
}

/// A tensor that the spec needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
}

impl DecoderSpec {
    /// Every tensor the model is made of, in the order of the layers.
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let hidden = self.hidden_size;
        let mut list = TensorList::default();
        list.add(&self.embed_tokens, &[self.vocab_size, hidden]);
        for layer in &self.layers {
            let ResidualSpec::Sequential { mixer, mlp } = &layer.residual;
            for norm in [Some(&mixer.norm), mixer.post_norm.as_ref()].into_iter().flatten() {
                list.norm(norm, hidden);
            }
            let MixerSpec::Attention(attention) = &layer.mixer;
            let queries = attention.num_heads * attention.head_dim;
            let keys = attention.num_kv_heads * attention.head_dim;
            list.linear(&attention.q_proj, queries, hidden);
            list.linear(&attention.k_proj, keys, hidden);
            list.linear(&attention.v_proj, keys, hidden);
            list.linear(&attention.o_proj, hidden, queries);
            for norm in [&attention.q_norm, &attention.k_norm].into_iter().flatten() {
                list.norm(norm, attention.head_dim);
            }
            for norm in [Some(&mlp.norm), mlp.post_norm.as_ref()].into_iter().flatten() {
                list.norm(norm, hidden);
            }
            let MlpSpec::Gated { intermediate_size, gate_proj, up_proj, down_proj, .. } = &layer.mlp;
            list.linear(gate_proj, *intermediate_size, hidden);
            list.linear(up_proj, *intermediate_size, hidden);
            list.linear(down_proj, hidden, *intermediate_size);
        }
        list.norm(&self.norm, hidden);
        if let LmHeadSpec::Own(lm_head) = &self.lm_head {
            list.linear(lm_head, self.vocab_size, hidden);
        }
        list.0
    }
}

#[derive(Default)]
struct TensorList(Vec<ExpectedTensor>);

impl TensorList {
    fn add(&mut self, name: &str, shape: &[usize]) {
        self.0.push(ExpectedTensor { name: name.to_owned(), shape: shape.to_vec() });
    }

    fn norm(&mut self, norm: &NormSpec, width: usize) {
        self.add(&norm.weight, &[width]);
        if let Some(bias) = &norm.bias {
            self.add(bias, &[width]);
        }
    }

    fn linear(&mut self, linear: &LinearSpec, out_features: usize, in_features: usize) {
        let out_features = match linear.fused {
            // The first part stands for the whole tensor.
            Some(FusedRows { first, .. }) if first > 0 => return,
            Some(FusedRows { total, .. }) => total,
            None => out_features,
        };
        self.add(&linear.weight, &[out_features, in_features]);
        if let Some(bias) = &linear.bias {
            self.add(bias, &[out_features]);
        }
    }
}
