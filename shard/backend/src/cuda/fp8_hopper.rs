//! Products of up to 32 rows with weights of eight bits, on Hopper: `fp8_hopper.cu`.

use std::cell::RefCell;
use std::sync::Arc;

use super::DeviceFacts;
use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use super::tensor_map::{Boxes, TensorMaps};
use crate::{BackendError, DType};

/// Rows of weights of one product, and warpgroups that multiply.
const BOX_ROWS: usize = 64;
const GROUPS: usize = 2;
/// Bytes of a row of a piece.
const PIECE: usize = 128;
/// Two warpgroups that multiply, one that rounds, and a warp that copies.
const THREADS: u32 = 128 * (GROUPS as u32 + 1) + 32;
/// Fewer blocks than these leave memory idle.
const ENOUGH_BLOCKS: usize = 128;

/// `Fp8Hopper` of fp8_hopper.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    x: DevicePtr,
    scales: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    inputs: i32,
    outputs: i32,
    rows: i32,
    out_type: i32,
    activation: i32,
}

impl Argument for Parameters {}

/// One instantiation: its numbers are those of `HOPPER_TYPES` in the kernel's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Most rows of `x`.
    pub(super) tokens: usize,
    /// Times 64 rows of weights a warpgroup.
    pub(super) boxes: usize,
    /// Blocks that share a tile.
    pub(super) cluster: usize,
    stages: usize,
}

/// Stages by the most rows of `x` and boxes.
const STAGES: [(usize, usize, usize); 2] = [(32, 1, 5), (32, 2, 3)];
const CLUSTERS: [usize; 3] = [1, 2, 4];

impl Shape {
    /// All of them, gated ones too: those have two boxes and a block a tile.
    fn all() -> impl Iterator<Item = Self> {
        let of = |(tokens, boxes, stages)| {
            CLUSTERS.into_iter().map(move |cluster| Self { tokens, boxes, cluster, stages })
        };
        STAGES.into_iter().flat_map(of)
    }

    const fn is_gated(self) -> bool {
        self.boxes == 2 && self.cluster == 1
    }

    /// The ring begins at a multiple of 1024.
    const fn shared_bytes(self) -> usize {
        self.stages * PIECE * (GROUPS * self.boxes * BOX_ROWS + self.tokens) + 1024
    }

    const fn blocks(self, rows: usize) -> usize {
        rows.div_ceil(GROUPS * self.boxes * BOX_ROWS) * self.cluster
    }
}

/// A kernel for bf16 and for f16.
struct Kernels {
    shape: Shape,
    plain: [Function; 2],
    gated: Option<[Function; 2]>,
}

/// The kernels.
pub(super) struct Fp8Hopper {
    kernels: Vec<Kernels>,
    maps: RefCell<TensorMaps>,
}

