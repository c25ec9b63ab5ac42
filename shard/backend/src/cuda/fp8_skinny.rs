//! Products of 5 to 64 rows with weights of eight bits: `fp8_skinny.cu`.

use std::sync::Arc;

use super::DeviceFacts;
use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::matmul::{Task, out_type};
use super::module::{Function, Module};
use crate::{BackendError, DType};

const THREADS: u32 = 256;
/// Rows of weights of a block's tile, half of which are ups of a gated product, and elements of a piece of them.
const TILE_ROWS: usize = 128;
const PIECE: usize = 128;
/// Threads that have a tile's sums.
const HOLDERS: usize = 128;
/// Shared tiles whose arrivals are counted at once.
const MAX_TILES: usize = 1 << 14;

/// `Fp8Skinny` of fp8_skinny.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    weight: DevicePtr,
    scales: DevicePtr,
    x: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    partials: DevicePtr,
    arrivals: DevicePtr,
    inputs: i32,
    pitch: i32,
    outputs: i32,
    rows: i32,
    out_type: i32,
    activation: i32,
}

impl Argument for Parameters {}

/// One instantiation.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// Most rows of `x`.
    tokens: usize,
    stages: usize,
}

const SHAPES: [Shape; 3] =
    [Shape { tokens: 16, stages: 4 }, Shape { tokens: 32, stages: 4 }, Shape { tokens: 64, stages: 4 }];

impl Shape {
    /// Sums that a thread holds.
    const fn sums(self) -> usize {
        self.tokens
    }

    const fn shared_bytes(self) -> usize {
        self.stages * (TILE_ROWS * PIECE + self.tokens * PIECE * 2) + self.sums() * HOLDERS * size_of::<f32>()
    }

    /// Bytes of partial sums of `blocks` blocks, each of which shares at most two tiles.
    const fn partial_bytes(self, blocks: usize) -> usize {
        blocks * 2 * self.sums() * HOLDERS * size_of::<f32>()
    }
}

/// Kernels of a shape, for bf16 and for f16.
struct Kernels {
    shape: Shape,
    plain: [Function; 2],
    gated: [Function; 2],
}

/// The kernels.
pub(super) struct Fp8Skinny {
    kernels: Vec<Kernels>,
    num_sms: usize,
    /// How many blocks have handed in their part of a tile: zero between products.
    arrivals: DeviceMemory,
}

impl Fp8Skinny {
    /// Loads those whose shared memory a block may have.
    pub(super) fn load(
        context: &Arc<Context>,
        facts: DeviceFacts,
        most_shared: usize,
    ) -> Result<Self, BackendError> {
        let module = Module::load(context, "fp8_skinny")?;
        let both = |name: &str, shape: Shape| {
            let find = |dtype: &str| {
                let function = module.function(&format!("{name}_{}_{dtype}", shape.tokens))?;
                function.allow_shared_memory(shape.shared_bytes() as u32)?;
                Ok::<_, BackendError>(function)
            };
            Ok::<_, BackendError>([find("bf16")?, find("f16")?])
        };
        let shapes = SHAPES.into_iter().filter(|shape| shape.shared_bytes() <= most_shared);
        let kernels = shapes.map(|shape| {
            let (plain, gated) = (both("fp8_skinny", shape)?, both("fp8_skinny_gated", shape)?);
            Ok(Kernels { shape, plain, gated })
        });
        Ok(Self {
            kernels: kernels.collect::<Result<_, BackendError>>()?,
            num_sms: facts.num_sms,
            arrivals: DeviceMemory::zeroed(
                context,
                MAX_TILES * size_of::<u32>(),
                "counters of shared tiles",
            )?,
        })
    }

    /// The instantiation for a product of that many rows.
    fn kernels(&self, task: Task<'_>, workspace: &DeviceMemory) -> Option<&Kernels> {
        let fits = |kernels: &&Kernels| {
            kernels.shape.tokens >= task.rows
                && kernels.shape.partial_bytes(self.num_sms) <= workspace.bytes()
                && task.weight.out_features.div_ceil(TILE_ROWS / 2) <= MAX_TILES
        };
        self.kernels.iter().find(fits).filter(|_| task.rows > 0)
    }

    /// Whether it computes a product of that many rows.
    pub(super) fn accepts(&self, task: Task<'_>, workspace: &DeviceMemory) -> bool {
        self.kernels(task, workspace).is_some()
    }

    /// `out = x weight^T (+ bias)`, or with an activation `activation(gate) * up` of the product's halves; false: this product is for
    /// others.
    pub(super) fn multiply(
        &self,
        queue: &Queue,
        workspace: &DeviceMemory,
        task: Task<'_>,
        activation: Option<i32>,
    ) -> Result<bool, BackendError> {
        let Some(kernels) = self.kernels(task, workspace) else { return Ok(false) };
        let weight = task.weight;
        let (functions, outputs, tile_rows) = match activation {
            Some(_) => (kernels.gated, weight.out_features / 2, TILE_ROWS / 2),
            None => (kernels.plain, weight.out_features, TILE_ROWS),
        };
        let pieces = outputs.div_ceil(tile_rows) * weight.in_features.div_ceil(PIECE);
        let parameters = Parameters {
            weight: weight.ptr(),
            scales: weight.scales().unwrap_or_default(),
            x: task.x,
            bias: task.bias,
            out: task.out,
            partials: workspace.ptr(),
            arrivals: self.arrivals.ptr(),
            inputs: weight.in_features as i32,
            pitch: weight.row_stride as i32,
            outputs: outputs as i32,
            rows: task.rows as i32,
            out_type: out_type(task.out_dtype),
            activation: activation.unwrap_or(0),
        };
        let launch = Launch {
            function: functions[usize::from(weight.dtype == DType::F16)],
            grid: [pieces.min(self.num_sms) as u32, 1, 1],
            block: THREADS,
            shared_bytes: kernels.shape.shared_bytes() as u32,
        };
        queue.launch(&launch, args![parameters])?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_few_rows_leaves_room_for_the_next_products() {
        // What the driver keeps of each block's, and the flag.
        assert!(SHAPES[..2].iter().all(|shape| 2 * (shape.shared_bytes() + 1024 + 128) <= 228 << 10));
        assert!(SHAPES.iter().all(|shape| shape.shared_bytes() <= 227 << 10));
        assert!(SHAPES.iter().all(|shape| shape.partial_bytes(132) <= super::super::WORKSPACE_BYTES));
    }
}
