//! Products with few rows of activations, which only read the weights.

use std::sync::Arc;

use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::Task;
use super::module::{Function, Module};
use super::{CudaBuffer, CudaLinear, CudaVector};
use crate::{BackendError, DType};

/// Most rows: with more, tensor cores are quicker.
const MAX_ROWS: usize = 4;
/// Outputs of a block, one a warp.
const OUTPUTS: usize = 8;
const THREADS: u32 = 256;
/// Elements that are read as one.
const PIECE: usize = 8;
/// Shared memory that every GPU with bf16 products grants a block, for the activations.
const MAX_SHARED_BYTES: u32 = 96 << 10;

/// `Gemv` of gemv.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    weight: DevicePtr,
    x: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    inputs: i32,
    pitch: i32,
    outputs: i32,
}

impl Argument for Parameters {}

/// Kernels of one number of rows and one element type.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    to_same: Function,
    to_f32: Function,
    gated: Function,
}

/// Kernels.
pub(super) struct Gemvs {
    bf16: Vec<Kernels>,
    f16: Vec<Kernels>,
}

impl Gemvs {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "gemv")?;
        let function = |name: String| {
            let function = module.function(&name)?;
            function.allow_shared_memory(MAX_SHARED_BYTES)?;
            Ok::<_, BackendError>(function)
        };
        let of_type = |dtype: &str| {
            (1..=MAX_ROWS)
                .map(|rows| {
                    Ok(Kernels {
                        to_same: function(format!("gemv_{rows}_{dtype}_{dtype}"))?,
                        to_f32: function(format!("gemv_{rows}_{dtype}_f32"))?,
                        gated: function(format!("gemv_gated_{rows}_{dtype}"))?,
                    })
                })
                .collect::<Result<Vec<_>, BackendError>>()
        };
        Ok(Self { bf16: of_type("bf16")?, f16: of_type("f16")? })
    }

    /// Kernels for a product, where it is one of these.
    fn kernels(&self, x: &CudaBuffer, weight: &CudaLinear) -> Option<Kernels> {
        let shared_bytes = x.rows() * x.width() * x.dtype().size_bytes();
        let fits = (1..=MAX_ROWS).contains(&x.rows())
            && x.dtype() == weight.dtype
            && weight.in_features.is_multiple_of(PIECE)
            && shared_bytes <= MAX_SHARED_BYTES as usize;
        let kernels = match weight.dtype {
            DType::BF16 => &self.bf16,
            DType::F16 => &self.f16,
            DType::F32 => return None,
        };
        fits.then(|| kernels[x.rows() - 1])
    }

    /// Whether a product is one of these.
    pub(super) fn accepts(&self, task: Task<'_>) -> bool {
        let weight = task.weight;
        let shared_bytes = task.rows * weight.in_features * weight.dtype.size_bytes();
        (1..=MAX_ROWS).contains(&task.rows)
            && weight.dtype != DType::F32
            && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
            && weight.in_features.is_multiple_of(PIECE)
            && shared_bytes <= MAX_SHARED_BYTES as usize
    }

    /// `out = x weight^T (+ bias)`; false: this product is for others.
    pub(super) fn multiply(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<bool, BackendError> {
        let Some(kernels) = self.kernels(x, weight) else { return Ok(false) };
        let function = match out.dtype() {
            DType::F32 => kernels.to_f32,
            same if same == x.dtype() => kernels.to_same,
            _ => return Ok(false),
        };
        let parameters = parameters(x, (weight, bias), out, weight.out_features);
        queue.launch(&launch(function, x, weight.out_features), args![parameters])?;
        Ok(true)
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        activation: i32,
        out: &CudaBuffer,
    ) -> Result<bool, BackendError> {
        let Some(kernels) = self.kernels(x, weight).filter(|_| out.dtype() == x.dtype()) else {
            return Ok(false);
        };
        let outputs = weight.out_features / 2;
        let parameters = parameters(x, (weight, bias), out, outputs);
        queue.launch(&launch(kernels.gated, x, outputs), args![parameters, activation])?;
        Ok(true)
    }
}

fn parameters(
    x: &CudaBuffer,
    (weight, bias): (&CudaLinear, Option<&CudaVector>),
    out: &CudaBuffer,
    outputs: usize,
) -> Parameters {
    Parameters {
        weight: weight.ptr(),
        x: x.ptr(),
        bias: bias.map_or(0, CudaVector::ptr),
        out: out.ptr(),
        inputs: weight.in_features as i32,
        pitch: weight.row_stride as i32,
        outputs: outputs as i32,
    }
}

fn launch(function: Function, x: &CudaBuffer, outputs: usize) -> Launch {
    Launch {
        function,
        grid: [outputs.div_ceil(OUTPUTS) as u32, 1, 1],
        block: THREADS,
        shared_bytes: (x.rows() * x.width() * x.dtype().size_bytes()) as u32,
    }
}
