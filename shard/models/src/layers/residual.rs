//! The residual stream, and how the parts of a layer are joined to it.

use backend::{Backend, DType};

use super::{Linear, Loader, Norm};
use crate::ModelError;
use crate::spec::{BranchSpec, ResidualSpec};

/// The norms of a layer and their places.
pub(crate) enum Residual<B: Backend> {
    /// One after the other: `x += multiplier * post_norm(f(norm(x)))`.
    Sequential {
        /// Around the mixer.
        mixer: Branch<B>,
        /// Around the feed-forward.
        mlp: Branch<B>,
    },
    /// One after the other: `x = norm(x + f(x))`.
    PostNorm {
        /// Of the sum with the mixer's result.
        mixer: Norm<B>,
        /// Of the sum with the feed-forward's; none: left to the next norm.
        mlp: Option<Norm<B>>,
    },
    /// Side by side: `x += mixer(norm(x)) + mlp(mlp_norm(x))`.
    Parallel {
        /// Of what goes into the mixer.
        norm: Norm<B>,
        /// Of what goes into the feed-forward; none: the same.
        mlp_norm: Option<Norm<B>>,
    },
}

impl<B: Backend> Residual<B> {
    /// Loads the norms, `[width]`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &ResidualSpec,
        width: usize,
    ) -> Result<Self, ModelError> {
        Ok(match spec {
            ResidualSpec::Sequential { mixer, mlp } => Residual::Sequential {
                mixer: Branch::load(loader, mixer, width)?,
                mlp: Branch::load(loader, mlp, width)?,
            },
            ResidualSpec::PostNorm { mixer, mlp } => Residual::PostNorm {
                mixer: Norm::load(loader, mixer, width)?,
                mlp: mlp.as_ref().map(|norm| Norm::load(loader, norm, width)).transpose()?,
            },
            ResidualSpec::Parallel { norm, mlp_norm } => Residual::Parallel {
                norm: Norm::load(loader, norm, width)?,
                mlp_norm: mlp_norm.as_ref().map(|norm| Norm::load(loader, norm, width)).transpose()?,
            },
        })
    }
}

/// What surrounds a mixer or feed-forward.
pub(crate) struct Branch<B: Backend> {
    /// Of what goes in.
    pub(crate) norm: Option<Norm<B>>,
    post_norm: Option<Norm<B>>,
    multiplier: f32,
}

impl<B: Backend> Branch<B> {
    fn load(loader: &mut Loader<'_, B>, spec: &BranchSpec, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            norm: spec.norm.as_ref().map(|norm| Norm::load(loader, norm, width)).transpose()?,
            post_norm: spec.post_norm.as_ref().map(|norm| Norm::load(loader, norm, width)).transpose()?,
            multiplier: spec.multiplier,
        })
    }

    /// Whether a part's result is added as it is, and its input is not the stream itself.
    fn adds_at_once(&self) -> bool {
        self.norm.is_some() && self.post_norm.is_none() && self.multiplier == 1.0
    }
}

/// Where the next part of a layer reads and writes.
pub(crate) type InputOutput<'a, B> = (&'a <B as Backend>::Buffer, Output<'a, B>);

/// Where a part of a layer writes.
pub(crate) struct Output<'a, B: Backend> {
    delta: &'a mut B::Buffer,
    /// Where nothing is done to a part's result but adding it: the stream, and whether `delta` is still to be added to it.
    stream: Option<(&'a mut B::Buffer, &'a mut bool)>,
}

impl<'a, B: Backend> Output<'a, B> {
    /// A buffer that the result is to be written to.
    pub(crate) fn to(delta: &'a mut B::Buffer) -> Self {
        Self { delta, stream: None }
    }

    /// The buffer, for what is no projection.
    pub(crate) fn buffer(self) -> &'a mut B::Buffer {
        self.delta
    }

    /// The part's last projection: added to the stream at once where the device can do that, else written.
    pub(crate) fn project(
        self,
        backend: &mut B,
        projection: &Linear<B>,
        x: &B::Buffer,
    ) -> Result<(), ModelError> {
        if let Some((stream, is_pending)) = self.stream
            && projection.forward_adding(backend, x, stream)?
        {
            *is_pending = false;
            return Ok(());
        }
        projection.forward(backend, x, self.delta)
    }
}

/// The stream that layers add to. What a layer adds stays in `delta` until the next norm, which adds and normalises in one
/// pass over memory, unless the product that gives it added it already.
pub(crate) struct Stream<B: Backend> {
    residual: B::Buffer,
    /// Output of the last part, summed over the ranks.
    delta: B::Buffer,
    /// Input of the next one.
    normed: B::Buffer,
    /// Output of a feed-forward beside a mixer, where there are any.
    beside: Option<B::Buffer>,
    /// Whether `delta` is still to be added.
    is_pending: bool,
}

