//! The residual stream.

use backend::Backend;

use super::Norm;
use crate::ModelError;

/// The stream that layers add to. What a layer adds stays in `delta` until the next norm, which adds and normalises in one
/// pass over memory.
pub(crate) struct Stream<B: Backend> {
    residual: B::Buffer,
    /// Output of the last mixer or feed-forward, summed over the ranks.
    pub(crate) delta: B::Buffer,
    /// Input of the next one.
    pub(crate) normed: B::Buffer,
    /// Whether `delta` is still to be added.
    is_pending: bool,
}

impl<B: Backend> Stream<B> {
    /// A stream of at most `max_rows` tokens.
    pub(crate) fn new(backend: &B, max_rows: usize, width: usize) -> Result<Self, ModelError> {
        let buffer = || backend.buffer(max_rows, width);
        Ok(Self { residual: buffer()?, delta: buffer()?, normed: buffer()?, is_pending: false })
    }

    /// Bytes of a stream.
    pub(crate) const fn bytes(max_rows: usize, width: usize) -> usize {
        3 * max_rows * width * size_of::<f32>()
    }

    /// Starts afresh: what the caller writes to the result is the stream.
    pub(crate) fn begin(&mut self) -> &mut B::Buffer {
        self.is_pending = false;
        &mut self.residual
    }

    /// `normed = norm(stream)`, and gives the places of the next input and output.
    pub(crate) fn norm(
        &mut self,
        backend: &mut B,
        norm: &Norm<B>,
    ) -> Result<(&B::Buffer, &mut B::Buffer), ModelError> {
        if self.is_pending {
            norm.add_forward(backend, &mut self.residual, &self.delta, &mut self.normed)?;
        } else {
            norm.forward(backend, &self.residual, &mut self.normed)?;
        }
        // Whoever asks for the norm writes `delta` next.
        self.is_pending = true;
        Ok((&self.normed, &mut self.delta))
    }

    /// Takes the tokens `rows` of another stream, which stays as it is.
    pub(crate) fn gather(
        &mut self,
        backend: &mut B,
        other: &Stream<B>,
        rows: &[u32],
    ) -> Result<(), ModelError> {
        backend.gather_rows(&other.residual, rows, &mut self.residual)?;
        if other.is_pending {
            backend.gather_rows(&other.delta, rows, &mut self.delta)?;
        }
        self.is_pending = other.is_pending;
        Ok(())
    }
}
