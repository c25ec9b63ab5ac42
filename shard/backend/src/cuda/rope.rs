//! rope.

#![allow(unused_variables, unused_imports, dead_code, reason = "being written")]
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Launch, Queue, args};
use super::module::{ByType, Function, Module};
use super::step::StepInputs;
use super::upload::Uploader;
use super::{CudaBuffer, CudaExperts, CudaKvCache, CudaLinear, CudaVector, DeviceFacts};
use crate::sampling::{Sampled, SamplingRow};
use crate::{
    Activation, AttentionShape, BackendError, DType, HeadColumns, KvLayout, RopeFrequencies, Routing,
    SplitNorm,
};

/// A rotary embedding on the device.
pub struct CudaRope {}

impl CudaRope {
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        frequencies: RopeFrequencies,
    ) -> Result<Self, BackendError> {
        Ok(Self {})
    }
}

/// Kernels.
pub(super) struct Ropes {}

impl Ropes {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn rotate_and_store(
        &self,
        queue: &Queue,
        step: &StepInputs,
        (qkv, rope, shape): (&mut CudaBuffer, Option<&CudaRope>, &AttentionShape),
        (layer, cache): (usize, &mut CudaKvCache),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device {
            operation: "rotate_and_store".to_owned(),
            reason: "being written".to_owned(),
        })
    }
}
