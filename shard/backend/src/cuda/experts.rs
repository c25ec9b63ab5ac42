//! experts.

#![allow(unused_variables, unused_imports, dead_code, reason = "being written")]
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Launch, Queue, args};
use super::module::{ByType, Function, Module};
use super::step::StepInputs;
use super::upload::Uploader;
use super::{CudaBuffer, CudaKvCache, CudaLinear, CudaRope, CudaVector, DeviceFacts};
use crate::sampling::{Sampled, SamplingRow};
use crate::{
    Activation, AttentionShape, BackendError, DType, HeadColumns, KvLayout, RopeFrequencies, Routing,
    SplitNorm,
};

/// Experts on the device.
pub struct CudaExperts {}

impl CudaExperts {
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        projections: Vec<(CudaLinear, CudaLinear)>,
        activation: Activation,
    ) -> Result<Self, BackendError> {
        Ok(Self {})
    }
}

/// Kernels.
pub(super) struct ExpertKernels {}

impl ExpertKernels {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn mix(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        (x, router_logits): (&CudaBuffer, &CudaBuffer),
        (routing, correction): (&Routing, Option<&CudaVector>),
        experts: &CudaExperts,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "mix".to_owned(), reason: "being written".to_owned() })
    }
}
