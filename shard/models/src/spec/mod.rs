//! An architecture as data: what the executor runs, layer by layer, and which tensors it needs.
//!
//! A family (see `families/`) turns a `config.json` into a [`DecoderSpec`]; the executor knows no family. An enum
//! here has exactly the variants the executor runs; a new kind of layer is a new variant, never a question for a
//! family's name.

mod experts;
mod latent;
mod linear;
mod mixer;
mod mlp;
mod tensors;

pub use experts::{ExpertsSpec, GatedSpec, SharedExpertSpec};
pub use latent::{LatentAttentionSpec, LatentProjectionSpec};
pub use linear::{FusedColumns, FusedRows, LinearSpec};
pub use mixer::{AlibiSpec, AttentionSpec, MixerSpec, QkNormScope, QkNormSpec};
pub use mlp::MlpSpec;
pub use tensors::ExpectedTensor;

/// A decoder-only transformer. All sizes are those of the whole model, before it is split over ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Rows of the embedding and of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence the positions allow.
    pub max_position_embeddings: usize,
    /// What enters the residual stream.
    pub embedding: EmbeddingSpec,
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
    /// Beginnings of the names of tensors that belong to something else than the decoder, such as a head that guesses further
    /// tokens.
    pub other_tensors: Vec<String>,
}

/// What enters the residual stream: `norm(multiplier * projection(tokens[id]) + positions[position])`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    /// Name of the table, `[vocab_size, hidden_size]`, or narrower with a projection.
    pub tokens: String,
    /// Between a narrower table and the stream, where there is one.
    pub projection: Option<EmbeddingProjectionSpec>,
    /// Factor on its rows, usually 1.
    pub multiplier: f32,
    /// Learned positions, where there are any.
    pub positions: Option<PositionTableSpec>,
    /// Of the sum, where there is one.
    pub norm: Option<NormSpec>,
}

impl EmbeddingSpec {
    /// Tokens alone, of the table `name`.
    pub fn tokens(name: &str) -> Self {
        Self { tokens: name.to_owned(), projection: None, multiplier: 1.0, positions: None, norm: None }
    }
}

/// An embedding, and a matrix of the logits, narrower than the residual stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingProjectionSpec {
    /// Width of both.
    pub width: usize,
    /// From the table's rows to the stream, `[hidden_size, width]`.
    pub proj_in: LinearSpec,
    /// From the last norm to what the logits are computed of, `[width, hidden_size]`.
    pub proj_out: LinearSpec,
}

/// A learned embedding of positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionTableSpec {
    /// Name of the table, `[rows, hidden_size]`.
    pub weight: String,
    /// Its rows.
    pub rows: usize,
    /// Row of the first position.
    pub offset: usize,
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
    /// One after the other, with the sums themselves normalised: `x = norm(x + f(x))`, with the mixer for `f`, then the feed-forward.
    PostNorm {
        /// Of the sum with the mixer's result.
        mixer: NormSpec,
        /// Of the sum with the feed-forward's; none after the last layer, whose norm is the decoder's.
        mlp: Option<NormSpec>,
    },
    /// Side by side: `x += mixer(norm(x)) + mlp(mlp_norm(x))`.
    Parallel {
        /// Of what goes into the mixer.
        norm: NormSpec,
        /// Of what goes into the feed-forward; none: the same as into the mixer.
        mlp_norm: Option<NormSpec>,
    },
}

impl ResidualSpec {
    /// The classic layer: a norm before each part.
    pub fn pre_norm(mixer: NormSpec, mlp: NormSpec) -> Self {
        ResidualSpec::Sequential { mixer: BranchSpec::pre_norm(mixer), mlp: BranchSpec::pre_norm(mlp) }
    }
}

/// What surrounds a mixer or feed-forward.
#[derive(Debug, Clone, PartialEq)]
pub struct BranchSpec {
    /// Of what goes in, where there is one.
    pub norm: Option<NormSpec>,
    /// Of what comes out, where there is one.
    pub post_norm: Option<NormSpec>,
    /// Factor on what is added to the residual stream, usually 1.
    pub multiplier: f32,
}

impl BranchSpec {
    /// A norm of what goes in, nothing else.
    pub fn pre_norm(norm: NormSpec) -> Self {
        Self { norm: Some(norm), post_norm: None, multiplier: 1.0 }
    }
}

/// A normalisation over the residual stream's width, or over heads.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Which.
    pub kind: NormKind,
    /// Name of the weight, as wide as what is normalised.
    pub weight: String,
    /// Name of the bias, as wide, where there is one; only LayerNorm has it.
    pub bias: Option<String>,
    /// Added to the weight: 1 where the file holds the difference from 1, else 0.
    pub weight_offset: f32,
    /// Added under the root.
    pub eps: f32,
}

impl NormSpec {
    /// RMSNorm with the weight `PREFIX.weight`.
    pub fn rms(prefix: &str, eps: f32) -> Self {
        let weight = format!("{prefix}.weight");
        Self { kind: NormKind::Rms, weight, bias: None, weight_offset: 0.0, eps }
    }

    /// LayerNorm with the weight `PREFIX.weight`, and `PREFIX.bias` when `has_bias`.
    pub fn layer(prefix: &str, has_bias: bool, eps: f32) -> Self {
        let bias = has_bias.then(|| format!("{prefix}.bias"));
        Self { kind: NormKind::Layer, bias, ..Self::rms(prefix, eps) }
    }

    /// The weight of one head, where every head has a tensor: the name has [`HEAD_NUMBER`] in the number's place.
    pub(crate) fn weight_of_head(&self, head: usize) -> String {
        self.weight.replace(HEAD_NUMBER, &head.to_string())
    }
}

/// Stands for the number of a head in the name of a norm whose heads have tensors of their own.
pub const HEAD_NUMBER: &str = "{head}";

/// Kinds of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (arXiv:1910.07467).
    Rms,
    /// LayerNorm (arXiv:1607.06450).
    Layer,
}

/// Where the logits come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LmHeadSpec {
    /// The embedding, transposed.
    Tied,
    /// A matrix of its own, `[vocab_size, hidden_size]`, or narrower as the embedding.
    Own(LinearSpec),
    /// The same with each row divided by its Euclidean norm.
    Normalised(LinearSpec),
}

impl LmHeadSpec {
    /// The embedding when `is_tied`, else the tensor `lm_head`.
    pub fn new(is_tied: bool) -> Self {
        if is_tied { LmHeadSpec::Tied } else { LmHeadSpec::Own(LinearSpec::new("lm_head", false)) }
    }
}
