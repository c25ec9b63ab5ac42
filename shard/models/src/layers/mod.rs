//! The parts of a layer: each loads its share of the weights and runs on any backend.
//!
//! Splitting over ranks is decided here, from the pure functions of `tensor_parallel`; formats are the business of
//! `weights`, arithmetic that of the backend.

mod attention;
mod embedding;
mod experts;
mod latent_attention;
mod linear;
mod mlp;
mod norm;
mod packing;
mod qk_norm;
mod residual;

use backend::{Backend, DType, RopeFrequencies};

pub(crate) use attention::Attention;
pub(crate) use embedding::{Embedding, LmHead};
pub(crate) use latent_attention::LatentAttention;
pub(crate) use linear::Linear;
pub(crate) use mlp::Mlp;
pub(crate) use norm::Norm;
use residual::Output;
pub(crate) use residual::{InputOutput, Residual, Stream};

use crate::ModelError;
use crate::weights::WeightSource;

/// Weights of eight bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fp8Use {
    /// Type that those of the files are multiplied in.
    pub(crate) dtype: DType,
    /// Projections that are stored plainly are rounded to eight bits.
    pub(crate) quantizes: bool,
}

/// What every part needs while it loads.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) source: &'a dyn WeightSource,
    /// Type the packed weights get.
    pub(crate) dtype: DType,
    /// Quantized tensors stay so instead.
    pub(crate) keeps_quantized: bool,
    /// What becomes of projections of eight bits.
    pub(crate) fp8: Fp8Use,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Most rows of a step.
    pub(crate) max_rows: usize,
    /// Bytes of packed weights so far.
    pub(crate) weight_bytes: usize,
    pub(crate) scratch: Scratch<B>,
    ropes: Vec<(RopeFrequencies, usize)>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// Nothing loaded yet.
    pub(crate) fn new(
        backend: &'a B,
        source: &'a dyn WeightSource,
        (dtype, keeps_quantized, fp8): (DType, bool, Fp8Use),
        max_rows: usize,
    ) -> Self {
        let (rank, world_size) = backend.rank_and_world();
        let scratch = Scratch { ropes: Vec::new(), buffers: Vec::new(), bytes: 0 };
        Self {
            backend,
            source,
            dtype,
            keeps_quantized,
            fp8,
            rank,
            world_size,
            max_rows,
            weight_bytes: 0,
            scratch,
            ropes: Vec::new(),
        }
    }

    /// Index of a buffer `[max_rows, width]` of its own for `role`; layers run one after the other and share it.
    fn reserve(&mut self, role: Role, width: usize) -> Result<usize, ModelError> {
        let same = |entry: &(Role, usize, B::Buffer)| entry.0 == role && entry.1 == width;
        if let Some(index) = self.scratch.buffers.iter().position(same) {
            return Ok(index);
        }
        let buffer = self.backend.buffer(self.max_rows, width, role.dtype(self.dtype))?;
        self.scratch.bytes += self.max_rows * width * size_of::<f32>();
        self.scratch.buffers.push((role, width, buffer));
        Ok(self.scratch.buffers.len() - 1)
    }

    /// Index of a rotary embedding; layers with equal frequencies share it.
    fn rope(&mut self, frequencies: &RopeFrequencies) -> Result<usize, ModelError> {
        if let Some((_, index)) = self.ropes.iter().find(|(known, _)| known == frequencies) {
            return Ok(*index);
        }
        self.scratch.ropes.push(self.backend.rope(frequencies.clone())?);
        self.ropes.push((frequencies.clone(), self.scratch.ropes.len() - 1));
        Ok(self.scratch.ropes.len() - 1)
    }
}

/// What a buffer is for; those of different roles are in use at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Rows of an embedding that is narrower than the stream.
    Embedded,
    Projected,
    Mixed,
    Squares,
    GateUp,
    Activated,
    RouterLogits,
    RoutedOut,
    QueryLatent,
    Queries,
    Latent,
    Values,
}

impl Role {
    /// The precision it needs in a model of `dtype`: what is summed over ranks or compared stays in float32.
    fn dtype(self, dtype: DType) -> DType {
        match self {
            Role::Embedded | Role::Squares | Role::RouterLogits => DType::F32,
            _ => dtype,
        }
    }
}

/// What the layers share while they run.
pub(crate) struct Scratch<B: Backend> {
    ropes: Vec<B::Rope>,
    buffers: Vec<(Role, usize, B::Buffer)>,
    /// Size of the buffers.
    pub(crate) bytes: usize,
}

impl<B: Backend> Scratch<B> {
    /// A buffer.
    fn one(&mut self, index: usize) -> &mut B::Buffer {
        &mut self.buffers[index].2
    }

    /// Two different buffers, both writable.
    fn pair(&mut self, first: usize, second: usize) -> (&mut B::Buffer, &mut B::Buffer) {
        let (_, first, second) = self.ropes_and_pair(first, second);
        (first, second)
    }

    /// The rotary embeddings besides.
    fn ropes_and_pair(
        &mut self,
        first: usize,
        second: usize,
    ) -> (&[B::Rope], &mut B::Buffer, &mut B::Buffer) {
        let (head, tail) = self.buffers.split_at_mut(first.max(second));
        let (low, high) = (&mut head[first.min(second)].2, &mut tail[0].2);
        if first < second { (&self.ropes, low, high) } else { (&self.ropes, high, low) }
    }
}
