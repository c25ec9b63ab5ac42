//! A linear layer's weight, however it is stored.

use super::arena::Arena;
use super::compact_linear::CompactLinear;
use super::kernels::Kernels;
use super::plain_linear::PlainLinear;
use super::quantized_linear::QuantizedLinear;
use super::threads::Threads;
use crate::{BackendError, DType, HostMatrix};

/// A packed linear layer.
#[derive(Debug)]
pub struct PackedLinear(pub(super) Storage);

/// The ways to store one.
#[derive(Debug)]
pub(super) enum Storage {
    Plain(PlainLinear),
    Compact(CompactLinear),
    Quantized(QuantizedLinear),
}

impl PackedLinear {
    /// Packs `parts`, stacked along their rows, as `dtype`: bf16 in 12 bits where the kernels have that and it is worth it.
    pub(super) fn pack(
        parts: &[HostMatrix<'_>],
        dtype: DType,
        kernels: &Kernels,
        (threads, arena): (&mut Threads, &mut Arena),
    ) -> Result<Self, BackendError> {
        if let Some(compact) = kernels.compact.filter(|_| dtype == DType::BF16)
            && let Some(linear) = CompactLinear::pack(parts, (kernels, compact), (threads, arena))?
        {
            return Ok(PackedLinear(Storage::Compact(linear)));
        }
        Ok(PackedLinear(Storage::Plain(PlainLinear::pack(parts, dtype, kernels, (threads, arena))?)))
    }

    pub(super) fn in_features(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.in_features,
            Storage::Compact(linear) => linear.in_features,
            Storage::Quantized(linear) => linear.in_features,
        }
    }

    pub(super) fn out_features(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.out_features,
            Storage::Compact(linear) => linear.out_features,
            Storage::Quantized(linear) => linear.out_features,
        }
    }

    /// Memory it occupies.
    pub(super) fn bytes(&self) -> usize {
        match &self.0 {
            Storage::Plain(linear) => linear.memory.len(),
            Storage::Compact(linear) => linear.bytes(),
            Storage::Quantized(linear) => linear.memory.len(),
        }
    }

    /// Row `row` (the weights of output `row`) as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        match &self.0 {
            Storage::Plain(linear) => linear.read_row(row, out),
            Storage::Compact(linear) => linear.read_row(row, out),
            Storage::Quantized(linear) => linear.read_row(row, out),
        }
    }
}
