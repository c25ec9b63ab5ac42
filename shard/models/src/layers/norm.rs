//! Normalisations.

use backend::Backend;

use super::Loader;
use crate::ModelError;
use crate::spec::{NormKind, NormSpec};

/// A normalisation over the width of the residual stream; every rank has all of it.
pub(crate) struct Norm<B: Backend> {
    kind: Kind<B>,
    weight: B::Vector,
    eps: f32,
}

enum Kind<B: Backend> {
    Rms,
    Layer { bias: B::Vector },
}

impl<B: Backend> Norm<B> {
    /// Loads the weight and the bias, `[width]`.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        spec: &NormSpec,
        width: usize,
    ) -> Result<Self, ModelError> {
        let mut weight = loader.source.vector(&spec.weight, 0..width)?;
        weight.iter_mut().for_each(|weight| *weight += spec.weight_offset);
        loader.weight_bytes += size_of_val(weight.as_slice());
        let kind = match spec.kind {
            NormKind::Rms => Kind::Rms,
            NormKind::Layer => {
                let bias = match &spec.bias {
                    Some(name) => loader.source.vector(name, 0..width)?,
                    None => vec![0.0; width],
                };
                loader.weight_bytes += size_of_val(bias.as_slice());
                Kind::Layer { bias: loader.backend.vector(bias)? }
            }
        };
        Ok(Self { kind, weight: loader.backend.vector(weight)?, eps: spec.eps })
    }

    /// `out = norm(x)`.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        match &self.kind {
            Kind::Rms => Ok(backend.rms_norm(x, &self.weight, self.eps, out)?),
            Kind::Layer { bias } => Ok(backend.layer_norm(x, (&self.weight, bias), self.eps, out)?),
        }
    }

    /// `x = norm(x)`.
    pub(super) fn forward_in_place(&self, backend: &mut B, x: &mut B::Buffer) -> Result<(), ModelError> {
        match &self.kind {
            Kind::Rms => Ok(backend.rms_norm_in_place(x, &self.weight, self.eps)?),
            Kind::Layer { bias } => Ok(backend.layer_norm_in_place(x, (&self.weight, bias), self.eps)?),
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
        match &self.kind {
            Kind::Rms => Ok(backend.add_rms_norm(residual, delta, (&self.weight, self.eps), out)?),
            Kind::Layer { bias } => {
                Ok(backend.add_layer_norm(residual, delta, (&self.weight, bias, self.eps), out)?)
            }
        }
    }
}
