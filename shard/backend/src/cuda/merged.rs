//! All layers of a decode step of a few sequences in one launch, on Hopper: `merged.cu`.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::kv_cache::PAGE_KEYS;
use super::launch::{Argument, Launch, Queue, args};
use super::module::{Function, Module};
use super::program::Program;
use super::step::{StepFacts, StepInputs};
use super::tensor_map::Boxes;
use super::{CudaOptions, DeviceFacts};
use crate::{BackendError, DType};

/// Numbers of sequences of the instantiations.
const ROWS: [usize; 2] = [1, 2];
const HEAD_DIMS: [usize; 2] = [64, 128];
/// Eight warps that multiply and one that copies.
const WARPS: usize = 8;
const THREADS: u32 = 32 * (WARPS as u32 + 1);
/// Columns of a piece of weights.
const PIECE: usize = 512;
/// Rows of half a piece, which is copied at once.
const HALF_ROWS: usize = 8;
/// Bytes of a place of the ring.
const STAGE_BYTES: usize = 2 * HALF_ROWS * 2 * PIECE;
/// The ring begins at a multiple of this.
const ALIGNMENT: usize = 1024;
const MOST_STAGES: usize = 32;
/// Weights of a layer, and bytes of a description of one.
const WEIGHTS: usize = 4;
const MAP_BYTES: usize = size_of::<sys::CUtensorMap>();
/// As many as warps, each of which has one.
const LEAST_STAGES: usize = WARPS;
/// Pieces on their way at most, and where more than [`LEVEL`] lie in the ring.
const IN_FLIGHT: i32 = 3;
const FEW_IN_FLIGHT: i32 = 1;
const LEVEL: i32 = 4;
/// What a row of activations takes in shared memory beside its elements.
const ROW_GAP: usize = 16;
/// Query heads of a KV head that the parts of attention have room for.
const PART_HEADS: usize = 8;
/// Most keys of all sequences together: the attention of more is quicker as a launch of its own (8B: one sequence of 8,192 gains
/// 0.12 ms, two lose 0.05).
const MOST_KEYS: usize = 12_288;

/// `Merged` of merged.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parameters {
    layers: DevicePtr,
    weights: DevicePtr,
    residual: DevicePtr,
    delta: DevicePtr,
    qkv: DevicePtr,
    heads: DevicePtr,
    activated: DevicePtr,
    header: DevicePtr,
    position_ids: DevicePtr,
    context_lens: DevicePtr,
    block_tables: DevicePtr,
    inv_freq: DevicePtr,
    part_sums: DevicePtr,
    part_weights: DevicePtr,
    finished: DevicePtr,
    squares: DevicePtr,
    arrived: DevicePtr,
    num_layers: i32,
    hidden: i32,
    inner: i32,
    num_heads: i32,
    num_kv_heads: i32,
    pages_per_block: i32,
    activation: i32,
    attention_scale: f32,
    eps: f32,
    rope_scale: f32,
    x_bytes: i32,
    stages: i32,
    in_flight: i32,
    few_in_flight: i32,
    level: i32,
}

impl Argument for Parameters {}

/// Which instantiation.
type Key = (usize, usize, DType);

/// How shared memory is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    x_bytes: usize,
    stages: usize,
}

impl Room {
    /// Of `most` bytes for `rows` sequences; none: the ring would be too small.
    fn of(program: &Program, rows: usize, most: usize) -> Option<Self> {
        let heads = program.heads;
        let row_bytes = |width: usize| rows * (2 * width + ROW_GAP);
        let group = heads.num_heads / heads.num_kv_heads;
        let parts = WARPS * group * (heads.head_dim + 4) * size_of::<f32>();
        let widest = program.hidden.max(heads.num_heads * heads.head_dim).max(program.inner);
        let x_bytes = row_bytes(widest).max(parts).next_multiple_of(128);
        let stages = (most.checked_sub(x_bytes + ALIGNMENT)? / STAGE_BYTES).min(MOST_STAGES);
        (stages >= LEAST_STAGES).then_some(Self { x_bytes, stages })
    }

    fn bytes(self) -> usize {
        self.x_bytes + ALIGNMENT + self.stages * STAGE_BYTES
    }
}

/// A kernel, and the shared memory that is its own.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    function: Function,
    most_shared: usize,
}

/// The kernels, and what they need.
pub(super) struct MergedSteps {
    kernels: HashMap<Key, Kernel>,
    num_sms: usize,
    /// Parts of heads, their weights, counters of them, sums of squares and the counters of meetings; the counters are zero between
    /// launches.
    scratch: DeviceMemory,
    /// Programs that recordings refer to: descriptions of their weights, then the rest of their layers.
    programs: Vec<DeviceMemory>,
}

/// Offsets in the scratch memory.
#[derive(Debug, Clone, Copy)]
struct Layout {
    part_weights: usize,
    finished: usize,
    squares: usize,
    arrived: usize,
    end: usize,
}

impl Layout {
    fn new(num_sms: usize) -> Self {
        let rows = 2 * num_sms * PART_HEADS;
        let part_weights = rows * HEAD_DIMS[1] * size_of::<f32>();
        let finished = part_weights + rows * 2 * size_of::<f32>();
        let squares = finished + (num_sms * size_of::<i32>()).next_multiple_of(128);
        let arrived = squares + (2 * 8 * num_sms * size_of::<f32>()).next_multiple_of(128);
        Self { part_weights, finished, squares, arrived, end: arrived + 128 }
    }
}

