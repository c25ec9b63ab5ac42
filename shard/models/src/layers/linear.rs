//! Linear layers, whole or a rank's part.

use std::ops::Range;

use backend::Backend;

use super::Loader;
use super::packing::Window;
use crate::ModelError;
use crate::spec::LinearSpec;

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
        let windows: Vec<_> = parts
            .iter()
            .map(|part| Window {
                name: &part.linear.weight,
                rows: part.linear.rows(part.rows.clone()),
                cols: 0..in_features,
            })
            .collect();
        let weight = loader.pack(&windows)?;
        let mut bias = Vec::new();
        for part in parts {
            match &part.linear.bias {
                Some(name) => bias.extend(loader.source.vector(name, part.linear.rows(part.rows.clone()))?),
                None => bias.extend(std::iter::repeat_n(0.0, part.rows.len())),
            }
        }
        let has_bias = parts.iter().any(|part| part.linear.bias.is_some());
        Self::new(loader, weight, has_bias.then_some(bias))
    }

    /// A projection of which this rank has the inputs `columns`; the ranks' outputs are to be summed, so only rank 0 adds
    /// the bias.
    pub(super) fn row_parallel(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        out_features: usize,
        columns: Range<usize>,
    ) -> Result<Self, ModelError> {
        let rows = linear.rows(0..out_features);
        let weight = loader.pack(&[Window { name: &linear.weight, rows, cols: columns }])?;
        let bias = match &linear.bias {
            Some(name) if loader.rank == 0 => Some(loader.source.vector(name, linear.rows(0..out_features))?),
            _ => None,
        };
        Self::new(loader, weight, bias)
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

    /// `[rows, in_features] -> [rows, out_features]`, of this rank.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        Ok(backend.matmul(x, &self.weight, self.bias.as_ref(), out)?)
    }

    /// The packed weight.
    pub(super) fn weight(&self) -> &B::Linear {
        &self.weight
    }
}
