//! Attention, split by KV head groups.

use backend::{AttentionShape, Backend};

use super::linear::{ColumnPart, Linear};
use super::{Loader, Norm, Role, Scratch};
use crate::ModelError;
use crate::spec::{AttentionSpec, NormSpec};
use crate::tensor_parallel::{HeadSplit, split_heads};

/// This rank's heads of one layer.
pub(crate) struct Attention<B: Backend> {
    shape: AttentionShape,
    /// Index among the layers that have a KV cache.
    cache_layer: usize,
    qkv_proj: Linear<B>,
    o_proj: Linear<B>,
    q_norm: Option<Norm<B>>,
    k_norm: Option<Norm<B>>,
    rope: Option<usize>,
    qkv: usize,
    heads: usize,
}

impl<B: Backend> Attention<B> {
    /// Loads this rank's rows of the projections in and columns of the projection out.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &AttentionSpec,
        hidden_size: usize,
        cache_layer: usize,
    ) -> Result<Self, ModelError> {
        let HeadSplit { query, kv } =
            split_heads(spec.num_heads, spec.num_kv_heads, loader.rank, loader.world_size)?;
        let shape = AttentionShape {
            num_heads: query.len(),
            num_kv_heads: kv.len(),
            head_dim: spec.head_dim,
            scale: spec.scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
        };
        let queries = query.start * spec.head_dim..query.end * spec.head_dim;
        let keys = kv.start * spec.head_dim..kv.end * spec.head_dim;
        let parts = [
            ColumnPart { linear: &spec.q_proj, rows: queries.clone() },
            ColumnPart { linear: &spec.k_proj, rows: keys.clone() },
            ColumnPart { linear: &spec.v_proj, rows: keys },
        ];
        let mut head_norm =
            |norm: &NormSpec| -> Result<Norm<B>, ModelError> { Norm::load(loader, norm, spec.head_dim) };
        Ok(Self {
            shape,
            cache_layer,
            q_norm: spec.q_norm.as_ref().map(&mut head_norm).transpose()?,
            k_norm: spec.k_norm.as_ref().map(&mut head_norm).transpose()?,
            qkv_proj: Linear::merged_column_parallel(loader, &parts, hidden_size)?,
            o_proj: Linear::row_parallel(loader, &spec.o_proj, hidden_size, queries)?,
            rope: spec.rope.as_ref().map(|rope| loader.rope(rope)).transpose()?,
            qkv: loader.reserve(Role::Projected, shape.qkv_width())?,
            heads: loader.reserve(Role::Mixed, shape.num_heads * shape.head_dim)?,
        })
    }

    /// This rank's heads, from which the KV cache is laid out.
    pub(crate) fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// `out = attention(x)`, summed over the ranks; stores keys and values.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        (x, out): (&B::Buffer, &mut B::Buffer),
        scratch: &mut Scratch<B>,
        cache: &mut B::KvCache,
    ) -> Result<(), ModelError> {
        let (ropes, qkv, heads) = scratch.ropes_and_pair(self.qkv, self.heads);
        let (rope, layer) = (self.rope.map(|index| &ropes[index]), self.cache_layer);
        self.qkv_proj.forward(backend, x, qkv)?;
        let queries = self.shape.num_heads * self.shape.head_dim;
        if let Some(norm) = &self.q_norm {
            norm.forward_heads(backend, qkv, 0..queries)?;
        }
        if let Some(norm) = &self.k_norm {
            norm.forward_heads(
                backend,
                qkv,
                queries..queries + self.shape.num_kv_heads * self.shape.head_dim,
            )?;
        }
        backend.rope_and_store_kv(qkv, rope, &self.shape, layer, cache)?;
        backend.attention(qkv, &self.shape, layer, cache, heads)?;
        self.o_proj.forward(backend, heads, out)?;
        Ok(backend.all_reduce(out)?)
    }
}
