//! What works on each token alone.

use backend::Activation;

use super::{ExpertsSpec, LinearSpec};

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
    /// `down(activation(up(x)))`.
    Plain {
        /// Width between the projections.
        intermediate_size: usize,
        /// Between them.
        activation: Activation,
        /// `[intermediate_size, hidden_size]`.
        up_proj: LinearSpec,
        /// `[hidden_size, intermediate_size]`.
        down_proj: LinearSpec,
    },
    /// A few of many for each token.
    Experts(Box<ExpertsSpec>),
}