impl MergedSteps {
    /// Loads them; none where the GPU is no Hopper, the program has no kernels for it, or results may not depend on the batch.
    pub(super) fn load(
        context: &Arc<Context>,
        facts: DeviceFacts,
        options: &CudaOptions,
    ) -> Result<Option<Self>, BackendError> {
        let is_hopper = facts.capability == (9, 0) && kernels::architectures().contains(&"sm_90a");
        if !is_hopper || options.is_deterministic || !options.merges_steps {
            return Ok(None);
        }
        let most = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let most = usize::try_from(most).unwrap_or(0);
        let module = Module::load(context, "merged")?;
        let mut kernels = HashMap::new();
        for (dtype, name) in [(DType::BF16, "bf16"), (DType::F16, "f16")] {
            for head_dim in HEAD_DIMS {
                for rows in ROWS {
                    let function = module.function(&format!("merged_{head_dim}_{rows}_{name}"))?;
                    let most_shared = most.saturating_sub(function.static_shared_memory()?);
                    function.allow_shared_memory(most_shared as u32)?;
                    kernels.insert((rows, head_dim, dtype), Kernel { function, most_shared });
                }
            }
        }
        let bytes = Layout::new(facts.num_sms).end;
        Ok(Some(Self {
            kernels,
            num_sms: facts.num_sms,
            scratch: DeviceMemory::zeroed(context, bytes, "merged steps")?,
            programs: Vec::new(),
        }))
    }

    /// Whether a program of `rows` sequences is one launch.
    pub(super) fn accepts(&self, program: &Program, rows: usize) -> bool {
        self.room(program, rows).is_some()
    }

    /// Whether a step's contexts are short enough.
    pub(super) fn takes(facts: &StepFacts) -> bool {
        facts.num_seqs * facts.max_context <= MOST_KEYS
    }

    /// Lets go of what recordings that are gone referred to.
    pub(super) fn clear(&mut self) {
        self.programs.clear();
    }

    fn room(&self, program: &Program, rows: usize) -> Option<(Kernel, Room)> {
        let kernel = *self.kernels.get(&(rows, program.heads.head_dim, program.dtype))?;
        Some((kernel, Room::of(program, rows, kernel.most_shared)?))
    }

    /// Puts a program on the device.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn upload(
        &mut self,
        context: &Arc<Context>,
        queue: &Queue,
        program: &Program,
    ) -> Result<(), BackendError> {
        let mut bytes = Vec::new();
        for layer in &program.layers {
            for (&weight, [rows, columns]) in layer.weights.iter().zip(program.weight_sizes()) {
                let boxes = Boxes {
                    address: weight,
                    dtype: program.dtype,
                    rows,
                    columns,
                    row_bytes: 2 * columns,
                    box_size: [HALF_ROWS, PIECE],
                };
                bytes.extend(boxes.map_of_blocks()?.opaque.iter().flat_map(|word| word.to_ne_bytes()));
            }
        }
        for layer in &program.layers {
            bytes.extend_from_slice(bytemuck::cast_slice(&layer.rest));
        }
        let memory = DeviceMemory::new(context, bytes.len(), "a merged step")?;
        queue.stream().upload(memory.ptr(), &bytes)?;
        self.programs.push(memory);
        Ok(())
    }

    /// Launches the program that was uploaded last. All of its blocks run at the same time: the driver refuses it otherwise.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn launch(
        &self,
        queue: &Queue,
        step: &StepInputs,
        program: &Program,
    ) -> Result<(), BackendError> {
        let rows = step.facts().num_seqs;
        let (Some((kernel, room)), Some(layers)) = (self.room(program, rows), self.programs.last()) else {
            return Ok(());
        };
        let layout = Layout::new(self.num_sms);
        let at = |offset: usize| self.scratch.ptr() + offset as DevicePtr;
        let parameters = Parameters {
            layers: layers.ptr() + (program.layers.len() * WEIGHTS * MAP_BYTES) as DevicePtr,
            weights: layers.ptr(),
            residual: program.residual,
            delta: program.delta,
            qkv: program.qkv,
            heads: program.mixed,
            activated: program.activated,
            header: step.header(),
            position_ids: step.position_ids(),
            context_lens: step.context_lens(),
            block_tables: step.block_tables(),
            inv_freq: program.rope.inv_freq,
            part_sums: at(0),
            part_weights: at(layout.part_weights),
            finished: at(layout.finished),
            squares: at(layout.squares),
            arrived: at(layout.arrived),
            num_layers: program.layers.len() as i32,
            hidden: program.hidden as i32,
            inner: program.inner as i32,
            num_heads: program.heads.num_heads as i32,
            num_kv_heads: program.heads.num_kv_heads as i32,
            pages_per_block: (program.heads.block_size / PAGE_KEYS) as i32,
            activation: program.activation,
            attention_scale: program.attention_scale,
            eps: program.eps,
            rope_scale: program.rope.scale,
            x_bytes: room.x_bytes as i32,
            stages: room.stages as i32,
            in_flight: IN_FLIGHT,
            few_in_flight: FEW_IN_FLIGHT,
            level: LEVEL,
        };
        let launch = Launch {
            function: kernel.function,
            grid: [self.num_sms as u32, 1, 1],
            block: THREADS,
            shared_bytes: room.bytes() as u32,
        };
        queue.launch_cooperative(&launch, args![parameters])
    }
}