impl Fp8Hopper {
    /// Loads them; none where the GPU is no Hopper or the program has no kernels for it.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Option<Self>, BackendError> {
        if facts.capability != (9, 0) || !kernels::architectures().contains(&"sm_90a") {
            return Ok(None);
        }
        let module = Module::load(context, "fp8_hopper")?;
        let both = |name: &str, shape: Shape| {
            let find = |dtype: &str| {
                let Shape { tokens, boxes, cluster, .. } = shape;
                let function = module.function(&format!("{name}_{tokens}_{boxes}_{cluster}_{dtype}"))?;
                function.allow_shared_memory(shape.shared_bytes() as u32)?;
                Ok::<_, BackendError>(function)
            };
            Ok::<_, BackendError>([find("bf16")?, find("f16")?])
        };
        let kernels = Shape::all().map(|shape| {
            let plain = both("fp8_hopper", shape)?;
            let gated = shape.is_gated().then(|| both("fp8_hopper_gated", shape)).transpose()?;
            Ok(Kernels { shape, plain, gated })
        });
        Ok(Some(Self { kernels: kernels.collect::<Result<_, BackendError>>()?, maps: RefCell::default() }))
    }

    /// All instantiations that can compute as many rows, the one that is taken for a weight of `outputs` rows first.
    pub(super) fn shapes(rows: usize, outputs: usize) -> Vec<Shape> {
        let tokens = STAGES.map(|(tokens, ..)| tokens).into_iter().filter(|&tokens| tokens >= rows).min();
        let mut shapes: Vec<_> = Shape::all().filter(|shape| Some(shape.tokens) == tokens).collect();
        // Few blocks leave memory idle, large tiles read activations less often, and sharing a tile costs time.
        shapes.sort_by_key(|shape| {
            let missing = ENOUGH_BLOCKS.saturating_sub(shape.blocks(outputs));
            (missing, usize::MAX - shape.boxes, shape.cluster)
        });
        if rows == 0 { Vec::new() } else { shapes }
    }

    /// `out = x weight^T (+ bias)`.
    pub(super) fn multiply(&self, queue: &Queue, shape: Shape, task: Task<'_>) -> Result<(), BackendError> {
        let Some(kernels) = self.kernels.iter().find(|kernels| kernels.shape == shape) else { return Ok(()) };
        self.launch(queue, (kernels.plain, shape), task, (task.weight.out_features, 0))
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &self,
        queue: &Queue,
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        let fits = |kernels: &&Kernels| kernels.shape.tokens >= task.rows && kernels.gated.is_some();
        let Some(kernels) = self.kernels.iter().find(fits) else { return Ok(false) };
        let Some(functions) = kernels.gated else { return Ok(false) };
        self.launch(queue, (functions, kernels.shape), task, (task.weight.out_features / 2, activation))?;
        Ok(true)
    }

    fn launch(
        &self,
        queue: &Queue,
        (functions, shape): ([Function; 2], Shape),
        task: Task<'_>,
        (outputs, activation): (usize, i32),
    ) -> Result<(), BackendError> {
        let weight = task.weight;
        let map = self.maps.borrow_mut().of(Boxes {
            address: weight.ptr(),
            // Pairs of numbers.
            dtype: DType::BF16,
            rows: weight.out_features,
            columns: weight.in_features / 2,
            row_bytes: weight.row_stride,
            box_size: [BOX_ROWS, PIECE / 2],
        })?;
        let parameters = Parameters {
            x: task.x,
            scales: weight.scales().unwrap_or_default(),
            bias: task.bias,
            out: task.out,
            inputs: weight.in_features as i32,
            outputs: outputs as i32,
            rows: task.rows as i32,
            out_type: out_type(task.out_dtype),
            activation,
        };
        let launch = Launch {
            function: functions[usize::from(weight.dtype == DType::F16)],
            // Tiles of a gated product have as many rows of gates as of ups.
            grid: [shape.blocks(weight.out_features) as u32, 1, 1],
            block: THREADS,
            shared_bytes: shape.shared_bytes() as u32,
        };
        queue.launch(&launch, args![map, parameters])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_the_shared_memory_they_are_compiled_for() {
        for shape in Shape::all() {
            assert!(2 * (shape.shared_bytes() + 2560) <= 228 << 10, "{shape:?}");
        }
    }

    #[test]
    fn small_weights_are_shared_by_clusters() {
        let taken = |rows, outputs| {
            let shape = Fp8Hopper::shapes(rows, outputs)[0];
            (shape.tokens, shape.boxes, shape.cluster)
        };
        assert_eq!(taken(17, 57_344), (32, 2, 1));
        assert_eq!(taken(17, 28_672), (32, 2, 2));
        assert_eq!(taken(32, 6144), (32, 1, 4));
        assert_eq!(taken(1, 4096), (32, 1, 4));
        assert!(Fp8Hopper::shapes(33, 4096).is_empty() && Fp8Hopper::shapes(0, 4096).is_empty());
    }
}
