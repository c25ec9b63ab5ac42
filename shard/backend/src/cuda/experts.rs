//! Mixtures of experts.
//!
//! What was chosen is sorted by expert on the device, so that nothing waits for the host. For a few tokens each expert's weights
//! are streamed once for each token that chose it; for more, tiles of tokens are multiplied with tiles of weights.

use std::cell::RefCell;
use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::elementwise::{activation_number, check_type};
use super::launch::{Argument, Launch, Queue, args};
use super::module::{ByType, Function, Module, tensor_tile_bytes, warpgroup_tile_bytes};
use super::upload::Uploader;
use super::{CudaBuffer, CudaLinear, CudaVector, DeviceFacts};
use crate::{Activation, BackendError, DType, GroupRank, RouterScores, Routing, WeightNormalization};

/// Steps of at most so many tokens may stream weights for each of them.
const FEW_ROWS: usize = 16;
const THREADS: u32 = 256;
/// Warps of a block, each of which computes a column when weights are streamed.
const WARPS: usize = THREADS as usize / 32;
/// Bytes of results that wait to be added up; longer steps are computed in several parts.
const SCRATCH_BYTES: usize = 512 << 20;
/// Arrays of the scratch begin at multiples of this many bytes.
const ALIGNMENT: usize = 256;
const TILE_BYTES: usize = 20;
/// What alignment adds to all of them together, at most.
const PADDING: usize = 6 * ALIGNMENT;

/// Feed-forward layers of equal sizes on the device.
pub struct CudaExperts {
    projections: Vec<(CudaLinear, CudaLinear)>,
    /// `[experts]`: addresses of each one's gate and up, and of each one's down.
    addresses: [DeviceMemory; 2],
    activation: Activation,
    hidden: usize,
    width: usize,
    dtype: DType,
}

impl CudaExperts {
    /// Takes each expert's gate and up as one, and its down.
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        projections: Vec<(CudaLinear, CudaLinear)>,
        activation: Activation,
    ) -> Result<Self, BackendError> {
        let shape = |linear: &CudaLinear| (linear.out_features, linear.in_features);
        let sizes = projections.first().map(|(gate_up, down)| (shape(gate_up), shape(down), gate_up.dtype));
        let is_equal = |(gate_up, down): &(CudaLinear, CudaLinear)| {
            Some((shape(gate_up), shape(down), gate_up.dtype)) == sizes && down.dtype == gate_up.dtype
        };
        let fits = |&(gate_up, down, _): &((usize, usize), (usize, usize), DType)| {
            gate_up.0 == 2 * down.1 && gate_up.1 == down.0
        };
        let Some((_, (hidden, width), dtype)) =
            sizes.filter(fits).filter(|_| projections.iter().all(is_equal))
        else {
            return Err(BackendError::Device {
                operation: "making a mixture of experts".to_owned(),
                reason: format!(
                    "{} experts of {sizes:?}, expected at least one, all of one shape and type, whose gate and up are twice \
                     as wide as what their down takes",
                    projections.len()
                ),
            });
        };
        let upload = |addresses: Vec<DevicePtr>| -> Result<DeviceMemory, BackendError> {
            let bytes = bytemuck::cast_slice(&addresses);
            let memory = DeviceMemory::new(context, bytes.len(), "addresses of experts")?;
            uploader.bytes(bytes, memory.ptr())?;
            Ok(memory)
        };
        let addresses = [
            upload(projections.iter().map(|(gate_up, _)| gate_up.ptr()).collect())?,
            upload(projections.iter().map(|(_, down)| down.ptr()).collect())?,
        ];
        Ok(Self { projections, addresses, activation, hidden, width, dtype })
    }

    fn len(&self) -> usize {
        self.projections.len()
    }

    /// Elements from one row to the next of gate and up, and of down.
    fn pitches(&self) -> [i32; 2] {
        self.projections
            .first()
            .map_or([0; 2], |(gate_up, down)| [gate_up, down].map(|w| w.row_stride as i32))
    }

    /// Bytes of work for a token and one of its experts.
    fn scratch_bytes_a_pair(&self) -> usize {
        12 + TILE_BYTES + (self.width + self.hidden) * self.dtype.size_bytes()
    }

    /// Where the arrays of `rows` tokens with `chosen` experts each begin.
    fn scratch(&self, rows: usize, chosen: usize) -> Scratch {
        let pairs = rows * chosen;
        let mut end = 0;
        let mut array = |bytes: usize| {
            let at = end;
            end += bytes.next_multiple_of(ALIGNMENT);
            at
        };
        Scratch {
            experts: array(4 * pairs),
            weights: array(4 * pairs),
            slots: array(4 * pairs),
            tiles: array(TILE_BYTES * pairs),
            activated: array(pairs * self.width * self.dtype.size_bytes()),
            products: array(pairs * self.hidden * self.dtype.size_bytes()),
        }
    }
}

