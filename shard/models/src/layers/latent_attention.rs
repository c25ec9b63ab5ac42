//! Attention over latent vectors, in the absorbed form: what would make keys and values of the cached latent vectors is applied to
//! queries and results instead, so that all heads attend to one shared head, `[rotated key | latent vector]`.
//!
//! Heads are split over the ranks; every rank has the whole cache. The rotated part comes first in a head, where the backend
//! turns it. Values are the latent vectors again: the rotated columns of a result mean nothing and are not read.

use backend::{AttentionShape, Backend, HeadColumns};

use super::linear::{ColumnPart, Linear};
use super::packing::windows;
use super::{InputOutput, Loader, Role, Scratch};
use crate::ModelError;
use crate::spec::{LatentAttentionSpec, LatentProjectionSpec, NormSpec};
use crate::tensor_parallel::split_heads;

/// This rank's heads of one layer.
pub(crate) struct LatentAttention<B: Backend> {
    shape: AttentionShape,
    dims: Dims,
    /// Index among the layers that have a KV cache.
    cache_layer: usize,
    q_down: Option<Down<B>>,
    q_proj: Linear<B>,
    kv_down: Down<B>,
    /// Of each head, `[latent_dim, plain_dim]`: from the plain part of a query to what meets a latent vector.
    key_up: Vec<B::Linear>,
    /// Of each head, `[value_dim, latent_dim]`: from the mixed latent vectors to the head's result.
    value_up: Vec<B::Linear>,
    o_proj: Linear<B>,
    rope: usize,
    buffers: Buffers,
}

/// Elements of the parts of heads.
#[derive(Debug, Clone, Copy)]
struct Dims {
    plain: usize,
    rotary: usize,
    value: usize,
    latent: usize,
}

/// Scratch buffers.
#[derive(Debug, Clone, Copy)]
struct Buffers {
    queries: usize,
    qkv: usize,
    mixed: usize,
    values: usize,
}

/// A projection to a narrow vector whose first columns are normalised.
struct Down<B: Backend> {
    proj: Linear<B>,
    weight: B::Vector,
    width: usize,
    eps: f32,
    /// Scratch buffer of the result.
    out: usize,
}

impl<B: Backend> LatentAttention<B> {
    /// Loads this rank's heads, and all of what leads to the latent vectors.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &LatentAttentionSpec,
        hidden_size: usize,
        cache_layer: usize,
    ) -> Result<Self, ModelError> {
        let heads = split_heads(spec.num_heads, 1, loader.rank, loader.world_size)?.query;
        let dims = Dims {
            plain: spec.plain_dim,
            rotary: spec.rotary_dim,
            value: spec.value_dim,
            latent: spec.latent_dim,
        };
        let shape = AttentionShape {
            num_heads: heads.len(),
            num_kv_heads: 1,
            head_dim: dims.rotary + dims.latent,
            scale: spec.scale,
            window: None,
            soft_cap: None,
            alibi: None,
        };
        let query_dim = dims.plain + dims.rotary;
        let query_rows = heads.start * query_dim..heads.end * query_dim;
        let value_columns = heads.start * dims.value..heads.end * dims.value;
        let q_down = match &spec.q_down {
            None => None,
            Some(down) => Some(Down::load(loader, down, hidden_size, (Role::QueryLatent, down.width))?),
        };
        let query_inputs = spec.q_down.as_ref().map_or(hidden_size, |down| down.width);
        let q_proj = ColumnPart { linear: &spec.q_proj, rows: query_rows.clone() };
        let (key_up, value_up) =
            heads.clone().map(|head| load_head(loader, spec, head)).collect::<Result<_, _>>()?;
        Ok(Self {
            shape,
            dims,
            cache_layer,
            q_down,
            q_proj: Linear::merged_column_parallel(loader, &[q_proj], query_inputs)?,
            kv_down: {
                let out = (Role::Latent, dims.latent + dims.rotary);
                Down::load(loader, &spec.kv_down, hidden_size, out)?
            },
            key_up,
            value_up,
            o_proj: Linear::row_parallel(loader, &spec.o_proj, hidden_size, value_columns.clone())?,
            rope: loader.rope(&spec.rope)?,
            buffers: Buffers {
                queries: loader.reserve(Role::Queries, query_rows.len())?,
                qkv: loader.reserve(Role::Projected, shape.qkv_width())?,
                mixed: loader.reserve(Role::Mixed, shape.num_heads * shape.head_dim)?,
                values: loader.reserve(Role::Values, value_columns.len())?,
            },
        })
    }

    /// The heads as the cache sees them.
    pub(crate) fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// `out = attention(x)`, this rank's part of the sum; stores the latent vectors.
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        (x, out): InputOutput<'_, B>,
        scratch: &mut Scratch<B>,
        cache: &mut B::KvCache,
    ) -> Result<(), ModelError> {
        let Buffers { queries, qkv, mixed, values } = self.buffers;
        match &self.q_down {
            None => self.q_proj.forward(backend, x, scratch.one(queries))?,
            Some(down) => {
                down.forward(backend, x, scratch)?;
                let (narrow, queries) = scratch.pair(down.out, queries);
                self.q_proj.forward(backend, narrow, queries)?;
            }
        }
        self.kv_down.forward(backend, x, scratch)?;
        let (queries, qkv) = scratch.pair(queries, qkv);
        self.absorb(backend, queries, qkv)?;
        let (latent, qkv) = scratch.pair(self.kv_down.out, self.buffers.qkv);
        self.place(backend, latent, qkv)?;
        let (ropes, qkv, mixed) = scratch.ropes_and_pair(self.buffers.qkv, mixed);
        backend.rope_and_store_kv(qkv, Some(&ropes[self.rope]), &self.shape, self.cache_layer, cache)?;
        backend.attention(qkv, &self.shape, self.cache_layer, cache, mixed)?;
        let (mixed, values) = scratch.pair(self.buffers.mixed, values);
        let Dims { value, latent, rotary, .. } = self.dims;
        let from = HeadColumns { first: rotary, stride: self.shape.head_dim, width: latent };
        let to = HeadColumns { first: 0, stride: value, width: value };
        backend.matmul_heads((mixed, from), &self.value_up, (values, to))?;
        out.project(backend, &self.o_proj, values)
    }

    /// Brings the queries to the form that meets the cache.
    fn absorb(&self, backend: &mut B, queries: &B::Buffer, qkv: &mut B::Buffer) -> Result<(), ModelError> {
        let Dims { plain, rotary, latent, .. } = self.dims;
        let (query_dim, head_dim) = (plain + rotary, self.shape.head_dim);
        let from = HeadColumns { first: plain, stride: query_dim, width: rotary };
        let to = HeadColumns { first: 0, stride: head_dim, width: rotary };
        backend.copy_heads((queries, from), self.shape.num_heads, (qkv, to))?;
        let from = HeadColumns { first: 0, stride: query_dim, width: plain };
        let to = HeadColumns { first: rotary, stride: head_dim, width: latent };
        Ok(backend.matmul_heads((queries, from), &self.key_up, (qkv, to))?)
    }

    /// Puts the shared key and the latent vector where a key is expected, and the latter where a value is.
    fn place(&self, backend: &mut B, down: &B::Buffer, qkv: &mut B::Buffer) -> Result<(), ModelError> {
        let Dims { rotary, latent, .. } = self.dims;
        let head_dim = self.shape.head_dim;
        let key = self.shape.num_heads * head_dim;
        let mut copy = |from: usize, to: usize, width: usize| {
            let columns = |first| HeadColumns { first, stride: width, width };
            backend.copy_heads((down, columns(from)), 1, (qkv, columns(to)))
        };
        copy(latent, key, rotary)?;
        copy(0, key + rotary, latent)?;
        Ok(copy(0, key + head_dim + rotary, latent)?)
    }
}

