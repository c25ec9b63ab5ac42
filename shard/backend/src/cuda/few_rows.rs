//! Products of 2 to 16 rows with a weight, on any GPU with bf16 tensor cores: `few_rows.cu`.

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

/// Most rows of the instantiations.
const TOKENS: [usize; 2] = [8, 16];

/// A kernel for bf16 and for f16.
type Kernels = Vec<(usize, Function, Function)>;

/// The kernels.
pub(super) struct FewRows {
    plain: Kernels,
    gated: Kernels,
}

impl FewRows {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "few_rows")?;
        let load = |name: &str| {
            let find = |tokens: usize, dtype: &str| module.function(&format!("{name}_{tokens}_1_{dtype}"));
            let kernels =
                TOKENS.into_iter().map(|tokens| Ok((tokens, find(tokens, "bf16")?, find(tokens, "f16")?)));
            kernels.collect::<Result<Kernels, BackendError>>()
        };
        Ok(Self { plain: load("few_rows")?, gated: load("few_rows_gated")? })
    }

    /// Whether a product is one of these.
    pub(super) fn accepts(task: Task<'_>) -> bool {
        let weight = task.weight;
        (2..=TOKENS[TOKENS.len() - 1]).contains(&task.rows)
            && weight.dtype != DType::F32
            && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
            && weight.in_features.is_multiple_of(PIECE)
    }

    /// `out = x weight^T (+ bias)`; false: this product is for others.
    pub(super) fn multiply(&self, queue: &Queue, task: Task<'_>) -> Result<bool, BackendError> {
        let Some(kernel) = kernel(&self.plain, task) else { return Ok(false) };
        launch(queue, kernel, task, (task.weight.out_features, 0))?;
        Ok(true)
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &self,
        queue: &Queue,
        task: Task<'_>,
        activation: i32,
    ) -> Result<bool, BackendError> {
        let Some(kernel) = kernel(&self.gated, task) else { return Ok(false) };
        launch(queue, kernel, task, (task.weight.out_features / 2, activation))?;
        Ok(true)
    }
}

/// The kernel for the fewest rows that are enough.
fn kernel(kernels: &Kernels, task: Task<'_>) -> Option<Function> {
    let (_, bf16, f16) =
        kernels.iter().find(|(tokens, ..)| *tokens >= task.rows && FewRows::accepts(task))?;
    Some(if task.weight.dtype == DType::BF16 { *bf16 } else { *f16 })
}

fn launch(
    queue: &Queue,
    function: Function,
    task: Task<'_>,
    (outputs, activation): (usize, i32),
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
        function,
        grid: [outputs.div_ceil(TILE_ROWS) as u32, 1, 1],
        block: THREADS,
        shared_bytes: 0,
    };
    queue.launch(&launch, args![parameters])
}