/// Offsets of arrays in bytes.
#[derive(Debug, Clone, Copy)]
struct Scratch {
    experts: usize,
    weights: usize,
    slots: usize,
    tiles: usize,
    activated: usize,
    products: usize,
}

/// How experts are chosen, as `experts.cu` has it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Rule {
    num_experts: i32,
    num_chosen: i32,
    scores: i32,
    num_groups: i32,
    chosen_groups: i32,
    ranks_by_two: i32,
    normalization: i32,
    jitter: f32,
    power: f32,
    scale: f32,
}
impl Argument for Rule {}

impl Rule {
    fn new(routing: &Routing, num_experts: usize) -> Self {
        let (scores, jitter) = match routing.scores {
            RouterScores::Softmax => (0, 0.0),
            RouterScores::Sigmoid => (1, 0.0),
            RouterScores::SparseMixer { jitter } => (2, jitter),
        };
        let (normalization, power) = match routing.normalization {
            WeightNormalization::None => (0, 1.0),
            WeightNormalization::Sum => (1, 1.0),
            WeightNormalization::Norm(power) => (2, power),
        };
        let groups = routing.groups;
        Self {
            num_experts: num_experts as i32,
            num_chosen: routing.num_chosen as i32,
            scores,
            num_groups: groups.map_or(0, |groups| groups.count as i32),
            chosen_groups: groups.map_or(0, |groups| groups.num_chosen as i32),
            ranks_by_two: groups.map_or(0, |groups| i32::from(groups.rank == GroupRank::LargestTwo)),
            normalization,
            jitter,
            power,
            scale: routing.scale,
        }
    }

    /// Shared memory of the kernel that chooses.
    fn shared_bytes(&self) -> u32 {
        (self.num_experts * 13 + self.num_chosen * 8) as u32
    }
}

/// The two projections in tiles.
#[derive(Debug, Clone, Copy)]
struct Tiled {
    project_in: Function,
    project_out: Function,
    /// Tokens of a tile.
    rows: usize,
    /// Columns of a tile of the projections in and out.
    columns: [usize; 2],
    shared_bytes: u32,
}

/// Kernels.
pub(super) struct ExpertKernels {
    choose: Function,
    sort: Function,
    combine: ByType,
    project_in_few: ByType,
    project_out_few: ByType,
    /// Of bfloat16, then float16; the smallest tiles first.
    tensor: [Vec<Tiled>; 2],
    /// These tiles are of warpgroups.
    has_warpgroups: bool,
    is_deterministic: bool,
    plain: [ByType; 2],
    /// Grows while experts are made; its address is then fixed.
    scratch: RefCell<Option<DeviceMemory>>,
}

/// Whether weights are to be streamed for each token: that reads those of an expert once for each token that has it, tiles read them
/// once, after sorting. `tiles_stream` says that tiles read them nearly as fast.
fn is_few(rows: usize, chosen: usize, num_experts: usize, tiles_stream: bool) -> bool {
    // Experts that tokens share seldom coincide: how many there are if each is as likely as the others.
    let missed = (1.0 - chosen as f64 / num_experts as f64).powi(rows as i32);
    let distinct = num_experts as f64 * (1.0 - missed);
    let worth = if tiles_stream { 1.1 } else { 1.25 };
    rows == 1 || rows <= FEW_ROWS && ((rows * chosen) as f64) < worth * distinct
}

