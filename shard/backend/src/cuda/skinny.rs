//! Products of a few rows with a large weight, on Hopper: `skinny_gemm.cu`.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DeviceMemory};
use super::launch::{Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use super::tensor_map::Boxes;
use super::{CudaLinear, DeviceFacts};
use crate::{BackendError, DType};

/// Rows of weights that a warpgroup computes, and elements of a row in one bulk copy.
const BOX_ROWS: usize = 64;
const BOX_COLUMNS: usize = 64;
/// Shared tiles whose arrivals are counted at once.
const MAX_TILES: usize = 1 << 16;
/// Descriptions of matrices that are kept.
const MAX_MAPS: usize = 1 << 14;

/// One instantiation: its numbers are those of `SKINNY_TYPES` in the kernel's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Most rows of `x`.
    pub(super) tokens: usize,
    /// Warpgroups that compute.
    pub(super) groups: usize,
    /// Boxes of [`BOX_COLUMNS`] in a stage.
    boxes: usize,
    stages: usize,
}

/// Instantiations with gate and up side by side in a block.
const GATED: [Shape; 2] = [
    Shape { tokens: 32, groups: 2, boxes: 1, stages: 5 },
    Shape { tokens: 64, groups: 2, boxes: 1, stages: 4 },
];

/// All others.
const SHAPES: [Shape; 2] = [
    Shape { tokens: 32, groups: 1, boxes: 2, stages: 4 },
    Shape { tokens: 64, groups: 1, boxes: 1, stages: 6 },
];

impl Shape {
    fn threads(self) -> u32 {
        (self.groups * 128 + 32) as u32
    }

    fn shared_bytes(self) -> u32 {
        let row_bytes = BOX_COLUMNS * 2;
        let stage = self.boxes * row_bytes * (BOX_ROWS * self.groups + self.tokens);
        // The ring begins at a multiple of 1024.
        (self.stages * stage + 1024) as u32
    }

    /// The same of a gated product, where one half of a tile is left in shared memory for the other.
    fn gated_shared_bytes(self) -> u32 {
        self.shared_bytes() + (BOX_ROWS * self.tokens * 2) as u32
    }

    /// Pieces that blocks share, with tiles of `tile_rows` rows of weights.
    fn pieces(self, rows: usize, tile_rows: usize, inputs: usize) -> usize {
        rows.div_ceil(tile_rows) * inputs.div_ceil(BOX_COLUMNS * self.boxes)
    }

    /// Bytes of partial sums of `blocks` blocks, each of which shares at most two tiles.
    fn partial_bytes(self, blocks: usize) -> usize {
        blocks * 2 * self.groups * BOX_ROWS * self.tokens * size_of::<f32>()
    }
}

/// The kernels.
pub(super) struct Skinny {
    /// For bf16 and for f16.
    plain: Vec<(Shape, Function, Function)>,
    gated: Vec<(Shape, Function, Function)>,
    num_sms: usize,
    /// How many blocks have handed in their part of a tile: zero between products.
    arrivals: DeviceMemory,
    maps: HashMap<Boxes, sys::CUtensorMap>,
}

