//! embedding.

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
pub(super) struct Embeddings {}

impl Embeddings {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, max_rows: usize) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn embed(
        &self,
        queue: &Queue,
        step: &StepInputs,
        table: &CudaLinear,
        first_id: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "embed".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn add_positions(
        &self,
        queue: &Queue,
        step: &StepInputs,
        table: &CudaLinear,
        offset: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device {
            operation: "add_positions".to_owned(),
            reason: "being written".to_owned(),
        })
    }

    /// See the operation of this name.
    pub(super) fn gather_rows(
        &mut self,
        queue: &Queue,
        x: &CudaBuffer,
        rows: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "gather_rows".to_owned(), reason: "being written".to_owned() })
    }
}