/// One part of a step: some tokens, and where their arrays are.
struct Part<'a> {
    queue: &'a Queue,
    experts: &'a CudaExperts,
    rows: usize,
    chosen: usize,
    /// Address of the first token's row.
    x: DevicePtr,
    out: DevicePtr,
    base: DevicePtr,
    scratch: Scratch,
}

impl Part<'_> {
    fn at(&self, offset: usize) -> DevicePtr {
        self.base + offset as DevicePtr
    }

    fn pairs(&self) -> usize {
        self.rows * self.chosen
    }

    /// Hidden size and width of an expert.
    fn sizes(&self) -> [i32; 2] {
        [self.experts.hidden as i32, self.experts.width as i32]
    }
}

impl ExpertKernels {
    /// Loads them. Tiles of one size compute everything where results must not depend on the number of tokens.
    pub(super) fn load(
        context: &Arc<Context>,
        facts: DeviceFacts,
        is_deterministic: bool,
    ) -> Result<Self, BackendError> {
        let module = Module::load(context, "experts")?;
        let has_warpgroups = facts.capability == (9, 0)
            && kernels::architectures().contains(&"sm_90a")
            && module.function("project_in_warpgroups_16_bf16")?.is_for_hopper_or_later()?;
        let tiled = |name: &str| -> Result<Vec<Tiled>, BackendError> {
            let (prefix, sizes, shared_bytes): (_, &[usize], fn(usize) -> u32) = if has_warpgroups {
                ("warpgroups_", &[16, 32, 64, 128, 256], warpgroup_tile_bytes)
            } else {
                ("", &[32, 64, 128], tensor_tile_bytes)
            };
            let of_size = |&rows: &usize| {
                let shared_bytes = shared_bytes(rows);
                let function = |side: &str| -> Result<Function, BackendError> {
                    let function = module.function(&format!("project_{side}_{prefix}{rows}_{name}"))?;
                    function.allow_shared_memory(shared_bytes)?;
                    Ok(function)
                };
                let [project_in, project_out] = [function("in")?, function("out")?];
                Ok(Tiled { project_in, project_out, rows, columns: [64, 128], shared_bytes })
            };
            let sizes = sizes.iter().filter(|&&rows| !is_deterministic || rows == 64);
            sizes.map(of_size).collect()
        };
        Ok(Self {
            choose: module.function("choose_experts")?,
            sort: module.function("sort_by_expert")?,
            combine: module.by_type("combine")?,
            project_in_few: module.by_type("project_in_few")?,
            project_out_few: module.by_type("project_out_few")?,
            tensor: [tiled("bf16")?, tiled("f16")?],
            has_warpgroups,
            is_deterministic,
            plain: [module.by_type("project_in_plain")?, module.by_type("project_out_plain")?],
            scratch: RefCell::new(None),
        })
    }

