//! A linear layer's weight, however it is stored.

use super::plain_linear::PlainLinear;
use super::quantized_linear::QuantizedLinear;

/// A packed linear layer.
#[derive(Debug)]
pub struct PackedLinear(pub(super) Storage);

/// The ways to store one.
#[derive(Debug)]
pub(super) enum Storage {
    Plain(PlainLinear),
    Quantized(QuantizedLinear),
}

impl PackedLinear {
    pub(super) fn in_features(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.in_features,
            Storage::Quantized(linear) => linear.in_features,
        }
    }

    pub(super) fn out_features(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.out_features,
            Storage::Quantized(linear) => linear.out_features,
        }
    }

    /// Memory it occupies.
    pub(super) fn bytes(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.memory.len(),
            Storage::Quantized(linear) => linear.memory.len(),
        }
    }

    /// Row `row` (the weights of output `row`) as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        match &self.0 {
            Storage::Plain(linear) => linear.read_row(row, out),
            Storage::Quantized(linear) => linear.read_row(row, out),
        }
    }
}
