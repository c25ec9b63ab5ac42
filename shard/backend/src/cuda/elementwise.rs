//! elementwise.

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
pub(super) struct Elementwise {}

impl Elementwise {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn add(&self, queue: &Queue, x: &mut CudaBuffer, y: &CudaBuffer) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "add".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn clamp(&self, queue: &Queue, x: &mut CudaBuffer, limit: f32) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "clamp".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn scale(&self, queue: &Queue, x: &mut CudaBuffer, factor: f32) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "scale".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn soft_cap(&self, queue: &Queue, x: &mut CudaBuffer, cap: f32) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "soft_cap".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn activate(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        activation: Activation,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "activate".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn gated(
        &self,
        queue: &Queue,
        gate_up: &CudaBuffer,
        activation: Activation,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "gated".to_owned(), reason: "being written".to_owned() })
    }
}