impl Skinny {
    /// Loads them; none where the GPU is no Hopper or the program has no kernels for it.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Option<Self>, BackendError> {
        if facts.capability != (9, 0) || !kernels::architectures().contains(&"sm_90a") {
            return Ok(None);
        }
        let module = Module::load(context, "skinny_gemm")?;
        let load = |name: &str, shapes: &[Shape], bytes: fn(Shape) -> u32| {
            let find = |shape: Shape, dtype: &str| -> Result<Function, BackendError> {
                let function =
                    module.function(&format!("{name}_{}_{}_{dtype}", shape.tokens, shape.groups))?;
                function.allow_shared_memory(bytes(shape))?;
                Ok(function)
            };
            shapes
                .iter()
                .map(|&shape| Ok((shape, find(shape, "bf16")?, find(shape, "f16")?)))
                .collect::<Result<Vec<_>, BackendError>>()
        };
        let plain = load("skinny", &SHAPES, Shape::shared_bytes)?;
        let gated = load("skinny_gated", &GATED, Shape::gated_shared_bytes)?;
        let arrivals = DeviceMemory::zeroed(context, MAX_TILES * 4, "counters of shared tiles")?;
        Ok(Some(Self { plain, gated, num_sms: facts.num_sms, arrivals, maps: HashMap::new() }))
    }

    /// The instantiations that can compute `rows` rows: those for the fewest rows that are enough.
    pub(super) fn shapes(rows: usize) -> impl Iterator<Item = Shape> {
        let tokens = SHAPES.iter().map(|shape| shape.tokens).filter(|&tokens| tokens >= rows).min();
        SHAPES.into_iter().filter(move |shape| Some(shape.tokens) == tokens)
    }

    /// Whether a product can be computed so: 16-bit elements, rows that bulk copies can take, room for partial sums.
    pub(super) fn accepts(&self, shape: Shape, weight: &CudaLinear, workspace: &DeviceMemory) -> bool {
        weight.dtype != DType::F32
            && weight.in_features.is_multiple_of(8)
            && weight.out_features.div_ceil(BOX_ROWS) + shape.groups <= MAX_TILES
            && shape.partial_bytes(self.num_sms) <= workspace.bytes()
    }

    /// `out = x weight^T (+ bias)`.
    pub(super) fn multiply(
        &mut self,
        queue: &Queue,
        workspace: &DeviceMemory,
        shape: Shape,
        task: Task<'_>,
    ) -> Result<(), BackendError> {
        let Some(&kernel) = self.plain.iter().find(|(known, ..)| *known == shape) else {
            return Ok(());
        };
        let outputs = task.weight.out_features;
        let launch = Launch {
            function: Self::of_type(kernel, task.weight.dtype),
            grid: [
                self.blocks(shape.pieces(outputs, BOX_ROWS * shape.groups, task.weight.in_features)),
                1,
                1,
            ],
            block: shape.threads(),
            shared_bytes: shape.shared_bytes(),
        };
        self.launch((queue, workspace), &launch, (shape, outputs, 0), task)
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &mut self,
        queue: &Queue,
        workspace: &DeviceMemory,
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        let kernel = self.gated.iter().find(|(shape, ..)| shape.tokens >= task.rows);
        let Some(&kernel) = kernel.filter(|(shape, ..)| self.accepts(*shape, task.weight, workspace)) else {
            return Ok(false);
        };
        let (shape, outputs) = (kernel.0, task.weight.out_features / 2);
        let launch = Launch {
            function: Self::of_type(kernel, task.weight.dtype),
            grid: [self.blocks(shape.pieces(outputs, BOX_ROWS, task.weight.in_features)), 1, 1],
            block: shape.threads(),
            shared_bytes: shape.gated_shared_bytes(),
        };
        self.launch((queue, workspace), &launch, (shape, outputs, activation), task)?;
        Ok(true)
    }

    fn of_type((_, bf16, f16): (Shape, Function, Function), dtype: DType) -> Function {
        if dtype == DType::BF16 { bf16 } else { f16 }
    }

    /// One a multiprocessor, as far as there is work for it.
    fn blocks(&self, pieces: usize) -> u32 {
        pieces.min(self.num_sms) as u32
    }

    fn launch(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        launch: &Launch,
        (shape, outputs, activation): (Shape, usize, i32),
        task: Task<'_>,
    ) -> Result<(), BackendError> {
        let Task { x, weight, bias, out, rows, out_dtype } = task;
        let inputs = weight.in_features;
        let weights = self.map(Boxes {
            address: weight.ptr(),
            dtype: weight.dtype,
            rows: weight.out_features,
            columns: inputs,
            row_bytes: weight.row_stride * 2,
            box_size: [BOX_ROWS, BOX_COLUMNS],
        })?;
        let activations = self.map(Boxes {
            address: x,
            dtype: weight.dtype,
            rows,
            columns: inputs,
            row_bytes: inputs * 2,
            box_size: [shape.tokens, BOX_COLUMNS],
        })?;
        let (partials, arrivals) = (workspace.ptr(), self.arrivals.ptr());
        let (rows, outputs, inputs) = (rows as i32, outputs as i32, inputs as i32);
        let kind = out_type(out_dtype);
        let parameters = args![
            weights,
            activations,
            out,
            bias,
            partials,
            arrivals,
            rows,
            outputs,
            inputs,
            kind,
            activation
        ];
        queue.launch(launch, parameters)
    }

    /// The description of a matrix of 16-bit elements, which the copy engine needs.
    fn map(&mut self, key: Boxes) -> Result<sys::CUtensorMap, BackendError> {
        if let Some(map) = self.maps.get(&key) {
            return Ok(*map);
        }
        if self.maps.len() >= MAX_MAPS {
            self.maps.clear();
        }
        let map = key.map()?;
        self.maps.insert(key, map);
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_leaves_room_for_the_next_products() {
        for shape in SHAPES {
            assert!(2 * (shape.shared_bytes() + 2048) <= 227 << 10, "{shape:?}");
        }
        for shape in GATED {
            assert!(2 * (shape.gated_shared_bytes() + 2048) <= 227 << 10, "{shape:?}");
        }
    }

    #[test]
    fn rows_take_the_smallest_shape_that_holds_them() {
        let tokens = |rows| Skinny::shapes(rows).map(|shape| shape.tokens).next();
        assert_eq!(tokens(1), Some(32));
        assert_eq!(tokens(32), Some(32));
        assert_eq!(tokens(33), Some(64));
        assert_eq!(tokens(65), None);
    }

    #[test]
    fn partial_sums_fit_the_workspace() {
        for shape in SHAPES.into_iter().chain(GATED) {
            assert!(shape.partial_bytes(132) <= super::super::WORKSPACE_BYTES, "{shape:?}");
        }
    }
}
