//! Linear layers, whole or a rank's part.

use std::ops::Range;

use backend::{Activation, Backend, DType};

use super::Loader;
use super::packing::windows;
use crate::ModelError;
use crate::spec::LinearSpec;
use crate::weights::WeightSource;

/// `y = x weight^T + bias`.
pub(crate) struct Linear<B: Backend> {
    weight: B::Linear,
    bias: Option<B::Vector>,
}

/// Rows of one projection that this rank owns.
pub(super) struct ColumnPart<'a> {
    pub(super) linear: &'a LinearSpec,
    pub(super) rows: Range<usize>,
}

impl<B: Backend> Linear<B> {
    /// Several projections of the same input as one: this rank's outputs of each, one after the other.
    pub(super) fn merged_column_parallel(
        loader: &mut Loader<'_, B>,
        parts: &[ColumnPart<'_>],
        in_features: usize,
    ) -> Result<Self, ModelError> {
        let windows: Vec<_> =
            parts.iter().flat_map(|part| windows(part.linear, part.rows.clone(), 0..in_features)).collect();
        let weight = loader.pack(&windows)?;
        let mut bias = Vec::new();
        for part in parts {
            match &part.linear.bias {
                Some(name) => bias.extend(bias_of(loader.source, name, part.linear, part.rows.clone())?),
                None => bias.extend(std::iter::repeat_n(0.0, part.rows.len())),
            }
        }
        let has_bias = parts.iter().any(|part| part.linear.bias.is_some());
        Self::new(loader, weight, has_bias.then_some(bias))
    }

    /// A table of which this rank has `rows`, whose rows are looked up or which gives logits: never of eight bits.
    pub(super) fn table(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        rows: Range<usize>,
        in_features: usize,
    ) -> Result<Self, ModelError> {
        let windows: Vec<_> = windows(linear, rows.clone(), 0..in_features).collect();
        let weight = loader.pack_table(&windows)?;
        let bias = match &linear.bias {
            Some(name) => Some(bias_of(loader.source, name, linear, rows)?),
            None => None,
        };
        Self::new(loader, weight, bias)
    }

    /// A projection of which this rank has the inputs `columns`; the ranks' outputs are to be summed, so only rank 0 adds
    /// the bias.
    pub(super) fn row_parallel(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        out_features: usize,
        columns: Range<usize>,
    ) -> Result<Self, ModelError> {
        let windows: Vec<_> = windows(linear, 0..out_features, columns).collect();
        let weight = loader.pack(&windows)?;
        let bias = match &linear.bias {
            Some(name) if loader.rank == 0 => Some(bias_of(loader.source, name, linear, 0..out_features)?),
            _ => None,
        };
        Self::new(loader, weight, bias)
    }

    /// All of a projection on every rank, in f32 whatever type the other weights get.
    pub(super) fn precise(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        [out_features, in_features]: [usize; 2],
    ) -> Result<Self, ModelError> {
        let windows: Vec<_> = windows(linear, 0..out_features, 0..in_features).collect();
        let weight = loader.pack_plain(&windows, DType::F32)?;
        let bias = match &linear.bias {
            Some(name) => Some(bias_of(loader.source, name, linear, 0..out_features)?),
            None => None,
        };
        Self::new(loader, weight, bias)
    }

    /// The rows `rows` of a matrix without a bias, each divided by its Euclidean norm before it is rounded to the weights' type.
    pub(super) fn normalised(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        rows: Range<usize>,
        in_features: usize,
    ) -> Result<Self, ModelError> {
        let windows: Vec<_> = windows(linear, rows, 0..in_features).collect();
        let weight = loader.pack_normalised(&windows)?;
        Self::new(loader, weight, None)
    }

    fn new(
        loader: &mut Loader<'_, B>,
        weight: B::Linear,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, ModelError> {
        loader.weight_bytes += loader.backend.linear_bytes(&weight);
        loader.weight_bytes += bias.as_ref().map_or(0, |bias| size_of_val(bias.as_slice()));
        let bias = bias.map(|bias| loader.backend.vector(bias)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// Says that the result of the next operation is for this layer alone.
    pub(crate) fn comes_next(&self, backend: &B) {
        backend.comes_next(&self.weight);
    }

    /// `[rows, in_features] -> [rows, out_features]`, of this rank.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        Ok(backend.matmul(x, &self.weight, self.bias.as_ref(), out)?)
    }

    /// Adds the result to `out`, `[rows, out_features]` of float32; false: the device does not do that at once, and nothing has
    /// happened.
    pub(super) fn forward_adding(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<bool, ModelError> {
        Ok(backend.add_matmul(x, (&self.weight, self.bias.as_ref()), out)?)
    }

    /// `out = activation(gate) * up`, where this projection gives gate and up side by side; `gate_up` is room for them.
    pub(super) fn forward_gated(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        activation: Activation,
        (gate_up, out): (&mut B::Buffer, &mut B::Buffer),
    ) -> Result<(), ModelError> {
        Ok(backend.gated_matmul(x, (&self.weight, self.bias.as_ref()), activation, (gate_up, out))?)
    }

    /// The packed weight.
    pub(super) fn weight(&self) -> &B::Linear {
        &self.weight
    }

    /// The packed weight alone, of a projection that has no bias.
    pub(super) fn into_weight(self) -> B::Linear {
        self.weight
    }
}

/// The bias of the outputs `rows`.
fn bias_of(
    source: &dyn WeightSource,
    name: &str,
    linear: &LinearSpec,
    rows: Range<usize>,
) -> Result<Vec<f32>, ModelError> {
    let mut bias = Vec::with_capacity(rows.len());
    for run in linear.row_runs(rows) {
        bias.extend(source.vector(name, run)?);
    }
    Ok(bias)
}
