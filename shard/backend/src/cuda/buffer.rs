//! Activations on the device.

use super::driver::{Context, DeviceMemory, DevicePtr};
use crate::{BackendError, DType};
use std::sync::Arc;

/// Activations `[rows, width]`, row-major without gaps.
pub struct CudaBuffer {
    memory: DeviceMemory,
    dtype: DType,
    max_rows: usize,
    width: usize,
    rows: usize,
}

impl CudaBuffer {
    pub(super) fn new(
        context: &Arc<Context>,
        max_rows: usize,
        width: usize,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let bytes = max_rows.saturating_mul(width).saturating_mul(dtype.size_bytes());
        let memory =
            DeviceMemory::zeroed(context, bytes, &format!("a buffer of {max_rows} x {width} activations"))?;
        Ok(Self { memory, dtype, max_rows, width, rows: 0 })
    }

    /// Its memory.
    pub(super) fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Address of the first element.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }

    /// Element type.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Rows written by the last operation.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Sets the number of rows, whose contents are then to be written.
    ///
    /// # Panics
    /// When the buffer was made for fewer.
    pub(super) fn resize(&mut self, rows: usize) {
        assert!(rows <= self.max_rows, "{rows} rows in a buffer made for {}", self.max_rows);
        self.rows = rows;
    }

    /// Bytes of the rows there are.
    pub(super) fn used_bytes(&self) -> usize {
        self.rows * self.width * self.dtype.size_bytes()
    }
}
