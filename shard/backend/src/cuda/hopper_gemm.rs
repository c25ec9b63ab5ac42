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

/// Rows of `x` of a block's tile.
const TILE_ROWS: usize = 128;
/// Elements of a row in one bulk copy, 128 bytes.
const BOX_COLUMNS: usize = 64;
const BOX_ROW_BYTES: usize = 128;
/// Rows of the result that a warp stores at once, and warps that do.
const OUT_BOX_ROWS: usize = 16;
const OUT_WARPS: usize = 8;
/// A warpgroup that copies and two that multiply.
const THREADS: u32 = 128 + 32 * OUT_WARPS as u32;
/// Fewer rows are for others, unless a row's bits must not depend on how many there are.
const LEAST_ROWS: usize = 256;
/// The share of all tiles' elements that has to be there.
const FULL: f64 = 0.9;
/// Tiles of rows, of all blocks of a cluster each, whose tiles of weights follow one another.
const GROUP: i32 = 8;

/// An instantiation: its numbers are those of `HOPPER_GEMM_TYPES` in the kernel's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Rows of weights of a tile.
    columns: usize,
    /// Blocks that copy weights for one another.
    cluster: usize,
    stages: usize,
}

const WIDE: Shape = Shape { columns: 256, cluster: 2, stages: 4 };
const NARROW: Shape = Shape { columns: 64, cluster: 1, stages: 8 };
const NARROW_GATED: Shape = Shape { columns: 128, cluster: 1, stages: 6 };

impl Shape {
    /// The ring, two boxes of the result for each warp, and what aligning them takes.
    const fn shared_bytes(self) -> usize {
        let ring = self.stages * (TILE_ROWS + self.columns) * BOX_ROW_BYTES;
        ring + OUT_WARPS * 2 * OUT_BOX_ROWS * BOX_ROW_BYTES + 1024
    }

    /// Tiles of a product's clusters.
    fn tiles(self, rows: usize, weight_rows: usize) -> usize {
        rows.div_ceil(self.cluster * TILE_ROWS) * weight_rows.div_ceil(self.columns)
    }
}

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
    box_rows: i32,
}

impl Argument for Parameters {}

/// A kernel for bf16 and for f16.
struct Kernels {
    shape: Shape,
    functions: [Function; 2],
}

