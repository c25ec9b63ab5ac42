//! Mixtures of experts.

use backend::{Activation, Routing};

use super::LinearSpec;

/// A mixture of experts (arXiv:1701.06538): a router sends each token to a few of many gated feed-forwards, whose weighted sum is
/// the result. A shared expert that all tokens pass may be added.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Width between the projections of an expert.
    pub intermediate_size: usize,
    /// On the gates.
    pub activation: Activation,
    /// How experts are chosen.
    pub routing: Routing,
    /// `[experts, hidden_size]`; computed in f32 whatever type the weights have, since a rounded logit may choose another expert.
    pub router: LinearSpec,
    /// Name of the bias that corrects the choice, `[experts]`, where there is one.
    pub correction: Option<String>,
    /// One after the other, without biases.
    pub experts: Vec<GatedSpec>,
    /// The expert of all tokens.
    pub shared: Option<SharedExpertSpec>,
}

/// The projections of an expert.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedSpec {
    /// `[intermediate_size, hidden_size]`.
    pub gate_proj: LinearSpec,
    /// `[intermediate_size, hidden_size]`.
    pub up_proj: LinearSpec,
    /// `[hidden_size, intermediate_size]`.
    pub down_proj: LinearSpec,
}

impl GatedSpec {
    /// Projections without biases: `PREFIX.NAME.weight` for the names of gate, up and down.
    pub fn new(prefix: &str, [gate, up, down]: [&str; 3]) -> Self {
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), false);
        Self { gate_proj: linear(gate), up_proj: linear(up), down_proj: linear(down) }
    }
}

/// An expert that all tokens pass.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExpertSpec {
    /// Width between its projections.
    pub intermediate_size: usize,
    /// Its projections, without biases.
    pub projections: GatedSpec,
    /// `[1, hidden_size]`: the logistic function of this projection is its weight; none: 1.
    pub gate: Option<LinearSpec>,
}
