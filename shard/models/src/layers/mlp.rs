//! Feed-forward layers, split by tiles of their inner width.

use backend::{Activation, Backend};

use super::experts::Experts;
use super::linear::{ColumnPart, Linear};
use super::{InputOutput, Loader, Role, Scratch};
use crate::ModelError;
use crate::spec::MlpSpec;
use crate::tensor_parallel::split_tiles;

/// This rank's part of one feed-forward layer.
pub(crate) enum Mlp<B: Backend> {
    /// `down(activation(gate(x)) * up(x))`.
    Gated {
        /// Gate and up as one.
        gate_up_proj: Linear<B>,
        /// On the gate.
        activation: Activation,
        /// Back to the residual stream's width.
        down_proj: Linear<B>,
        /// Scratch buffer of gate and up.
        gate_up: usize,
        /// Scratch buffer of their product.
        activated: usize,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// To the inner width.
        up_proj: Linear<B>,
        /// Between the projections.
        activation: Activation,
        /// Back to the residual stream's width.
        down_proj: Linear<B>,
        /// Scratch buffer between the projections.
        inner: usize,
    },
    /// A few of many for each token.
    Experts(Experts<B>),
}

impl<B: Backend> Mlp<B> {
    /// Loads this rank's tiles.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &MlpSpec,
        hidden_size: usize,
    ) -> Result<Self, ModelError> {
        let (rank, world_size) = (loader.rank, loader.world_size);
        let split = |width: usize| split_tiles(width, "columns of the MLP", rank, world_size);
        match spec {
            MlpSpec::Gated { intermediate_size, activation, gate_proj, up_proj, down_proj } => {
                let inner = split(*intermediate_size)?;
                let parts = [
                    ColumnPart { linear: gate_proj, rows: inner.clone() },
                    ColumnPart { linear: up_proj, rows: inner.clone() },
                ];
                Ok(Mlp::Gated {
                    gate_up_proj: Linear::merged_column_parallel(loader, &parts, hidden_size)?,
                    activation: *activation,
                    gate_up: loader.reserve(Role::GateUp, 2 * inner.len())?,
                    activated: loader.reserve(Role::Activated, inner.len())?,
                    down_proj: Linear::row_parallel(loader, down_proj, hidden_size, inner)?,
                })
            }
            MlpSpec::Plain { intermediate_size, activation, up_proj, down_proj } => {
                let inner = split(*intermediate_size)?;
                let part = ColumnPart { linear: up_proj, rows: inner.clone() };
                Ok(Mlp::Plain {
                    up_proj: Linear::merged_column_parallel(loader, &[part], hidden_size)?,
                    activation: *activation,
                    inner: loader.reserve(Role::Activated, inner.len())?,
                    down_proj: Linear::row_parallel(loader, down_proj, hidden_size, inner)?,
                })
            }
            MlpSpec::Experts(spec) => Ok(Mlp::Experts(Experts::load(loader, spec, hidden_size)?)),
        }
    }

    /// What alone reads its input; none: there are several.
    pub(crate) fn first(&self) -> Option<&Linear<B>> {
        match self {
            Mlp::Gated { gate_up_proj, .. } => Some(gate_up_proj),
            Mlp::Plain { up_proj, .. } => Some(up_proj),
            Mlp::Experts(_) => None,
        }
    }

    /// `out = mlp(x)`, this rank's part of the sum.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        (x, out): InputOutput<'_, B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ModelError> {
        match self {
            Mlp::Gated { gate_up_proj, activation, down_proj, gate_up, activated } => {
                let (gate_up, activated) = scratch.pair(*gate_up, *activated);
                down_proj.comes_next(backend);
                gate_up_proj.forward_gated(backend, x, *activation, (gate_up, activated))?;
                out.project(backend, down_proj, activated)
            }
            Mlp::Plain { up_proj, activation, down_proj, inner } => {
                let inner = scratch.one(*inner);
                up_proj.forward(backend, x, inner)?;
                backend.activate(inner, *activation)?;
                out.project(backend, down_proj, inner)
            }
            Mlp::Experts(experts) => experts.forward(backend, (x, out.buffer()), scratch),
        }
    }
}
