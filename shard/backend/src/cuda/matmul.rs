//! Matrix products: which kernel computes which, and what is beside it.

use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::elementwise::activation_number;
use super::few_rows::FewRows;
use super::fp8_matmul::{Fp8Kernel, Fp8Matmuls};
use super::gemv::Gemvs;
use super::launch::Queue;
use super::library::Library;
use super::module::Module;
use super::shared_split::REGISTER_ROWS;
use super::skinny::{Shape, Skinny};
use super::{CudaBackend, CudaBuffer, CudaLinear, CudaOptions, CudaVector, DeviceFacts};
use crate::{Activation, BackendError, DType};

/// Most rows for which a warp an output is quicker than tensor cores.
const GEMV_ROWS: usize = 4;
/// Elements of a weight from which on reading it takes longer than putting shared tiles together.
const LARGE: usize = 50_000_000;
/// Elements of a weight that only the logits' matrix of a large vocabulary has.
const HUGE: usize = 1 << 27;
/// Most rows for which gate, up and activation of a large weight are one launch on Hopper.
const GATED_SKINNY_ROWS: usize = 32;

/// A way to compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulKernel {
    /// cuBLASLt.
    Library,
    /// A warp an output, for up to four rows of activations.
    Gemv,
    /// Weights read into the operands of tensor cores, for up to 32 rows of activations.
    FewRows,
    /// Weights streamed through tensor cores, for few rows of activations; Hopper only.
    Skinny {
        /// Rows it is made for.
        tokens: usize,
        /// Warpgroups a block, each of which takes 64 rows of the weights.
        groups: usize,
    },
    /// With weights of eight bits.
    Fp8(Fp8Kernel),
}

/// A product whose weights and activations have the same type.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) x: DevicePtr,
    pub(super) weight: &'a CudaLinear,
    /// Zero: none.
    pub(super) bias: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) rows: usize,
    pub(super) out_dtype: DType,
}

/// `OutType` of the kernels.
pub(super) fn out_type(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    }
}

/// Kernels and library.
pub(super) struct Matmuls {
    pub(super) library: Library,
    skinny: Option<Skinny>,
    gemvs: Gemvs,
    few_rows: FewRows,
    pub(super) fp8: Fp8Matmuls,
}

