//! norm.

#![allow(unused_variables, unused_imports, dead_code, reason = "being written")]
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Launch, Queue, args};
use super::module::{ByType, Function, Module};
use super::step::StepInputs;
use super::upload::Uploader;
use super::{CudaBuffer, CudaExperts, CudaKvCache, CudaLinear, CudaRope, CudaVector, DeviceFacts};
use crate::sampling::{Sampled, SamplingRow};
use crate::{
    Activation, AttentionShape, BackendError, DType, HeadColumns, KvLayout, RopeFrequencies, Routing,
    SplitNorm,
};

/// Kernels.
pub(super) struct Norms {}

impl Norms {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn rms(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, eps): (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "rms".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn rms_in_place(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "rms_in_place".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn add_rms(
        &self,
        queue: &Queue,
        (residual, delta): (&mut CudaBuffer, &CudaBuffer),
        (weight, eps): (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "add_rms".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn layer(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "layer".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn layer_in_place(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device {
            operation: "layer_in_place".to_owned(),
            reason: "being written".to_owned(),
        })
    }

    /// See the operation of this name.
    pub(super) fn add_layer(
        &self,
        queue: &Queue,
        (residual, delta): (&mut CudaBuffer, &CudaBuffer),
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "add_layer".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn rms_heads(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "rms_heads".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn layer_heads(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        head_dim: usize,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "layer_heads".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn squares(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        columns: Range<usize>,
        copies: usize,
        squares: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "squares".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn scale_by_squares(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        norm: SplitNorm<'_, CudaVector>,
        squares: &CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device {
            operation: "scale_by_squares".to_owned(),
            reason: "being written".to_owned(),
        })
    }
}
