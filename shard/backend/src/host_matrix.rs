//! A weight as it lies in host memory before a backend packs it.

use std::borrow::Cow;

use crate::{BackendError, DType};

/// A row-major matrix `[rows, cols]` in host memory, possibly a window into a larger one (a rank's slice of a mapped
/// file). For a linear layer rows are outputs and columns are inputs, as PyTorch stores them.
#[derive(Debug, Clone)]
pub struct HostMatrix<'a> {
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns of the window.
    pub cols: usize,
    /// Elements from the start of one row to the start of the next, at least `cols`.
    pub row_stride: usize,
    /// Little-endian elements, the first row first; not necessarily aligned. At least
    /// `((rows - 1) * row_stride + cols) * dtype.size_bytes()` bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl HostMatrix<'_> {
    /// The number of columns that matrices to be stacked have in common.
    ///
    /// # Errors
    /// Which part does not fit or has too few bytes.
    pub(crate) fn common_columns(parts: &[HostMatrix<'_>]) -> Result<usize, BackendError> {
        let refuse =
            |reason: String| BackendError::Device { operation: "packing a weight".to_owned(), reason };
        let Some(first) = parts.first() else { return Err(refuse("no matrix was given".to_owned())) };
        for (index, part) in parts.iter().enumerate() {
            if part.cols != first.cols {
                return Err(refuse(format!(
                    "part {index} has {} columns, the first has {}",
                    part.cols, first.cols
                )));
            }
            let needed = match part.rows {
                0 => 0,
                rows => ((rows - 1) * part.row_stride + part.cols) * part.dtype.size_bytes(),
            };
            if part.row_stride < part.cols || part.bytes.len() < needed {
                return Err(refuse(format!(
                    "part {index} ({} x {} {}, stride {}) needs {needed} bytes, has {}",
                    part.rows,
                    part.cols,
                    part.dtype,
                    part.row_stride,
                    part.bytes.len()
                )));
            }
        }
        if first.cols == 0 {
            return Err(refuse("it has no columns".to_owned()));
        }
        Ok(first.cols)
    }
    /// The same numbers with rows and columns exchanged.
    ///
    /// # Panics
    /// When `bytes` is too short for the matrix.
    pub fn transposed(&self) -> HostMatrix<'static> {
        let size = self.dtype.size_bytes();
        let mut bytes = vec![0; self.rows * self.cols * size];
        for row in 0..self.rows {
            let from = &self.bytes[row * self.row_stride * size..][..self.cols * size];
            for (col, element) in from.chunks_exact(size).enumerate() {
                bytes[(col * self.rows + row) * size..][..size].copy_from_slice(element);
            }
        }
        HostMatrix {
            dtype: self.dtype,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.rows,
            bytes: Cow::Owned(bytes),
        }
    }

    /// Copies row `row` as f32 into `out` (`[cols]`).
    ///
    /// # Panics
    /// When `row` or `out.len()` does not fit the matrix.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        let size = self.dtype.size_bytes();
        let start = row * self.row_stride * size;
        let bytes = &self.bytes[start..start + self.cols * size];
        match self.dtype {
            DType::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
                }
            }
            DType::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = half::f16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
            DType::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = half::bf16::from_le_bytes([raw[0], raw[1]]).to_f32();
                }
            }
        }
    }
}
