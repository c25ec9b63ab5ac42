//! attention.

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
pub(super) struct Attentions {}

impl Attentions {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn attend(
        &mut self,
        (queue, step, workspace): (&Queue, &StepInputs, &DeviceMemory),
        (qkv, shape): (&CudaBuffer, &AttentionShape),
        (layer, cache): (usize, &CudaKvCache),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "attend".to_owned(), reason: "being written".to_owned() })
    }
}
