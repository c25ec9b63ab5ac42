//! Matrix products.

use std::sync::Arc;

use super::cublaslt::{CublasLt, Operands, Product, WORKSPACE_BYTES};
use super::driver::{Context, DeviceMemory};
use super::elementwise::activation_number;
use super::gemv::Gemvs;
use super::launch::{Launch, Queue, args};
use super::module::{ByType, ByTypes, Module};
use super::{CudaBuffer, CudaLinear, CudaVector, DeviceFacts};
use crate::{Activation, BackendError, DType};

const THREADS: u32 = 256;

/// From the activations' type to the weight's.
const CONVERSIONS: [(DType, DType); 4] = [
    (DType::F32, DType::BF16),
    (DType::F32, DType::F16),
    (DType::BF16, DType::F32),
    (DType::F16, DType::F32),
];

/// Kernels and library.
pub(super) struct Matmuls {
    library: CublasLt,
    gemvs: Gemvs,
    add_bias: ByType,
    convert: ByTypes,
}

impl Matmuls {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, _facts: DeviceFacts) -> Result<Self, BackendError> {
        let module = Module::load(context, "matmul")?;
        Ok(Self {
            library: CublasLt::open()?,
            gemvs: Gemvs::load(context)?,
            add_bias: module.by_type("add_bias")?,
            convert: module.by_types("convert", &CONVERSIONS)?,
        })
    }

    /// `out = x weight^T (+ bias)`.
    pub(super) fn matmul(
        &mut self,
        queue: &Queue,
        workspace: &DeviceMemory,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        assert!(
            x.width() == weight.in_features && out.width() == weight.out_features,
            "a product of {} columns with {} x {} to {}",
            x.width(),
            weight.out_features,
            weight.in_features,
            out.width()
        );
        out.resize(x.rows());
        let rows = x.rows();
        if queue.is_dry() || rows == 0 {
            return Ok(());
        }
        if self.gemvs.multiply(queue, x, (weight, bias), out)? {
            return Ok(());
        }
        let product = Product {
            rows,
            outputs: weight.out_features,
            inputs: weight.in_features,
            weight_stride: weight.row_stride,
            dtype: weight.dtype,
            out_dtype: out.dtype(),
        };
        let operands = Operands { x: x.ptr(), weight: weight.ptr(), out: out.ptr() };
        if x.dtype() == weight.dtype {
            self.library.multiply(queue.stream(), workspace.ptr(), product, operands)?;
        } else {
            self.multiply_converted(queue, workspace, x, (product, operands))?;
        }
        match bias {
            Some(bias) => self.add_bias(queue, bias, out),
            None => Ok(()),
        }
    }

    /// `out = activation(gate) * up` with gate and up the halves of `x weight^T (+ bias)`, where that is one launch; false: it is
    /// not.
    pub(super) fn gated(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        activation: Activation,
        out: &mut CudaBuffer,
    ) -> Result<bool, BackendError> {
        assert!(
            x.width() == weight.in_features && 2 * out.width() == weight.out_features,
            "a gated product of {} columns with {} x {} to {}",
            x.width(),
            weight.out_features,
            weight.in_features,
            out.width()
        );
        out.resize(x.rows());
        self.gemvs.multiply_gated(queue, x, (weight, bias), activation_number(activation), out)
    }

    /// A product of activations of another type than the weight's: a router's weight is float32, and so is the residual stream,
    /// which some families multiply as it is. They are converted at the end of the workspace, some rows at a time.
    fn multiply_converted(
        &mut self,
        queue: &Queue,
        workspace: &DeviceMemory,
        x: &CudaBuffer,
        (product, operands): (Product, Operands),
    ) -> Result<(), BackendError> {
        let function = self.convert.of(x.dtype(), product.dtype)?;
        let row_bytes = product.inputs * product.dtype.size_bytes();
        let rows_at_once = ((workspace.bytes() - WORKSPACE_BYTES) / row_bytes).max(1);
        for first in (0..product.rows).step_by(rows_at_once) {
            let rows = rows_at_once.min(product.rows - first);
            let from = x.ptr() + (first * product.inputs * x.dtype().size_bytes()) as u64;
            let (converted, count) =
                (workspace.ptr() + WORKSPACE_BYTES as u64, (rows * product.inputs) as i64);
            let blocks = (count as usize).div_ceil(THREADS as usize).min(4096) as u32;
            let launch = Launch { function, grid: [blocks, 1, 1], block: THREADS, shared_bytes: 0 };
            queue.launch(&launch, args![from, converted, count])?;
            let out = operands.out + (first * product.outputs * product.out_dtype.size_bytes()) as u64;
            let operands = Operands { x: converted, out, ..operands };
            let product = Product { rows, ..product };
            self.library.multiply(queue.stream(), workspace.ptr(), product, operands)?;
        }
        Ok(())
    }

    fn add_bias(&self, queue: &Queue, bias: &CudaVector, out: &CudaBuffer) -> Result<(), BackendError> {
        assert!(bias.width == out.width(), "a bias of {} for {} columns", bias.width, out.width());
        let (to, from, rows, width) = (out.ptr(), bias.ptr(), out.rows() as i32, out.width() as i32);
        let launch = Launch {
            function: self.add_bias.of(out.dtype()),
            grid: [(out.width() as u32).div_ceil(THREADS), (out.rows() as u32).min(1024), 1],
            block: THREADS,
            shared_bytes: 0,
        };
        queue.launch(&launch, args![to, from, rows, width])
    }
}
