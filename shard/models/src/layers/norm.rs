//! Normalisations.

use std::ops::Range;

use backend::Backend;

use super::Loader;
use crate::ModelError;
use crate::spec::{NormKind, NormSpec};

/// A normalisation over the width of the residual stream or of a head; every rank has all of it.
pub(crate) struct Norm<B: Backend> {
    kind: NormKind,
    weight: B::Vector,
    eps: f32,
}

impl<B: Backend> Norm<B> {
    /// Loads the weight, `[width]`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &NormSpec,
        width: usize,
    ) -> Result<Self, ModelError> {
        let mut weight = loader.source.vector(&spec.weight, 0..width)?;
        weight.iter_mut().for_each(|weight| *weight += spec.weight_offset);
        loader.weight_bytes += size_of_val(weight.as_slice());
        Ok(Self { kind: spec.kind, weight: loader.backend.vector(weight)?, eps: spec.eps })
    }

    /// `out = norm(x)`.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        match self.kind {
            NormKind::Rms => Ok(backend.rms_norm(x, &self.weight, self.eps, out)?),
        }
    }

    /// Normalises each head in the columns `columns` of `x` by itself.
    pub(super) fn forward_heads(
        &self,
        backend: &mut B,
        x: &mut B::Buffer,
        columns: Range<usize>,
    ) -> Result<(), ModelError> {
        match self.kind {
            NormKind::Rms => Ok(backend.rms_norm_heads(x, columns, &self.weight, self.eps)?),
        }
    }

    /// `residual += delta; out = norm(residual)`.
    pub(super) fn add_forward(
        &self,
        backend: &mut B,
        residual: &mut B::Buffer,
        delta: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        match self.kind {
            NormKind::Rms => Ok(backend.add_rms_norm(residual, delta, (&self.weight, self.eps), out)?),
        }
    }
}