    /// Makes room for steps of `max_rows` tokens with `experts`, as far as the limit goes.
    pub(super) fn prepare(
        &self,
        context: &Arc<Context>,
        experts: &CudaExperts,
        max_rows: usize,
    ) -> Result<(), BackendError> {
        // How many of them a token is sent to is not known yet; more than eight take more parts.
        let likely = max_rows * experts.len().min(8) * experts.scratch_bytes_a_pair();
        // A token may go to all of them.
        let least = experts.len() * experts.scratch_bytes_a_pair();
        let bytes = likely.min(SCRATCH_BYTES).max(least) + PADDING;
        let mut scratch = self.scratch.borrow_mut();
        if scratch.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            *scratch = None;
            *scratch = Some(DeviceMemory::new(context, bytes, "the work of a mixture of experts")?);
        }
        Ok(())
    }

    /// `out = sum over the chosen experts of weight * expert(x)`.
    pub(super) fn mix(
        &mut self,
        queue: &Queue,
        (x, router_logits): (&CudaBuffer, &CudaBuffer),
        (routing, correction): (&Routing, Option<&CudaVector>),
        experts: &CudaExperts,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check((x, router_logits), (routing, correction), experts, out);
        check_type("a mixture of experts", x.dtype(), experts.dtype)?;
        check_type("a mixture of experts", out.dtype(), experts.dtype)?;
        out.resize(x.rows());
        let scratch = self.scratch.borrow();
        let Some(memory) = scratch.as_ref() else {
            return Err(BackendError::Device {
                operation: "a mixture of experts".to_owned(),
                reason: "its work has no memory".to_owned(),
            });
        };
        let chosen = routing.num_chosen;
        // There is room for a token that is sent to all experts.
        let at_once =
            (memory.bytes().saturating_sub(PADDING) / experts.scratch_bytes_a_pair() / chosen).max(1);
        let row_bytes = experts.hidden * experts.dtype.size_bytes();
        for first in (0..x.rows()).step_by(at_once) {
            let rows = at_once.min(x.rows() - first);
            let part = Part {
                queue,
                experts,
                rows,
                chosen,
                x: x.ptr() + (first * row_bytes) as DevicePtr,
                out: out.ptr() + (first * row_bytes) as DevicePtr,
                base: memory.ptr(),
                scratch: experts.scratch(rows, chosen),
            };
            let logits = router_logits.ptr() + (first * experts.len() * size_of::<f32>()) as DevicePtr;
            self.choose(&part, logits, (routing, correction))?;
            if !self.is_deterministic && is_few(rows, chosen, experts.len(), self.has_warpgroups) {
                self.stream(&part)?
            } else {
                self.multiply(&part)?
            }
        }
        Ok(())
    }

    fn choose(
        &self,
        part: &Part<'_>,
        logits: DevicePtr,
        (routing, correction): (&Routing, Option<&CudaVector>),
    ) -> Result<(), BackendError> {
        let rule = Rule::new(routing, part.experts.len());
        let launch = Launch {
            function: self.choose,
            grid: [part.rows as u32, 1, 1],
            block: 32,
            shared_bytes: rule.shared_bytes(),
        };
        let correction: DevicePtr = correction.map_or(0, CudaVector::ptr);
        let (chosen, weights) = (part.at(part.scratch.experts), part.at(part.scratch.weights));
        part.queue.launch(&launch, args![logits, correction, rule, chosen, weights])
    }

    /// For few tokens: a warp a column, which streams its row of weights.
    fn stream(&self, part: &Part<'_>) -> Result<(), BackendError> {
        let Part { queue, experts, rows, scratch, .. } = *part;
        let [pitch_in, pitch_out] = experts.pitches();
        let [hidden, width] = part.sizes();
        let chosen = part.chosen as i32;
        let activation = activation_number(experts.activation);
        let (ids, weights) = (part.at(scratch.experts), part.at(scratch.weights));
        let activated = part.at(scratch.activated);
        let launch = |function: Function, columns: usize, rows: usize| Launch {
            function,
            grid: [columns.div_ceil(WARPS) as u32, rows as u32, 1],
            block: THREADS,
            shared_bytes: 0,
        };
        queue.launch(
            &launch(self.project_in_few.of(experts.dtype), experts.width, part.pairs()),
            args![
                part.x,
                experts.addresses[0].ptr(),
                pitch_in,
                ids,
                chosen,
                hidden,
                width,
                activation,
                activated
            ],
        )?;
        queue.launch(
            &launch(self.project_out_few.of(experts.dtype), experts.hidden, rows),
            args![
                activated,
                experts.addresses[1].ptr(),
                pitch_out,
                ids,
                weights,
                chosen,
                hidden,
                width,
                part.out
            ],
        )
    }

    /// The tiles for a part: tensor cores want 16 bits and rows that are aligned to 16 bytes.
    fn tiles(&self, part: &Part<'_>) -> Tiled {
        let experts = part.experts;
        let is_aligned = experts.hidden.is_multiple_of(8) && experts.width.is_multiple_of(8);
        let sizes = match experts.dtype {
            DType::BF16 if is_aligned => &self.tensor[0],
            DType::F16 if is_aligned => &self.tensor[1],
            _ => &Vec::new(),
        };
        // Most experts' tokens should fit into one tile, since weights are read for each; some have more than the average.
        let wanted = part.pairs() * 3 / 2 / experts.len();
        let fitting = sizes.iter().find(|tiled| tiled.rows >= wanted).or(sizes.last());
        fitting.copied().unwrap_or_else(|| {
            let [project_in, project_out] =
                [self.plain[0].of(experts.dtype), self.plain[1].of(experts.dtype)];
            Tiled { project_in, project_out, rows: 32, columns: [32, 32], shared_bytes: 0 }
        })
    }

    /// For many tokens: tiles of tokens times tiles of weights, then the sums.
    fn multiply(&self, part: &Part<'_>) -> Result<(), BackendError> {
        let Part { queue, experts, rows, scratch, .. } = *part;
        let tiled = self.tiles(part);
        // Each expert has at most one tile that is not full.
        let max_tiles = part.pairs().min(part.pairs() / tiled.rows + experts.len());
        let [pitch_in, pitch_out] = experts.pitches();
        let [hidden, width] = part.sizes();
        let (pairs, num_experts, chosen) = (part.pairs() as i32, experts.len() as i32, part.chosen as i32);
        let activation = activation_number(experts.activation);
        let (slots, tiles) = (part.at(scratch.slots), part.at(scratch.tiles));
        let (activated, products) = (part.at(scratch.activated), part.at(scratch.products));
        let sort = Launch {
            function: self.sort,
            grid: [1; 3],
            block: 1024,
            shared_bytes: (2 * experts.len() * size_of::<i32>()) as u32,
        };
        let ids = part.at(scratch.experts);
        let (tile_rows, most_tiles) = (tiled.rows as i32, max_tiles as i32);
        queue.launch(&sort, args![ids, pairs, num_experts, tile_rows, most_tiles, slots, tiles])?;
        let launch = |function: Function, columns: usize, tile: usize| Launch {
            function,
            grid: [(columns.div_ceil(tile) * max_tiles) as u32, 1, 1],
            block: THREADS,
            shared_bytes: tiled.shared_bytes,
        };
        queue.launch(
            &launch(tiled.project_in, experts.width, tiled.columns[0]),
            args![
                part.x,
                experts.addresses[0].ptr(),
                pitch_in,
                slots,
                tiles,
                chosen,
                hidden,
                width,
                activation,
                activated
            ],
        )?;
        queue.launch(
            &launch(tiled.project_out, experts.hidden, tiled.columns[1]),
            args![activated, experts.addresses[1].ptr(), pitch_out, slots, tiles, hidden, width, products],
        )?;
        let combine = Launch {
            function: self.combine.of(experts.dtype),
            grid: [rows as u32, 1, 1],
            block: THREADS,
            shared_bytes: 0,
        };
        queue.launch(&combine, args![products, part.at(scratch.weights), chosen, hidden, part.out])
    }
}

fn check(
    (x, router_logits): (&CudaBuffer, &CudaBuffer),
    (routing, correction): (&Routing, Option<&CudaVector>),
    experts: &CudaExperts,
    out: &CudaBuffer,
) {
    let count = experts.len();
    assert!(
        x.width() == experts.hidden && out.width() == experts.hidden,
        "experts of {} on rows of {} into rows of {}",
        experts.hidden,
        x.width(),
        out.width()
    );
    assert!(
        router_logits.width() == count
            && router_logits.rows() == x.rows()
            && router_logits.dtype() == DType::F32,
        "router logits {} x {} of {} for {} rows and {count} experts, expected float32",
        router_logits.rows(),
        router_logits.width(),
        router_logits.dtype(),
        x.rows()
    );
    assert!(
        correction.is_none_or(|correction| correction.width == count),
        "a correction for {count} experts"
    );
    assert!(routing.problem(count).is_none(), "{:?}", routing.problem(count));
}