impl Matmuls {
    /// Loads them.
    pub(super) fn load(
        context: &Arc<Context>,
        facts: DeviceFacts,
        options: &CudaOptions,
    ) -> Result<Self, BackendError> {
        let module = Module::load(context, "matmul")?;
        Ok(Self {
            library: Library::load(&module, options)?,
            skinny: Skinny::load(context, facts)?,
            gemvs: Gemvs::load(context)?,
            few_rows: FewRows::load(context)?,
            fp8: Fp8Matmuls::load(context, facts)?,
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
        if queue.is_dry() || x.rows() == 0 {
            return Ok(());
        }
        if weight.scales().is_some() {
            let kernel = self.fp8.choose(task(x, (weight, bias), out), x.dtype(), workspace);
            let tools = (queue, workspace, self.library.blaslt());
            return self.fp8.multiply(tools, kernel, (x, weight, bias), out);
        }
        if x.dtype() != weight.dtype || self.library.is_deterministic() {
            return self.library.multiply(queue, workspace, x, (weight, bias), out);
        }
        let kernel = self.choose(task(x, (weight, bias), out), workspace);
        self.multiply((queue, workspace), kernel, (x, weight, bias), out)
    }

    /// `out = activation(gate) * up` with gate and up the halves of `x weight^T (+ bias)`, where that is one launch; false: it is
    /// not.
    pub(super) fn gated(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
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
        if self.library.is_deterministic() {
            return Ok(false);
        }
        let activation = activation_number(activation);
        if weight.scales().is_some() {
            return self.fp8.multiply_gated((queue, workspace), x, (weight, bias), activation, out);
        }
        if x.rows() > GEMV_ROWS && x.dtype() == weight.dtype && out.dtype() == weight.dtype {
            let task = task(x, (weight, bias), out);
            return self.gated_by_tensor_cores((queue, workspace), task, activation);
        }
        self.gemvs.multiply_gated(queue, x, (weight, bias), activation, out)
    }

    fn gated_by_tensor_cores(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        if queue.is_dry() {
            return Ok(true);
        }
        let is_large = task.weight.out_features * task.weight.in_features >= LARGE;
        match &mut self.skinny {
            _ if task.rows <= REGISTER_ROWS => self.few_rows.multiply_gated(queue, task, activation),
            Some(skinny) if is_large && task.rows <= GATED_SKINNY_ROWS => {
                skinny.multiply_gated(queue, workspace, task, activation)
            }
            _ => Ok(false),
        }
    }

    /// The kernel for a product, by what whole steps took (`step_bench`) and products alone (`cuda_kernels matmul`). Both
    /// tables are in `shard/kernels/README.md`.
    fn choose(&self, task: Task<'_>, workspace: &DeviceMemory) -> MatmulKernel {
        if task.rows <= GEMV_ROWS && self.gemvs.accepts(task) {
            return MatmulKernel::Gemv;
        }
        if FewRows::accepts(task) && task.rows <= REGISTER_ROWS {
            return MatmulKernel::FewRows;
        }
        if task.weight.out_features * task.weight.in_features < HUGE {
            return MatmulKernel::Library;
        }
        let mut skinny = self.skinny_kernels(task, workspace);
        skinny.next().filter(|_| task.rows <= 64).unwrap_or(MatmulKernel::Library)
    }

    /// All that can compute it.
    fn kernels(&self, task: Task<'_>, workspace: &DeviceMemory) -> Vec<MatmulKernel> {
        let gemv = self.gemvs.accepts(task).then_some(MatmulKernel::Gemv);
        let few_rows = FewRows::accepts(task).then_some(MatmulKernel::FewRows);
        let skinny = self.skinny_kernels(task, workspace);
        gemv.into_iter().chain(few_rows).chain(skinny).chain([MatmulKernel::Library]).collect()
    }

    fn skinny_kernels(&self, task: Task<'_>, workspace: &DeviceMemory) -> impl Iterator<Item = MatmulKernel> {
        let shapes = Skinny::shapes(task.rows).filter(move |&shape| {
            self.skinny.as_ref().is_some_and(|skinny| skinny.accepts(shape, task.weight, workspace))
        });
        shapes.map(|Shape { tokens, groups, .. }| MatmulKernel::Skinny { tokens, groups })
    }

    fn multiply(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        kernel: MatmulKernel,
        (x, weight, bias): (&CudaBuffer, &CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        let task = task(x, (weight, bias), out);
        match (kernel, &mut self.skinny) {
            (MatmulKernel::Fp8(kernel), _) => {
                let tools = (queue, workspace, self.library.blaslt());
                self.fp8.multiply(tools, kernel, (x, weight, bias), out)
            }
            (MatmulKernel::Skinny { tokens, groups }, Some(skinny)) => {
                let shape =
                    Skinny::shapes(task.rows).find(|shape| shape.tokens == tokens && shape.groups == groups);
                shape.map_or(Ok(()), |shape| skinny.multiply(queue, workspace, shape, task))
            }
            (MatmulKernel::FewRows, _) => self.few_rows.multiply(queue, task).map(|_| ()),
            (MatmulKernel::Gemv, _) => self.gemvs.multiply(queue, x, (weight, bias), out).map(|_| ()),
            _ => self.library.multiply(queue, workspace, x, (weight, bias), out),
        }
    }
}

pub(super) fn task<'a>(
    x: &CudaBuffer,
    (weight, bias): (&'a CudaLinear, Option<&CudaVector>),
    out: &CudaBuffer,
) -> Task<'a> {
    if let Some(bias) = bias {
        let outputs = weight.out_features;
        assert!(bias.width == outputs, "a bias of {} for {outputs} columns", bias.width);
    }
    Task {
        x: x.ptr(),
        weight,
        bias: bias.map_or(0, CudaVector::ptr),
        out: out.ptr(),
        rows: x.rows(),
        out_dtype: out.dtype(),
    }
}

impl CudaBackend {
    /// The kernels that can compute `x weight^T` into `out`, to compare them: what [`crate::Backend::matmul`] takes comes
    /// first.
    pub fn matmul_kernels(&self, x: &CudaBuffer, weight: &CudaLinear, out: &CudaBuffer) -> Vec<MatmulKernel> {
        if weight.scales().is_some() {
            let fp8 = &self.matmuls.fp8;
            let task = task(x, (weight, None), out);
            let chosen = fp8.choose(task, x.dtype(), &self.workspace);
            let mut kernels = fp8.kernels(task, x.dtype(), &self.workspace);
            kernels.sort_by_key(|&kernel| kernel != chosen);
            return kernels.into_iter().map(MatmulKernel::Fp8).collect();
        }
        if x.dtype() != weight.dtype {
            return Vec::new();
        }
        let task = task(x, (weight, None), out);
        let chosen = self.matmuls.choose(task, &self.workspace);
        let mut kernels = self.matmuls.kernels(task, &self.workspace);
        kernels.sort_by_key(|&kernel| kernel != chosen);
        kernels
    }

    /// `out = x weight^T (+ bias)` by one of [`CudaBackend::matmul_kernels`].
    ///
    /// # Errors
    /// The device's.
    pub fn matmul_with(
        &mut self,
        kernel: MatmulKernel,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        out.resize(x.rows());
        if self.queue.is_dry() {
            return Ok(());
        }
        self.matmuls.multiply((&self.queue, &self.workspace), kernel, (x, weight, bias), out)
    }
}
