//! Matrix products: which kernel computes which, and what is beside it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::cluster_gemm::{ClusterGemms, ClusterPlan};
use super::driver::{Context, DeviceMemory, DevicePtr};
use super::elementwise::activation_number;
use super::few_rows::FewRows;
use super::fp8_matmul::{Fp8Kernel, Fp8Matmuls};
use super::gemv::Gemvs;
use super::hopper_gemm::{End, HopperGemms};
use super::launch::Queue;
use super::library::Library;
use super::linear::NextWeight;
use super::module::Module;
use super::shared_split::REGISTER_ROWS;
use super::{CudaBackend, CudaBuffer, CudaLinear, CudaOptions, CudaVector, DeviceFacts};
use crate::{Activation, BackendError, DType};

/// Most rows for which a warp an output is quicker than tensor cores.
const GEMV_ROWS: usize = 4;
/// Rows for which clusters of blocks are quicker than all others, on Hopper.
const CLUSTER_ROWS: RangeInclusive<usize> = 9..=64;
/// Elements of a weight from which on they also compute gate, up and activation in one launch.
const LARGE: usize = 50_000_000;

/// A way to compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatmulKernel {
    /// cuBLASLt.
    Library,
    /// A warp an output, for up to four rows of activations.
    Gemv,
    /// Weights read into the operands of tensor cores, for up to 16 rows of activations.
    FewRows,
    /// Weights streamed through tensor cores by clusters of blocks, for up to 128 rows of activations; Hopper only.
    Cluster(ClusterPlan),
    /// Tiles of many rows by warpgroups; Hopper only.
    Hopper,
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
    clusters: Option<ClusterGemms>,
    hoppers: Option<HopperGemms>,
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
            clusters: ClusterGemms::load(context, facts)?,
            hoppers: HopperGemms::load(context, facts)?,
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
        if x.dtype() != weight.dtype {
            return self.library.multiply(queue, workspace, x, (weight, bias), out);
        }
        let kernel = self.choose(task(x, (weight, bias), out));
        self.multiply((queue, workspace), kernel, (x, weight, bias), out)
    }

    /// Whether a result of as many rows is rounded to eight bits before it is multiplied with this weight.
    pub(super) fn rounds(&self, rows: usize, next: &NextWeight, dtype: DType) -> bool {
        !self.library.is_deterministic() && self.fp8.rounds(rows, next, dtype)
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
        let activation = activation_number(activation);
        let is_one_type = x.dtype() == weight.dtype && out.dtype() == weight.dtype;
        if self.library.is_deterministic() {
            let task = task(x, (weight, bias), out);
            return if is_one_type { self.by_hopper(queue, task, End::Gate(activation)) } else { Ok(false) };
        }
        if weight.scales().is_some() {
            return self.fp8.multiply_gated((queue, workspace), x, (weight, bias), activation, out);
        }
        if x.rows() > GEMV_ROWS && is_one_type {
            let task = task(x, (weight, bias), out);
            return self.gated_by_tensor_cores(queue, task, activation);
        }
        self.gemvs.multiply_gated(queue, x, (weight, bias), activation, out)
    }

    fn gated_by_tensor_cores(
        &mut self,
        queue: &Queue,
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        if queue.is_dry() {
            return Ok(true);
        }
        let elements = task.weight.out_features * task.weight.in_features;
        if CLUSTER_ROWS.contains(&task.rows)
            && elements >= LARGE
            && let Some(clusters) = &mut self.clusters
            && let Some(plan) = clusters.plan(task, true)
        {
            return clusters.multiply(queue, plan, task, Some(activation)).map(|()| true);
        }
        if task.rows > REGISTER_ROWS {
            return self.by_hopper(queue, task, End::Gate(activation));
        }
        self.few_rows.multiply_gated(queue, task, activation)
    }

    /// `out += x weight^T (+ bias)` where that is one launch and quicker; false: it is not.
    pub(super) fn add(
        &mut self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<bool, BackendError> {
        assert!(
            x.width() == weight.in_features
                && out.width() == weight.out_features
                && out.rows() == x.rows()
                && out.dtype() == DType::F32,
            "a product of {} rows of {} with {} x {} added to {} rows of {} of {}",
            x.rows(),
            x.width(),
            weight.out_features,
            weight.in_features,
            out.rows(),
            out.width(),
            out.dtype()
        );
        if x.dtype() != weight.dtype {
            return Ok(false);
        }
        self.by_hopper(queue, task(x, (weight, bias), out), End::Add)
    }

    /// By the kernels for many rows where they are taken; false: they are not.
    fn by_hopper(&mut self, queue: &Queue, task: Task<'_>, end: End) -> Result<bool, BackendError> {
        let is_taken = self.takes_hopper(task, end);
        match &mut self.hoppers {
            Some(hoppers) if is_taken && !queue.is_dry() => hoppers.multiply(queue, task, end).map(|()| true),
            _ => Ok(is_taken),
        }
    }

    /// Whether the kernels for many rows compute a product: where they are the quickest, and wherever they can where a row's bits
    /// must not depend on the number of rows.
    fn takes_hopper(&self, task: Task<'_>, end: End) -> bool {
        let Some(hoppers) = &self.hoppers else { return false };
        let is_wanted = self.library.is_deterministic() || hoppers.is_quickest(task);
        is_wanted && HopperGemms::accepts(task, end)
    }

    /// The kernel for a product, by what whole steps took (`step_bench`) and products alone (`cuda_kernels matmul`). Both
    /// tables are in `shard/kernels/README.md`.
    fn choose(&self, task: Task<'_>) -> MatmulKernel {
        if self.takes_hopper(task, End::Store) {
            return MatmulKernel::Hopper;
        }
        if self.library.is_deterministic() {
            return MatmulKernel::Library;
        }
        if task.rows <= GEMV_ROWS && self.gemvs.accepts(task) {
            return MatmulKernel::Gemv;
        }
        let cluster = self.cluster(task).filter(|&(_, is_at_once)| {
            let is_long = task.weight.in_features >= 2 * task.weight.out_features;
            CLUSTER_ROWS.contains(&task.rows) || task.rows > *CLUSTER_ROWS.end() && is_at_once && is_long
        });
        let cluster = cluster.map(|(plan, _)| MatmulKernel::Cluster(plan));
        let few_rows = FewRows::accepts(task) && task.rows <= REGISTER_ROWS;
        let few_rows = few_rows.then_some(MatmulKernel::FewRows);
        cluster.or(few_rows).unwrap_or(MatmulKernel::Library)
    }

    /// All that can compute it.
    fn kernels(&self, task: Task<'_>) -> Vec<MatmulKernel> {
        let gemv = self.gemvs.accepts(task).then_some(MatmulKernel::Gemv);
        let few_rows = FewRows::accepts(task).then_some(MatmulKernel::FewRows);
        let cluster = self.cluster(task).map(|(plan, _)| MatmulKernel::Cluster(plan));
        let is_hopper = self.hoppers.is_some() && HopperGemms::accepts(task, End::Store);
        let hopper = is_hopper.then_some(MatmulKernel::Hopper);
        let own = [gemv, few_rows, cluster, hopper].into_iter().flatten();
        own.chain([MatmulKernel::Library]).collect()
    }

    /// How clusters of blocks compute it, and whether all blocks run at once.
    fn cluster(&self, task: Task<'_>) -> Option<(ClusterPlan, bool)> {
        let clusters = self.clusters.as_ref()?;
        let plan = clusters.plan(task, false)?;
        Some((plan, clusters.is_at_once(plan, task.weight.out_features)))
    }

    fn multiply(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        kernel: MatmulKernel,
        (x, weight, bias): (&CudaBuffer, &CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        let task = task(x, (weight, bias), out);
        match (kernel, &mut self.clusters) {
            (MatmulKernel::Hopper, _) => {
                let hoppers = self.hoppers.as_mut();
                hoppers.map_or(Ok(()), |hoppers| hoppers.multiply(queue, task, End::Store))
            }
            (MatmulKernel::Fp8(kernel), _) => {
                let tools = (queue, workspace, self.library.blaslt());
                self.fp8.multiply(tools, kernel, (x, weight, bias), out)
            }
            (MatmulKernel::Cluster(plan), Some(clusters)) => clusters.multiply(queue, plan, task, None),
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
        let chosen = self.matmuls.choose(task);
        let mut kernels = self.matmuls.kernels(task);
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