impl<B: Backend> Stream<B> {
    /// A stream of at most `max_rows` tokens; `has_parallel`: some layers have their parts side by side.
    pub(crate) fn new(
        backend: &B,
        (max_rows, width): (usize, usize),
        dtype: DType,
        has_parallel: bool,
    ) -> Result<Self, ModelError> {
        let buffer = || backend.buffer(max_rows, width, dtype);
        let beside = has_parallel.then(buffer).transpose()?;
        // All layers add to the residual: in a narrow type it would be rounded each time.
        let residual = backend.buffer(max_rows, width, DType::F32)?;
        Ok(Self { residual, delta: buffer()?, normed: buffer()?, beside, is_pending: false })
    }

    /// Bytes of a stream.
    pub(crate) const fn bytes(max_rows: usize, width: usize, has_parallel: bool) -> usize {
        let buffers = if has_parallel { 4 } else { 3 };
        buffers * max_rows * width * size_of::<f32>()
    }

    /// Starts afresh: what the caller writes to the result is the stream.
    pub(crate) fn begin(&mut self) -> &mut B::Buffer {
        self.is_pending = false;
        &mut self.residual
    }

    /// Where the next part reads, the stream or its norm, and writes.
    pub(crate) fn input(
        &mut self,
        backend: &mut B,
        norm: Option<&Norm<B>>,
    ) -> Result<InputOutput<'_, B>, ModelError> {
        // Whoever asks for the input writes `delta` next.
        let is_pending = std::mem::replace(&mut self.is_pending, true);
        let input = match norm {
            Some(norm) => {
                if is_pending {
                    norm.add_forward(backend, &mut self.residual, &self.delta, &mut self.normed)?;
                } else {
                    norm.forward(backend, &self.residual, &mut self.normed)?;
                }
                &self.normed
            }
            None => {
                if is_pending {
                    backend.add(&mut self.residual, &self.delta)?;
                }
                &self.residual
            }
        };
        Ok((input, Output::to(&mut self.delta)))
    }

    /// The same for the part of a branch that only `first` reads, if there is one.
    pub(crate) fn input_of(
        &mut self,
        backend: &mut B,
        branch: &Branch<B>,
        first: Option<&Linear<B>>,
    ) -> Result<InputOutput<'_, B>, ModelError> {
        let norm = branch.norm.as_ref();
        if let (Some(first), Some(_)) = (first, norm) {
            first.comes_next(backend);
        }
        let (_, world_size) = backend.rank_and_world();
        if !branch.adds_at_once() || world_size > 1 {
            return self.input(backend, norm);
        }
        self.input(backend, norm)?;
        let stream = Some((&mut self.residual, &mut self.is_pending));
        Ok((&self.normed, Output { delta: &mut self.delta, stream }))
    }

    /// Where the feed-forward beside a mixer reads and writes, once the mixer has written; without a norm it reads what the
    /// mixer read.
    pub(crate) fn input_beside(
        &mut self,
        backend: &mut B,
        norm: Option<&Norm<B>>,
    ) -> Result<InputOutput<'_, B>, ModelError> {
        if let Some(norm) = norm {
            norm.forward(backend, &self.residual, &mut self.normed)?;
        }
        // Without parallel layers nobody asks; with them the buffer is there.
        Ok((&self.normed, Output::to(self.beside.as_mut().unwrap_or(&mut self.delta))))
    }

    /// Adds what the feed-forward beside the mixer wrote, and sums over the ranks.
    pub(crate) fn finish_beside(&mut self, backend: &mut B) -> Result<(), ModelError> {
        if let Some(beside) = &self.beside {
            backend.add(&mut self.delta, beside)?;
        }
        Ok(backend.all_reduce(&mut self.delta)?)
    }

    /// Sums over the ranks what a part wrote, and does to it what the branch does before it is added; what was added already is
    /// left alone.
    pub(crate) fn finish(&mut self, backend: &mut B, branch: &Branch<B>) -> Result<(), ModelError> {
        if !self.is_pending {
            return Ok(());
        }
        backend.all_reduce(&mut self.delta)?;
        if let Some(norm) = &branch.post_norm {
            norm.forward_in_place(backend, &mut self.delta)?;
        }
        if branch.multiplier != 1.0 {
            backend.scale(&mut self.delta, branch.multiplier)?;
        }
        Ok(())
    }

    /// Sums over the ranks what a part wrote, adds it and normalises the sum, or leaves both to the next norm.
    pub(crate) fn finish_with_norm(
        &mut self,
        backend: &mut B,
        norm: Option<&Norm<B>>,
    ) -> Result<(), ModelError> {
        backend.all_reduce(&mut self.delta)?;
        let Some(norm) = norm else { return Ok(()) };
        self.is_pending = false;
        backend.add(&mut self.residual, &self.delta)?;
        norm.forward_in_place(backend, &mut self.residual)
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
