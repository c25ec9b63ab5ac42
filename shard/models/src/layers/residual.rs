//! The residual stream.

use backend::Backend;

use super::{Loader, Norm};
use crate::ModelError;
use crate::spec::BranchSpec;

/// What surrounds a mixer or feed-forward.
pub(crate) struct Branch<B: Backend> {
    /// Of what goes in.
    pub(crate) norm: Norm<B>,
    post_norm: Option<Norm<B>>,
    multiplier: f32,
}

impl<B: Backend> Branch<B> {
    /// Loads the norms, `[width]`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &BranchSpec,
        width: usize,
    ) -> Result<Self, ModelError> {
        let norm = Norm::load(loader, &spec.norm, width)?;
        let post_norm = spec.post_norm.as_ref().map(|norm| Norm::load(loader, norm, width)).transpose()?;
        Ok(Self { norm, post_norm, multiplier: spec.multiplier })
    }
}

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

    /// Does to `delta`, once it is written, what the branch does before it is added.
    pub(crate) fn finish(&mut self, backend: &mut B, branch: &Branch<B>) -> Result<(), ModelError> {
        if let Some(norm) = &branch.post_norm {
            norm.forward(backend, &self.delta, &mut self.normed)?;
            std::mem::swap(&mut self.delta, &mut self.normed);
        }
        if branch.multiplier != 1.0 {
            backend.scale(&mut self.delta, branch.multiplier)?;
        }
        Ok(())
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
