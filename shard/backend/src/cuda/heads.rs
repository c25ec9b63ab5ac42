//! heads.

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
pub(super) struct Heads {}

impl Heads {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        Ok(Self {})
    }

    /// See the operation of this name.
    pub(super) fn matmul(
        &self,
        queue: &Queue,
        (x, x_columns): (&CudaBuffer, HeadColumns),
        weights: &[CudaLinear],
        (out, out_columns): (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "matmul".to_owned(), reason: "being written".to_owned() })
    }

    /// See the operation of this name.
    pub(super) fn copy(
        &self,
        queue: &Queue,
        (x, x_columns): (&CudaBuffer, HeadColumns),
        num_heads: usize,
        (out, out_columns): (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        Err(BackendError::Device { operation: "copy".to_owned(), reason: "being written".to_owned() })
    }
}