/// What stands for the key and the value projection of head `head`.
fn load_head<B: Backend>(
    loader: &mut Loader<'_, B>,
    spec: &LatentAttentionSpec,
    head: usize,
) -> Result<(B::Linear, B::Linear), ModelError> {
    let first = head * (spec.plain_dim + spec.value_dim);
    let (keys, values) =
        (first..first + spec.plain_dim, first + spec.plain_dim..first + spec.plain_dim + spec.value_dim);
    let keys: Vec<_> = windows(&spec.kv_up, keys, 0..spec.latent_dim).collect();
    let keys = loader.matrices(&keys)?;
    // One run of rows: the heads of a projection of its own lie side by side.
    let transposed: Vec<_> = keys.iter().map(|keys| keys.transposed()).collect();
    let key_up = loader.backend.linear(&transposed, loader.dtype)?;
    let values: Vec<_> = windows(&spec.kv_up, values, 0..spec.latent_dim).collect();
    let values = loader.matrices(&values)?;
    let value_up = loader.backend.linear(&values, loader.dtype)?;
    loader.weight_bytes += loader.backend.linear_bytes(&key_up) + loader.backend.linear_bytes(&value_up);
    keys.into_iter().chain(values).for_each(|matrix| loader.source.recycle(matrix));
    Ok((key_up, value_up))
}

impl<B: Backend> Down<B> {
    /// Loads all of it; `out` is the role and width of its result.
    fn load(
        loader: &mut Loader<'_, B>,
        spec: &LatentProjectionSpec,
        hidden_size: usize,
        (role, out_features): (Role, usize),
    ) -> Result<Self, ModelError> {
        let LatentProjectionSpec { width, proj, norm: NormSpec { weight, weight_offset, eps, .. } } = spec;
        let proj = ColumnPart { linear: proj, rows: 0..out_features };
        let mut weight = loader.source.vector(weight, 0..*width)?;
        weight.iter_mut().for_each(|weight| *weight += weight_offset);
        loader.weight_bytes += size_of_val(weight.as_slice());
        Ok(Self {
            proj: Linear::merged_column_parallel(loader, &[proj], hidden_size)?,
            weight: loader.backend.vector(weight)?,
            width: *width,
            eps: *eps,
            out: loader.reserve(role, out_features)?,
        })
    }

    fn forward(&self, backend: &mut B, x: &B::Buffer, scratch: &mut Scratch<B>) -> Result<(), ModelError> {
        let out = scratch.one(self.out);
        self.proj.forward(backend, x, out)?;
        Ok(backend.rms_norm_heads(out, 0..self.width, &self.weight, self.eps)?)
    }
}
