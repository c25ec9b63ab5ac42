//! Products of 2 to 32 rows with a weight, on any GPU with bf16 tensor cores: `few_rows.cu`.

use std::sync::Arc;

use super::driver::{Context, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use crate::{BackendError, DType};

/// Rows of weights in a tile of a tensor core.
const TILE_ROWS: usize = 16;
const THREADS: u32 = 256;
/// Elements that are read as one.
const PIECE: usize = 8;

/// `FewRows` of few_rows.cu.
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
    rows: i32,
    out_type: i32,
    activation: i32,
}

impl Argument for Parameters {}

/// One instantiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Most rows of `x`.
    pub(super) tokens: usize,
    /// Tiles of [`TILE_ROWS`] rows of weights in a block.
    pub(super) tiles: usize,
}

/// Instantiations; a gated product has the gate and the up of a tile in a block.
const PLAIN: [Tiling; 6] = [
    Tiling { tokens: 8, tiles: 1 },
    Tiling { tokens: 8, tiles: 2 },
    Tiling { tokens: 16, tiles: 1 },
    Tiling { tokens: 16, tiles: 2 },
    Tiling { tokens: 32, tiles: 1 },
    Tiling { tokens: 32, tiles: 2 },
];
const GATED: [Tiling; 3] =
    [Tiling { tokens: 8, tiles: 2 }, Tiling { tokens: 16, tiles: 2 }, Tiling { tokens: 32, tiles: 2 }];

/// A kernel for bf16 and for f16.
type Kernels = Vec<(Tiling, Function, Function)>;

/// The kernels.
pub(super) struct FewRows {
    plain: Kernels,
    gated: Kernels,
}

impl FewRows {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "few_rows")?;
        let load = |name: &str, tilings: &[Tiling]| {
            let find = |tiling: Tiling, dtype: &str| {
                module.function(&format!("{name}_{}_{}_{dtype}", tiling.tokens, tiling.tiles))
            };
            let kernels =
                tilings.iter().map(|&tiling| Ok((tiling, find(tiling, "bf16")?, find(tiling, "f16")?)));
            kernels.collect::<Result<Kernels, BackendError>>()
        };
        Ok(Self { plain: load("few_rows", &PLAIN)?, gated: load("few_rows_gated", &GATED)? })
    }

    /// The instantiations that can compute a product: those for the fewest rows that are enough.
    pub(super) fn tilings(task: Task<'_>) -> impl Iterator<Item = Tiling> {
        let is_one = Self::accepts(task);
        let tokens = PLAIN.iter().map(|tiling| tiling.tokens).filter(|&tokens| tokens >= task.rows).min();
        PLAIN.into_iter().filter(move |tiling| is_one && Some(tiling.tokens) == tokens)
    }

    fn accepts(task: Task<'_>) -> bool {
        let weight = task.weight;
        task.rows > 1
            && weight.dtype != DType::F32
            && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
            && weight.in_features.is_multiple_of(PIECE)
    }

    /// `out = x weight^T (+ bias)`; false: this product is for others.
    pub(super) fn multiply(
        &self,
        queue: &Queue,
        tiling: Tiling,
        task: Task<'_>,
    ) -> Result<bool, BackendError> {
        let kernel = self.plain.iter().find(|(known, ..)| *known == tiling && Self::accepts(task));
        let Some(&kernel) = kernel else { return Ok(false) };
        let outputs = task.weight.out_features;
        launch(queue, kernel, task, (outputs, outputs.div_ceil(TILE_ROWS * tiling.tiles), 0))?;
        Ok(true)
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &self,
        queue: &Queue,
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        let kernel = self.gated.iter().find(|(tiling, ..)| tiling.tokens >= task.rows && Self::accepts(task));
        let Some(&kernel) = kernel else { return Ok(false) };
        let outputs = task.weight.out_features / 2;
        launch(queue, kernel, task, (outputs, outputs.div_ceil(TILE_ROWS), activation))?;
        Ok(true)
    }
}

fn launch(
    queue: &Queue,
    (_, bf16, f16): (Tiling, Function, Function),
    task: Task<'_>,
    (outputs, blocks, activation): (usize, usize, i32),
) -> Result<(), BackendError> {
    let weight = task.weight;
    let parameters = Parameters {
        weight: weight.ptr(),
        x: task.x,
        bias: task.bias,
        out: task.out,
        inputs: weight.in_features as i32,
        pitch: weight.row_stride as i32,
        outputs: outputs as i32,
        rows: task.rows as i32,
        out_type: out_type(task.out_dtype),
        activation,
    };
    let launch = Launch {
        function: if weight.dtype == DType::BF16 { bf16 } else { f16 },
        grid: [blocks as u32, 1, 1],
        block: THREADS,
        shared_bytes: 0,
    };
    queue.launch(&launch, args![parameters])
}
