//! sampling.

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
pub(super) struct Samplers {}

impl Samplers {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn sample(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        logits: &mut CudaBuffer,
        rows: &[SamplingRow<'_>],
    ) -> Result<Vec<Sampled>, BackendError> {
        Err(BackendError::Device { operation: "sample".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn token_logprobs(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        logits: &CudaBuffer,
        targets: &[u32],
    ) -> Result<Vec<f32>, BackendError> {
        Err(BackendError::Device {
            operation: "token_logprobs".to_owned(),
            reason: "being written".to_owned(),
        })
    }
}
