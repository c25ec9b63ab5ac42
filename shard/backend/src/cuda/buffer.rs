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
    /// The rows are E4M3 numbers with a scale each, see [`CudaBuffer::rounded`].
    is_rounded: bool,
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
        Ok(Self { memory, dtype, max_rows, width, rows: 0, is_rounded: false })
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
        self.is_rounded = false;
    }

    /// Says that the rows are written as E4M3 numbers, in the place of wider ones, with a scale each: where numbers and scales go.
    /// Only products with weights of eight bits read them.
    pub(super) fn round(&mut self, rows: usize) -> (DevicePtr, DevicePtr) {
        self.resize(rows);
        self.is_rounded = true;
        (self.ptr(), self.rounded_scales())
    }

    /// Addresses of numbers and scales if the rows are of eight bits.
    pub(super) fn rounded(&self) -> Option<(DevicePtr, DevicePtr)> {
        self.is_rounded.then(|| (self.ptr(), self.rounded_scales()))
    }

    /// Behind the numbers of all rows.
    fn rounded_scales(&self) -> DevicePtr {
        self.ptr() + (self.max_rows * self.width).next_multiple_of(size_of::<f32>()) as DevicePtr
    }

    /// Bytes of the rows there are.
    pub(super) fn used_bytes(&self) -> usize {
        self.rows * self.width * self.dtype.size_bytes()
    }
}
