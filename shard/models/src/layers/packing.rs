//! From windows of stored tensors to a packed weight: from the quantized blocks where all of them are, else from plain numbers.

use std::ops::Range;

use backend::{Backend, QuantizedMatrix};

use super::Loader;
use crate::ModelError;

/// A window of a stored matrix.
pub(super) struct Window<'a> {
    pub(super) name: &'a str,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

impl<B: Backend> Loader<'_, B> {
    /// Packs the windows, stacked along their rows; all have the same number of columns.
    pub(super) fn pack(&self, windows: &[Window<'_>]) -> Result<B::Linear, ModelError> {
        if let Some(parts) = self.quantized_parts(windows)? {
            let weight = self.backend.quantized_linear(&parts)?;
            parts.into_iter().for_each(|part| self.source.recycle_quantized(part));
            return Ok(weight);
        }
        let matrices = windows
            .iter()
            .map(|window| self.source.matrix(window.name, window.rows.clone(), window.cols.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        let weight = self.backend.linear(&matrices, self.dtype)?;
        matrices.into_iter().for_each(|matrix| self.source.recycle(matrix));
        Ok(weight)
    }

    /// The quantized blocks of all windows; none where one is stored plain or cuts a group, or the weights are to be of a
    /// plain type.
    fn quantized_parts(&self, windows: &[Window<'_>]) -> Result<Option<Vec<QuantizedMatrix>>, ModelError> {
        let is_whole = |window: &Window<'_>| {
            let quantized = self.source.meta(window.name).and_then(|meta| meta.quantized);
            quantized.is_some_and(|quantized| {
                window.cols.start.is_multiple_of(quantized.group_size)
                    && window.cols.end.is_multiple_of(quantized.group_size)
            })
        };
        if !self.keeps_quantized || !windows.iter().all(is_whole) {
            return Ok(None);
        }
        let parts = windows
            .iter()
            .map(|window| self.source.quantized(window.name, window.rows.clone(), window.cols.clone()));
        parts.map(Option::transpose).collect()
    }
}
