//! Linear layers, whole or a rank's part.

use std::ops::Range;

use backend::{Backend, DType, HostMatrix};

use super::Loader;
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
        let mut matrices = Vec::new();
        for part in parts {
            matrices.extend(windows(loader.source, part.linear, part.rows.clone(), 0..in_features)?);
        }
        let weight = Self::pack(loader, matrices)?;
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

    /// A projection of which this rank has the inputs `columns`; the ranks' outputs are to be summed, so only rank 0 adds
    /// the bias.
    pub(super) fn row_parallel(
        loader: &mut Loader<'_, B>,
        linear: &LinearSpec,
        out_features: usize,
        columns: Range<usize>,
    ) -> Result<Self, ModelError> {
        let matrices = windows(loader.source, linear, 0..out_features, columns)?;
        let weight = Self::pack(loader, matrices)?;
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
        let matrices = windows(loader.source, linear, 0..out_features, 0..in_features)?;
        let weight = loader.backend.linear(&matrices, DType::F32)?;
        matrices.into_iter().for_each(|matrix| loader.source.recycle(matrix));
        let bias = match &linear.bias {
            Some(name) => Some(bias_of(loader.source, name, linear, 0..out_features)?),
            None => None,
        };
        Self::new(loader, weight, bias)
    }

    fn pack(loader: &Loader<'_, B>, matrices: Vec<HostMatrix<'_>>) -> Result<B::Linear, ModelError> {
        let weight = loader.backend.linear(&matrices, loader.dtype)?;
        matrices.into_iter().for_each(|matrix| loader.source.recycle(matrix));
        Ok(weight)
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

    /// The packed weight alone, of a projection that has no bias.
    pub(super) fn into_weight(self) -> B::Linear {
        self.weight
    }
}

/// The outputs `rows` and inputs `columns` of a projection, stacked along the outputs.
pub(super) fn windows<'a>(
    source: &'a dyn WeightSource,
    linear: &LinearSpec,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Result<Vec<HostMatrix<'a>>, ModelError> {
    let columns = linear.column_range(columns);
    let runs = linear.row_runs(rows).into_iter();
    runs.map(|rows| {
        if linear.is_transposed {
            Ok(source.matrix(&linear.weight, columns.clone(), rows)?.transposed())
        } else {
            source.matrix(&linear.weight, rows, columns.clone())
        }
    })
    .collect()
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
