//! Embedding and logits, split by rows of the vocabulary.

use std::ops::Range;

use backend::{Backend, DType};

use super::linear::{ColumnPart, Linear};
use super::{Loader, Norm, Role, Scratch, Stream};
use crate::ModelError;
use crate::spec::{DecoderSpec, EmbeddingProjectionSpec, EmbeddingSpec, LinearSpec, LmHeadSpec};
use crate::tensor_parallel::split_tiles;

/// This rank's rows of the embedding, and of the logits' matrix where that is another.
pub(crate) struct Embedding<B: Backend> {
    table: Linear<B>,
    first_id: usize,
    lm_head: Option<Linear<B>>,
    projection: Option<Projection<B>>,
    multiplier: f32,
    positions: Option<Positions<B>>,
    norm: Option<Norm<B>>,
}

/// Between a narrow table and the stream; every rank has all of both matrices.
struct Projection<B: Backend> {
    /// In float32, as what the ranks sum and the stream are.
    proj_in: Linear<B>,
    proj_out: Linear<B>,
    /// The scratch buffer of the table's rows.
    embedded: usize,
}

/// Learned positions; every rank has all of them.
struct Positions<B: Backend> {
    table: Linear<B>,
    offset: usize,
}

impl<B: Backend> Embedding<B> {
    /// Loads both; a tied table is packed once.
    pub(crate) fn load(loader: &mut Loader<'_, B>, spec: &DecoderSpec) -> Result<Self, ModelError> {
        let rows = split_tiles(spec.vocab_size, "rows of the vocabulary", loader.rank, loader.world_size)?;
        let EmbeddingSpec { tokens, projection, multiplier, positions, norm } = &spec.embedding;
        let hidden = spec.hidden_size;
        let width = projection.as_ref().map_or(hidden, |projection| projection.width);
        let projection =
            projection.as_ref().map(|spec| Projection::load(loader, spec, hidden)).transpose()?;
        let mut load = |linear: &LinearSpec, rows: Range<usize>, width: usize| {
            Linear::table(loader, linear, rows, width)
        };
        Ok(Self {
            table: load(&LinearSpec::table(tokens), rows.clone(), width)?,
            projection,
            first_id: rows.start,
            multiplier: *multiplier,
            positions: match positions {
                None => None,
                Some(positions) => Some(Positions {
                    table: load(&LinearSpec::table(&positions.weight), 0..positions.rows, hidden)?,
                    offset: positions.offset,
                }),
            },
            lm_head: match &spec.lm_head {
                LmHeadSpec::Tied => None,
                LmHeadSpec::Own(linear) => Some(load(linear, rows, width)?),
                LmHeadSpec::Normalised(linear) => Some(Linear::normalised(loader, linear, rows, width)?),
            },
            norm: norm.as_ref().map(|norm| Norm::load(loader, norm, hidden)).transpose()?,
        })
    }

    /// Begins the stream with `norm(multiplier * proj_in(table[input_ids[t]]) + positions[position_ids[t]])`, on every rank.
    pub(crate) fn embed(
        &self,
        backend: &mut B,
        stream: &mut Stream<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ModelError> {
        let out = stream.begin();
        match &self.projection {
            None => {
                backend.embed(self.table.weight(), self.first_id, out)?;
                backend.all_reduce(out)?;
            }
            Some(Projection { proj_in, embedded, .. }) => {
                let rows = scratch.one(*embedded);
                backend.embed(self.table.weight(), self.first_id, rows)?;
                backend.all_reduce(rows)?;
                proj_in.forward(backend, rows, out)?;
            }
        }
        if self.multiplier != 1.0 {
            backend.scale(out, self.multiplier)?;
        }
        if let Some(Positions { table, offset }) = &self.positions {
            backend.add_positions(table.weight(), *offset, out)?;
        }
        match &self.norm {
            Some(norm) => norm.forward_in_place(backend, out),
            None => Ok(()),
        }
    }
}

impl<B: Backend> Projection<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        spec: &EmbeddingProjectionSpec,
        hidden: usize,
    ) -> Result<Self, ModelError> {
        let EmbeddingProjectionSpec { width, proj_in, proj_out } = spec;
        let all = ColumnPart { linear: proj_out, rows: 0..*width };
        Ok(Self {
            proj_in: Linear::precise(loader, proj_in, [hidden, *width])?,
            proj_out: Linear::merged_column_parallel(loader, &[all], hidden)?,
            embedded: loader.reserve(Role::Embedded, *width)?,
        })
    }
}

/// The buffers between the last norm and the logits of all ranks.
pub(crate) struct LmHead<B: Backend> {
    /// What a narrow matrix of the logits takes, where it is narrow.
    narrowed: Option<B::Buffer>,
    /// Number of logits of each rank.
    widths: Vec<usize>,
    multiplier: f32,
    soft_cap: Option<f32>,
    /// This rank's logits; none when it has all.
    local: Option<B::Buffer>,
    /// `[max_rows, vocab_size]`.
    pub(crate) logits: B::Buffer,
    /// Size of the buffers.
    pub(crate) bytes: usize,
}

impl<B: Backend> LmHead<B> {
    /// Makes the buffers.
    pub(crate) fn new(
        loader: &Loader<'_, B>,
        spec: &DecoderSpec,
        max_rows: usize,
    ) -> Result<Self, ModelError> {
        let vocab_size = spec.vocab_size;
        let widths = (0..loader.world_size)
            .map(|rank| {
                let rows = split_tiles(vocab_size, "rows of the vocabulary", rank, loader.world_size)?;
                Ok(rows.len())
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        let narrow = spec.embedding.projection.as_ref().map(|projection| projection.width);
        let local_width = if loader.world_size > 1 { widths[loader.rank] } else { 0 };
        Ok(Self {
            narrowed: narrow.map(|width| loader.backend.buffer(max_rows, width, loader.dtype)).transpose()?,
            local: (local_width > 0)
                .then(|| loader.backend.buffer(max_rows, local_width, DType::F32))
                .transpose()?,
            logits: loader.backend.buffer(max_rows, vocab_size, DType::F32)?,
            bytes: max_rows * (vocab_size + local_width + narrow.unwrap_or(0)) * size_of::<f32>(),
            widths,
            multiplier: spec.logits_multiplier,
            soft_cap: spec.logits_soft_cap,
        })
    }

    /// `logits = soft_cap(multiplier * x lm_head^T)`, on every rank.
    pub(crate) fn forward(
        &mut self,
        backend: &mut B,
        embedding: &Embedding<B>,
        x: &B::Buffer,
    ) -> Result<&mut B::Buffer, ModelError> {
        let linear = embedding.lm_head.as_ref().unwrap_or(&embedding.table);
        let x = match (&embedding.projection, &mut self.narrowed) {
            (Some(projection), Some(narrowed)) => {
                projection.proj_out.forward(backend, x, narrowed)?;
                &*narrowed
            }
            _ => x,
        };
        match &mut self.local {
            None => linear.forward(backend, x, &mut self.logits)?,
            Some(local) => {
                linear.forward(backend, x, local)?;
                backend.all_gather(local, &self.widths, &mut self.logits)?;
            }
        }
        if self.multiplier != 1.0 {
            backend.scale(&mut self.logits, self.multiplier)?;
        }
        if let Some(cap) = self.soft_cap {
            backend.soft_cap(&mut self.logits, cap)?;
        }
        Ok(&mut self.logits)
    }
}
