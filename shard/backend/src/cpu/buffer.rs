//! Activations in memory.

use super::memory::Memory;
use crate::BackendError;

/// Activations `[rows, width]` of f32, row-major without gaps.
#[derive(Debug)]
pub struct CpuBuffer {
    memory: Memory,
    max_rows: usize,
    width: usize,
    rows: usize,
}

impl CpuBuffer {
    pub(super) fn new(max_rows: usize, width: usize) -> Result<Self, BackendError> {
        let bytes = max_rows.saturating_mul(width).saturating_mul(size_of::<f32>());
        let memory = Memory::zeroed(bytes, &format!("a buffer of {max_rows} x {width} activations"))?;
        Ok(CpuBuffer { memory, max_rows, width, rows: 0 })
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows written by the last operation.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `[rows * width]`.
    pub fn as_slice(&self) -> &[f32] {
        &self.memory.as_slice()[..self.rows * self.width]
    }

    /// `[rows * width]`.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory.as_mut_slice()[..self.rows * self.width]
    }

    /// Sets the number of rows, whose contents are then to be written.
    ///
    /// # Panics
    /// When the buffer was made for fewer.
    pub fn resize(&mut self, rows: usize) {
        assert!(rows <= self.max_rows, "{rows} rows in a buffer made for {}", self.max_rows);
        self.rows = rows;
    }
}
