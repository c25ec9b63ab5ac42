//! From windows of stored tensors to a packed weight: from the quantized blocks where all of them are, else from plain numbers.

use std::borrow::Cow;
use std::ops::Range;

use backend::{Backend, DType, Fp8Matrix, HostMatrix, QuantizedMatrix};

use super::Loader;
use crate::ModelError;
use crate::spec::LinearSpec;

/// A window of a stored matrix.
pub(super) struct Window<'a> {
    name: &'a str,
    /// Outputs.
    rows: Range<usize>,
    /// Inputs.
    cols: Range<usize>,
    /// The tensor is `[in_features, out_features]`.
    is_transposed: bool,
}

/// The outputs `rows` and inputs `columns` of a projection, stacked along the outputs.
pub(super) fn windows(
    linear: &LinearSpec,
    rows: Range<usize>,
    columns: Range<usize>,
) -> impl Iterator<Item = Window<'_>> {
    let cols = linear.column_range(columns);
    linear.row_runs(rows).into_iter().map(move |rows| Window {
        name: &linear.weight,
        rows,
        cols: cols.clone(),
        is_transposed: linear.is_transposed,
    })
}

/// Below this a row counts as that long, as in PyTorch's `normalize`.
const SMALLEST_NORM: f64 = 1e-12;

/// The rows of `matrix`, each divided by its Euclidean norm, as `dtype`.
fn normalised_rows(matrix: &HostMatrix<'_>, dtype: DType) -> HostMatrix<'static> {
    let mut bytes = Vec::with_capacity(matrix.rows * matrix.cols * dtype.size_bytes());
    let mut row = vec![0.0; matrix.cols];
    for index in 0..matrix.rows {
        matrix.read_row(index, &mut row);
        let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let factor = 1.0 / norm.max(SMALLEST_NORM);
        for &x in &row {
            let x = (f64::from(x) * factor) as f32;
            match dtype {
                DType::F32 => bytes.extend(x.to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(x).to_le_bytes()),
                DType::BF16 => bytes.extend(half::bf16::from_f32(x).to_le_bytes()),
            }
        }
    }
    let (rows, cols) = (matrix.rows, matrix.cols);
    HostMatrix { dtype, rows, cols, row_stride: cols, bytes: Cow::Owned(bytes) }
}

impl<'a, B: Backend> Loader<'a, B> {
    /// Packs the windows, stacked along their rows; all have the same number of columns.
    pub(super) fn pack(&self, windows: &[Window<'_>]) -> Result<B::Linear, ModelError> {
        if let Some(weight) = self.pack_quantized(windows)? {
            return Ok(weight);
        }
        if let Some(parts) = self.fp8_parts(windows)? {
            return Ok(self.backend.fp8_linear(&parts, self.fp8.dtype)?);
        }
        if self.fp8.quantizes {
            let matrices = self.matrices(windows)?;
            let weight = self.backend.quantized_to_fp8(&matrices, self.dtype)?;
            matrices.into_iter().for_each(|matrix| self.source.recycle(matrix));
            return Ok(weight);
        }
        self.pack_plain(windows, self.dtype)
    }

    /// Packs the windows of a table whose rows are looked up, or of the logits' matrix, which is as precise as the model is: as
    /// [`Loader::pack`], but plain where that would be of eight bits.
    pub(super) fn pack_table(&self, windows: &[Window<'_>]) -> Result<B::Linear, ModelError> {
        match self.pack_quantized(windows)? {
            Some(weight) => Ok(weight),
            None => self.pack_plain(windows, self.dtype),
        }
    }

    fn pack_quantized(&self, windows: &[Window<'_>]) -> Result<Option<B::Linear>, ModelError> {
        let Some(parts) = self.quantized_parts(windows)? else { return Ok(None) };
        let weight = self.backend.quantized_linear(&parts)?;
        parts.into_iter().for_each(|part| self.source.recycle_quantized(part));
        Ok(Some(weight))
    }

    /// Packs the windows in `dtype`, dequantized where they are not plain.
    pub(super) fn pack_plain(&self, windows: &[Window<'_>], dtype: DType) -> Result<B::Linear, ModelError> {
        let matrices = self.matrices(windows)?;
        let weight = self.backend.linear(&matrices, dtype)?;
        matrices.into_iter().for_each(|matrix| self.source.recycle(matrix));
        Ok(weight)
    }

    /// Packs the windows, stacked along their rows, with each row divided by its Euclidean norm.
    pub(super) fn pack_normalised(&self, windows: &[Window<'_>]) -> Result<B::Linear, ModelError> {
        let matrices = self.matrices(windows)?;
        let normalised: Vec<_> = matrices.iter().map(|matrix| normalised_rows(matrix, self.dtype)).collect();
        matrices.into_iter().for_each(|matrix| self.source.recycle(matrix));
        Ok(self.backend.linear(&normalised, self.dtype)?)
    }

    /// The windows as plain numbers.
    pub(super) fn matrices(&self, windows: &[Window<'_>]) -> Result<Vec<HostMatrix<'a>>, ModelError> {
        let matrix = |window: &Window<'_>| {
            let (rows, cols) = (window.rows.clone(), window.cols.clone());
            if window.is_transposed {
                Ok(self.source.matrix(window.name, cols, rows)?.transposed())
            } else {
                self.source.matrix(window.name, rows, cols)
            }
        };
        windows.iter().map(matrix).collect()
    }

    /// The windows as they are stored where all of them are of eight bits.
    fn fp8_parts(&self, windows: &[Window<'_>]) -> Result<Option<Vec<Fp8Matrix<'a>>>, ModelError> {
        let parts = windows.iter().map(|window| {
            let part = || self.source.fp8(window.name, window.rows.clone(), window.cols.clone());
            if window.is_transposed { None } else { part() }
        });
        parts.map(Option::transpose).collect()
    }

    /// The quantized blocks of all windows; none where one is stored plain or cuts a group, or the weights are to be of a
    /// plain type.
    fn quantized_parts(&self, windows: &[Window<'_>]) -> Result<Option<Vec<QuantizedMatrix>>, ModelError> {
        let is_whole = |window: &Window<'_>| {
            let quantized = self.source.meta(window.name).and_then(|meta| meta.quantized);
            quantized.is_some_and(|quantized| {
                quantized.is_transposed == window.is_transposed
                    && window.cols.start.is_multiple_of(quantized.group_size)
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
