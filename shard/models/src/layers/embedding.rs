//! Embedding and logits, split by rows of the vocabulary.

use backend::Backend;

use super::Loader;
use super::linear::{ColumnPart, Linear};
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec, LmHeadSpec};
use crate::tensor_parallel::split_tiles;

/// This rank's rows of the embedding, and of the logits' matrix where that is another.
pub(crate) struct Embedding<B: Backend> {
    table: Linear<B>,
    first_id: usize,
    lm_head: Option<Linear<B>>,
    multiplier: f32,
}

impl<B: Backend> Embedding<B> {
    /// Loads both; a tied table is packed once.
    pub(crate) fn load(loader: &mut Loader<'_, B>, spec: &DecoderSpec) -> Result<Self, ModelError> {
        let rows = split_tiles(spec.vocab_size, "rows of the vocabulary", loader.rank, loader.world_size)?;
        let table = LinearSpec { weight: spec.embed_tokens.clone(), bias: None, fused: None };
        let mut load = |linear: &LinearSpec| {
            let part = ColumnPart { linear, rows: rows.clone() };
            Linear::merged_column_parallel(loader, &[part], spec.hidden_size)
        };
        Ok(Self {
            table: load(&table)?,
            first_id: rows.start,
            multiplier: spec.embedding_multiplier,
            lm_head: match &spec.lm_head {
                LmHeadSpec::Tied => None,
                LmHeadSpec::Own(linear) => Some(load(linear)?),
            },
        })
    }

    /// `out[t] = multiplier * table[input_ids[t]]`, on every rank.
    pub(crate) fn embed(&self, backend: &mut B, out: &mut B::Buffer) -> Result<(), ModelError> {
        backend.embed(self.table.weight(), self.first_id, out)?;
        backend.all_reduce(out)?;
        if self.multiplier != 1.0 {
            backend.scale(out, self.multiplier)?;
        }
        Ok(())
    }
}

/// The buffers between the last norm and the logits of all ranks.
pub(crate) struct LmHead<B: Backend> {
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
        let local_width = if loader.world_size > 1 { widths[loader.rank] } else { 0 };
        Ok(Self {
            local: (local_width > 0).then(|| loader.backend.buffer(max_rows, local_width)).transpose()?,
            logits: loader.backend.buffer(max_rows, vocab_size)?,
            bytes: max_rows * (vocab_size + local_width) * size_of::<f32>(),
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