/// The kernels: for many rows, and with smaller tiles for fewer.
pub(super) struct HopperGemms {
    plain: [Kernels; 2],
    gated: [Kernels; 2],
    add: [Kernels; 2],
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
        let load = |name: &str, shape: Shape| {
            let find = |dtype: &str| {
                let function = module.function(&format!("hopper_gemm_{name}_{}_{dtype}", shape.columns))?;
                function.allow_shared_memory(shape.shared_bytes() as u32)?;
                Ok::<_, BackendError>(function)
            };
            Ok::<_, BackendError>(Kernels { shape, functions: [find("bf16")?, find("f16")?] })
        };
        Ok(Some(Self {
            plain: [load("plain", WIDE)?, load("plain", NARROW)?],
            gated: [load("gated", WIDE)?, load("gated", NARROW_GATED)?],
            add: [load("add", WIDE)?, load("add", NARROW)?],
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

    /// Whether nothing else computes it quicker, by what products and whole steps took (`shard/kernels/README.md`): where tiles
    /// are full and leave few multiprocessors without one at the end. Of long rows of weights the library is as quick, with the
    /// sum left to the next norm.
    pub(super) fn is_quickest(&self, task: Task<'_>) -> bool {
        let CudaLinear { out_features, in_features, .. } = *task.weight;
        let blocks = WIDE.tiles(task.rows, out_features) * WIDE.cluster;
        let room = blocks.next_multiple_of(self.num_sms) * TILE_ROWS * WIDE.columns;
        let is_full = (task.rows * out_features) as f64 >= FULL * room as f64;
        task.rows >= LEAST_ROWS && is_full && in_features < 2 * out_features
    }

    /// `out = x weight^T (+ bias)`, `activation(gate) * up` of the halves of that, or `out += x weight^T (+ bias)`. Only what it
    /// [`accepts`](HopperGemms::accepts). A row of the result has the same bits whatever the number of rows.
    pub(super) fn multiply(&mut self, queue: &Queue, task: Task<'_>, end: End) -> Result<(), BackendError> {
        let weight = task.weight;
        let [wide, narrow] = match end {
            End::Store => &self.plain,
            End::Gate(_) => &self.gated,
            End::Add => &self.add,
        };
        // Of smaller tiles each takes longer for what it computes, but more multiprocessors have one.
        let blocks = wide.shape.tiles(task.rows, weight.out_features) * wide.shape.cluster;
        let is_wide = 4 * blocks >= 3 * self.num_sms;
        let Kernels { shape, functions } = if is_wide { wide } else { narrow };
        let shape = *shape;
        let clusters = shape.tiles(task.rows, weight.out_features).min(self.num_sms / shape.cluster);
        let launch = Launch {
            function: functions[usize::from(weight.dtype != DType::BF16)],
            grid: [(shape.cluster * clusters) as u32, 1, 1],
            block: THREADS,
            shared_bytes: shape.shared_bytes() as u32,
        };
        let outputs = outputs(weight, end);
        let [weights, x, out] = self.maps_of(shape, task, outputs)?;
        let parameters = Parameters {
            bias: task.bias,
            rows: task.rows as i32,
            inputs: weight.in_features as i32,
            outputs: outputs as i32,
            group: GROUP,
            activation: if let End::Gate(activation) = end { activation } else { 0 },
            box_rows: box_rows(task.rows) as i32,
        };
        queue.launch_clusters(&launch, shape.cluster as u32, args![weights, x, out, parameters])
    }

    /// The descriptions of weights, activations and result.
    fn maps_of(
        &mut self,
        shape: Shape,
        task: Task<'_>,
        outputs: usize,
    ) -> Result<[sys::CUtensorMap; 3], BackendError> {
        let CudaLinear { dtype, out_features, in_features, row_stride, .. } = *task.weight;
        let weights = Boxes {
            address: task.weight.ptr(),
            dtype,
            rows: out_features,
            columns: in_features,
            row_bytes: row_stride * 2,
            box_size: [shape.columns / 2, BOX_COLUMNS],
        };
        let x = Boxes {
            address: task.x,
            dtype,
            rows: task.rows,
            columns: in_features,
            row_bytes: in_features * 2,
            box_size: [box_rows(task.rows), BOX_COLUMNS],
        };
        let size = task.out_dtype.size_bytes();
        let out = Boxes {
            address: task.out,
            dtype: task.out_dtype,
            rows: task.rows,
            columns: outputs,
            row_bytes: outputs * size,
            box_size: [OUT_BOX_ROWS, BOX_ROW_BYTES / size],
        };
        Ok([self.maps.of(weights)?, self.maps.of(x)?, self.maps.of(out)?])
    }
}

/// Rows of a box of `x`, of which chunks are exchanged within eight: of few rows not all of a tile's, as the copy of rows that are
/// not there takes longer than of those that are.
fn box_rows(rows: usize) -> usize {
    rows.next_multiple_of(8).min(TILE_ROWS)
}

/// Columns of the result.
fn outputs(weight: &CudaLinear, end: End) -> usize {
    if matches!(end, End::Gate(_)) { weight.out_features / 2 } else { weight.out_features }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_room_on_a_multiprocessor() {
        for shape in [WIDE, NARROW, NARROW_GATED] {
            // What a block may ask for; barriers take 16 bytes a stage.
            assert!(shape.shared_bytes() + 16 * shape.stages <= 227 << 10, "{shape:?}");
            // Halves of the weights' rows are boxes, which keep the exchange of chunks and have 256 rows at most.
            assert!((shape.columns / 2).is_multiple_of(8) && shape.columns / 2 <= 256, "{shape:?}");
        }
    }

    #[test]
    fn tiles_cover_a_product() {
        assert_eq!(WIDE.tiles(4096, 6144), 16 * 24);
        assert_eq!(WIDE.tiles(257, 4104), 2 * 17);
        assert_eq!(NARROW.tiles(1, 4096), 64);
        // A tile of a gated product has as many gates as ups.
        assert_eq!(NARROW_GATED.tiles(129, 28_672), 2 * 224);
        assert_eq!([1, 8, 9, 128, 4096].map(box_rows), [8, 8, 16, 128, 128]);
    }
}
