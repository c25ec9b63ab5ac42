//! Norms of queries and keys.

use std::ops::Range;

use backend::{AttentionShape, Backend, SplitNorm};

use super::{Loader, Role, Scratch};
use crate::ModelError;
use crate::spec::{AttentionSpec, NormSpec, QkNormScope, QkNormSpec};
use crate::tensor_parallel::HeadSplit;

/// This rank's part of the norms of one layer.
pub(super) struct QkNorm<B: Backend> {
    scope: Scope,
    q: Part<B>,
    k: Part<B>,
}

enum Scope {
    Head,
    HeadWithOwnWeight,
    /// With the scratch buffer of the sums of squares.
    AllHeads(usize),
}

/// The norm of the queries or of the keys.
struct Part<B: Backend> {
    weight: B::Vector,
    eps: f32,
    /// Columns of all ranks.
    total_width: usize,
    /// Ranks that have the same ones.
    copies: usize,
}

impl<B: Backend> QkNorm<B> {
    /// Loads the weights of this rank's heads.
    pub(super) fn load(
        loader: &mut Loader<'_, B>,
        norm: &QkNormSpec,
        attention: &AttentionSpec,
        split: &HeadSplit,
    ) -> Result<Self, ModelError> {
        let mut part = |spec: &NormSpec, heads: &Range<usize>, total_heads: usize, copies: usize| {
            let head_dim = attention.head_dim;
            let mut weight = match norm.scope {
                QkNormScope::Head => loader.source.vector(&spec.weight, 0..head_dim)?,
                QkNormScope::AllHeads => {
                    loader.source.vector(&spec.weight, heads.start * head_dim..heads.end * head_dim)?
                }
                QkNormScope::HeadWithOwnTensor => {
                    let mut weight = Vec::with_capacity(heads.len() * head_dim);
                    for head in heads.clone() {
                        weight.extend(loader.source.vector(&spec.weight_of_head(head), 0..head_dim)?);
                    }
                    weight
                }
                QkNormScope::HeadWithOwnWeight => {
                    let rows = loader.source.matrix(&spec.weight, heads.clone(), 0..head_dim)?;
                    let mut weight = vec![0.0; rows.rows * head_dim];
                    weight
                        .chunks_exact_mut(head_dim)
                        .enumerate()
                        .for_each(|(row, out)| rows.read_row(row, out));
                    weight
                }
            };
            weight.iter_mut().for_each(|weight| *weight += spec.weight_offset);
            loader.weight_bytes += size_of_val(weight.as_slice());
            Ok::<_, ModelError>(Part {
                weight: loader.backend.vector(weight)?,
                eps: spec.eps,
                total_width: total_heads * head_dim,
                copies,
            })
        };
        let q = part(&norm.q, &split.query, attention.num_heads, 1)?;
        let k = part(&norm.k, &split.kv, attention.num_kv_heads, split.kv_copies)?;
        let scope = match norm.scope {
            QkNormScope::Head => Scope::Head,
            QkNormScope::HeadWithOwnWeight | QkNormScope::HeadWithOwnTensor => Scope::HeadWithOwnWeight,
            QkNormScope::AllHeads => Scope::AllHeads(loader.reserve(Role::Squares, 1)?),
        };
        Ok(Self { scope, q, k })
    }

    /// Normalises queries and keys in the scratch buffer `qkv`.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        shape: &AttentionShape,
        qkv: usize,
        scratch: &mut Scratch<B>,
    ) -> Result<(), ModelError> {
        let queries = shape.num_heads * shape.head_dim;
        let keys = queries + shape.num_kv_heads * shape.head_dim;
        for (Part { weight, eps, total_width, copies }, columns) in
            [(&self.q, 0..queries), (&self.k, queries..keys)]
        {
            match self.scope {
                Scope::Head => backend.rms_norm_heads(scratch.one(qkv), columns, weight, *eps)?,
                Scope::HeadWithOwnWeight => {
                    backend.layer_norm_heads(scratch.one(qkv), columns, shape.head_dim, (weight, *eps))?;
                }
                Scope::AllHeads(squares) => {
                    let (qkv, squares) = scratch.pair(qkv, squares);
                    let norm = SplitNorm { weight, eps: *eps, total_width: *total_width, copies: *copies };
                    backend.rms_norm_across_ranks(qkv, columns, norm, squares)?;
                }
            }
        }
        Ok(())
    }
}
