//! Products of the many rows of prompts on Hopper, with what follows done to their sums: `hopper_gemm.cu`.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::Task;
use super::module::{Function, Module};
use super::tensor_map::{Boxes, TensorMaps};
use super::{CudaLinear, DeviceFacts};
use crate::{BackendError, DType};

/// Rows of `x` and of weights of a block's tile.
const TILE: [usize; 2] = [128, 256];
/// Blocks that copy weights for one another.
const CLUSTER: usize = 2;
/// Elements of a row in one bulk copy, 128 bytes.
const BOX_COLUMNS: usize = 64;
/// Rows of the result that a warp stores at once, and bytes of each.
const OUT_BOX_ROWS: usize = 16;
const OUT_BOX_ROW_BYTES: usize = 128;
/// A warpgroup that copies and two that multiply.
const THREADS: u32 = 384;
const STAGES: usize = 4;
/// Fewer rows are for others.
const LEAST_ROWS: usize = 512;
/// Pairs of tiles of rows whose tiles of weights follow one another.
const GROUP: i32 = 8;
/// The ring, two boxes of the result for each of eight warps, and what aligning them takes.
const SHARED_BYTES: usize =
    STAGES * (TILE[0] + TILE[1]) * 128 + 8 * 2 * OUT_BOX_ROWS * OUT_BOX_ROW_BYTES + 1024;

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// They are rounded and stored.
    Store,
    /// `activation(gate) * up` of their halves is, with this number of an activation.
    Gate(i32),
    /// They are added to a float32 matrix.
    Add,
}

/// `HopperGemm` of hopper_gemm.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    bias: DevicePtr,
    rows: i32,
    inputs: i32,
    outputs: i32,
    group: i32,
    activation: i32,
}

impl Argument for Parameters {}

/// The kernels, for bf16 and for f16.
pub(super) struct HopperGemms {
    plain: [Function; 2],
    gated: [Function; 2],
    add: [Function; 2],
    num_sms: usize,
    maps: TensorMaps,
}

impl HopperGemms {
    /// Loads them; none where the GPU is no Hopper or the program has no kernels for it.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Option<Self>, BackendError> {
        if facts.capability != (9, 0) || !kernels::architectures().contains(&"sm_90a") {
            return Ok(None);
        }
        let module = Module::load(context, "hopper_gemm")?;
        let both = |name: &str| {
            let find = |dtype: &str| {
                let function = module.function(&format!("hopper_gemm_{name}_{dtype}"))?;
                function.allow_shared_memory(SHARED_BYTES as u32)?;
                Ok::<_, BackendError>(function)
            };
            Ok::<_, BackendError>([find("bf16")?, find("f16")?])
        };
        Ok(Some(Self {
            plain: both("plain")?,
            gated: both("gated")?,
            add: both("add")?,
            num_sms: facts.num_sms,
            maps: TensorMaps::default(),
        }))
    }

    /// Whether it can be computed so: 16-bit elements in rows that bulk copies can take.
    pub(super) fn accepts(task: Task<'_>, end: End) -> bool {
        let weight = task.weight;
        let out_dtype = if end == End::Add { DType::F32 } else { weight.dtype };
        weight.dtype != DType::F32
            && weight.scales().is_none()
            && task.out_dtype == out_dtype
            && weight.in_features.is_multiple_of(8)
            && outputs(weight, end).is_multiple_of(8)
            && task.rows > 0
    }

    /// Whether nothing else computes it quicker, by what products and whole steps took: `shard/kernels/README.md`.
    pub(super) fn is_quickest(task: Task<'_>, end: End) -> bool {
        let outputs = outputs(task.weight, end);
        task.rows >= LEAST_ROWS && outputs >= TILE[1]
    }

    /// `out = x weight^T (+ bias)`, `activation(gate) * up` of the halves of that, or `out += x weight^T (+ bias)`. Only what it
    /// [`accepts`](HopperGemms::accepts).
    pub(super) fn multiply(&mut self, queue: &Queue, task: Task<'_>, end: End) -> Result<(), BackendError> {
        let weight = task.weight;
        let functions = match end {
            End::Store => self.plain,
            End::Gate(_) => self.gated,
            End::Add => self.add,
        };
        let outputs = outputs(weight, end);
        let tile_outputs = if matches!(end, End::Gate(_)) { TILE[1] / 2 } else { TILE[1] };
        let pairs = task.rows.div_ceil(CLUSTER * TILE[0]) * outputs.div_ceil(tile_outputs);
        let launch = Launch {
            function: functions[usize::from(weight.dtype != DType::BF16)],
            grid: [(CLUSTER * pairs.min(self.num_sms / CLUSTER)) as u32, 1, 1],
            block: THREADS,
            shared_bytes: SHARED_BYTES as u32,
        };
        let [weights, x, out] = self.maps_of(task, outputs)?;
        let parameters = Parameters {
            bias: task.bias,
            rows: task.rows as i32,
            inputs: weight.in_features as i32,
            outputs: outputs as i32,
            group: GROUP,
            activation: if let End::Gate(activation) = end { activation } else { 0 },
        };
        queue.launch_clusters(&launch, CLUSTER as u32, args![weights, x, out, parameters])
    }

    /// The descriptions of weights, activations and result.
    fn maps_of(&mut self, task: Task<'_>, outputs: usize) -> Result<[sys::CUtensorMap; 3], BackendError> {
        let CudaLinear { dtype, out_features, in_features, row_stride, .. } = *task.weight;
        let weights = Boxes {
            address: task.weight.ptr(),
            dtype,
            rows: out_features,
            columns: in_features,
            row_bytes: row_stride * 2,
            box_size: [TILE[1] / 2, BOX_COLUMNS],
        };
        let x = Boxes {
            address: task.x,
            dtype,
            rows: task.rows,
            columns: in_features,
            row_bytes: in_features * 2,
            box_size: [TILE[0], BOX_COLUMNS],
        };
        let size = task.out_dtype.size_bytes();
        let out = Boxes {
            address: task.out,
            dtype: task.out_dtype,
            rows: task.rows,
            columns: outputs,
            row_bytes: outputs * size,
            box_size: [OUT_BOX_ROWS, OUT_BOX_ROW_BYTES / size],
        };
        Ok([self.maps.of(weights)?, self.maps.of(x)?, self.maps.of(out)?])
    }
}

/// Columns of the result.
fn outputs(weight: &CudaLinear, end: End) -> usize {
    if matches!(end, End::Gate(_)) { weight.out_features / 2 } else { weight.out_features }
}
