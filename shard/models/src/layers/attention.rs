//! Attention, split by KV head groups.

use backend::{Alibi, AttentionShape, Backend};

use super::linear::{ColumnPart, Linear};
use super::qk_norm::QkNorm;
use super::{InputOutput, Loader, Role, Scratch};
use crate::ModelError;
use crate::spec::AttentionSpec;
use crate::tensor_parallel::{HeadSplit, split_heads};

/// This rank's heads of one layer.
pub(crate) struct Attention<B: Backend> {
    shape: AttentionShape,
    /// Index among the layers that have a KV cache.
    cache_layer: usize,
    qkv_proj: Linear<B>,
    o_proj: Linear<B>,
    clip_qkv: Option<f32>,
    qk_norm: Option<QkNorm<B>>,
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
        let split = split_heads(spec.num_heads, spec.num_kv_heads, loader.rank, loader.world_size)?;
        let HeadSplit { query, kv, .. } = &split;
        let shape = AttentionShape {
            num_heads: query.len(),
            num_kv_heads: kv.len(),
            head_dim: spec.head_dim,
            scale: spec.scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
            alibi: spec.alibi.map(|alibi| Alibi {
                total_heads: spec.num_heads,
                first_head: query.start,
                max_bias: alibi.max_bias,
                multiplier: alibi.multiplier,
            }),
        };
        let queries = query.start * spec.head_dim..query.end * spec.head_dim;
        let keys = kv.start * spec.head_dim..kv.end * spec.head_dim;
        let parts = [
            ColumnPart { linear: &spec.q_proj, rows: queries.clone() },
            ColumnPart { linear: &spec.k_proj, rows: keys.clone() },
            ColumnPart { linear: &spec.v_proj, rows: keys },
        ];
        Ok(Self {
            shape,
            cache_layer,
            clip_qkv: spec.clip_qkv,
            qk_norm: spec
                .qk_norm
                .as_ref()
                .map(|norm| QkNorm::load(loader, norm, spec, &split))
                .transpose()?,
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

    /// What reads its input.
    pub(crate) fn first(&self) -> &Linear<B> {
        &self.qkv_proj
    }

    /// `out = attention(x)`, this rank's part of the sum; stores keys and values.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        (x, out): InputOutput<'_, B>,
        scratch: &mut Scratch<B>,
        cache: &mut B::KvCache,
    ) -> Result<(), ModelError> {
        let qkv = scratch.one(self.qkv);
        self.qkv_proj.forward(backend, x, qkv)?;
        if let Some(limit) = self.clip_qkv {
            backend.clamp(qkv, limit)?;
        }
        if let Some(norm) = &self.qk_norm {
            norm.forward(backend, &self.shape, self.qkv, scratch)?;
        }
        let (ropes, qkv, heads) = scratch.ropes_and_pair(self.qkv, self.heads);
        let (rope, layer) = (self.rope.map(|index| &ropes[index]), self.cache_layer);
        backend.rope_and_store_kv(qkv, rope, &self.shape, layer, cache)?;
        backend.attention(qkv, &self.shape, layer, cache, heads)?;
        out.project(backend, &self.o_proj, heads)
    }
}
