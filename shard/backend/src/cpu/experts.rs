//! Mixtures of experts: each expert multiplies the rows that are sent to it, and their results are added up.
//!
//! Rows are gathered by expert. All threads work on every expert: of the projections in each has some panels, of the
//! projection out some columns, in which it also adds up the experts' results, in the order of their indices. So nothing
//! waits for one thread, a decoding step streams the weights of the chosen experts with all threads, and no other weight is
//! touched.

use std::ops::Range;

use super::buffer::CpuBuffer;
use super::kernels::{Kernels, LANES, MatmulArgs, PackArgs, padded_tile};
use super::linear::PackedLinear;
use super::router::{Choice, Router};
use super::threads::{SharedMut, Threads, part};
use crate::{Activation, BackendError, Routing};

/// Elements of products that wait to be added up: they stay in a thread's cache.
const PRODUCTS: usize = 8192;

/// Feed-forward layers of equal sizes, of which a token passes a few.
#[derive(Debug)]
pub struct CpuExperts {
    /// Projections in, gate and up as one.
    gate_up: Vec<PackedLinear>,
    /// Projections out.
    down: Vec<PackedLinear>,
    activation: Activation,
}

impl CpuExperts {
    /// Takes each expert's gate and up as one, and its down.
    pub(super) fn new(
        experts: Vec<(PackedLinear, PackedLinear)>,
        activation: Activation,
    ) -> Result<Self, BackendError> {
        let (gate_up, down): (Vec<_>, Vec<_>) = experts.into_iter().unzip();
        let shape = |linear: &PackedLinear| (linear.out_features, linear.in_features, linear.dtype);
        let are_equal = |all: &[PackedLinear]| all.windows(2).all(|pair| shape(&pair[0]) == shape(&pair[1]));
        let fit = gate_up.first().zip(down.first()).is_some_and(|(gate_up, down)| {
            gate_up.out_features == 2 * down.in_features && gate_up.in_features == down.out_features
        });
        if fit && are_equal(&gate_up) && are_equal(&down) {
            return Ok(Self { gate_up, down, activation });
        }
        let sizes = |all: &[PackedLinear]| all.first().map(shape);
        Err(BackendError::Device {
            operation: "making a mixture of experts".to_owned(),
            reason: format!(
                "{} experts of {:?} and {:?}, expected at least one, all of one shape and type, whose gate and up are \
                 twice as wide as what their down takes",
                gate_up.len(),
                sizes(&gate_up),
                sizes(&down)
            ),
        })
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.gate_up.len()
    }

    /// Never: there is at least one.
    pub fn is_empty(&self) -> bool {
        self.gate_up.is_empty()
    }
}

/// A row sent to an expert.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    row: usize,
    weight: f32,
}

/// An expert and what is sent to it.
#[derive(Debug)]
struct Run {
    expert: usize,
    /// Its slots.
    slots: Range<usize>,
    /// Rows of packed activations before its own.
    packed: usize,
}

/// Rows of a run that are packed together.
#[derive(Debug)]
struct Tile {
    slots: Range<usize>,
    packed: usize,
}

/// The work of an operation and memory for it, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct ExpertPlan {
    choices: Vec<Choice>,
    /// By expert, then by row.
    slots: Vec<Slot>,
    runs: Vec<Run>,
    tiles: Vec<Tile>,
    /// For each expert the next free slot.
    next: Vec<usize>,
    /// Inputs of the projections in and out.
    packed: [Vec<u32>; 2],
    /// `[slots, 2 * width]`.
    gate_up: Vec<f32>,
    /// Of each thread.
    scratch: Vec<f32>,
    /// Of each thread.
    routers: Vec<Router>,
}

impl ExpertPlan {
    /// `out = sum over the chosen experts of weight * expert(x)`.
    pub(super) fn run(
        &mut self,
        (kernels, threads): (&Kernels, &mut Threads),
        (x, router_logits): (&CpuBuffer, &CpuBuffer),
        (routing, correction): (&Routing, Option<&[f32]>),
        experts: &CpuExperts,
        out: &mut CpuBuffer,
    ) {
        let (rows, width) = (x.rows(), x.width());
        let (gate_up, down) = (&experts.gate_up[0], &experts.down[0]);
        assert!(
            width == gate_up.in_features && out.width() == width && router_logits.width() == experts.len(),
            "{} experts of width {} between buffers of width {width} and {}, with {} router logits",
            experts.len(),
            gate_up.in_features,
            out.width(),
            router_logits.width()
        );
        assert!(
            router_logits.rows() == rows && correction.is_none_or(|bias| bias.len() == experts.len()),
            "{rows} rows, router logits of {}",
            router_logits.rows()
        );
        assert_eq!(routing.problem(experts.len()), None);
        self.route(threads, router_logits, routing, correction);
        self.cut(experts.len(), routing.num_chosen, kernels.max_tile);
        out.resize(rows);
        let packed_rows = self.tiles.last().map_or(0, |tile| tile.packed + padded_tile(tile.slots.len()));
        for (packed, linear) in self.packed.iter_mut().zip([gate_up, down]) {
            grow(packed, packed_rows * row_elements(kernels, linear));
        }
        grow(&mut self.gate_up, self.slots.len() * gate_up.out_features);
        let scratch_len = (kernels.max_tile * width.max(down.in_features)).max(PRODUCTS).max(rows * LANES);
        grow(&mut self.scratch, threads.count() * scratch_len);
        let [packed_x, activated] = &mut self.packed;
        let pass = Pass {
            kernels,
            experts,
            x: x.as_slice(),
            slots: &self.slots,
            runs: &self.runs,
            tiles: &self.tiles,
            packed_x: SharedMut::new(packed_x),
            gate_up: SharedMut::new(&mut self.gate_up),
            activated: SharedMut::new(activated),
            out: SharedMut::new(out.as_mut_slice()),
            rows,
        };
        let scratch = SharedMut::new(&mut self.scratch);
        let (barrier, count) = (threads.barrier(), threads.count());
        threads.run(&|index| {
            // SAFETY: each thread has its part. What a thread reads below was written before a barrier.
            let scratch = unsafe { scratch.slice(index * scratch_len..(index + 1) * scratch_len) };
            pass.pack(part(pass.tiles.len(), index, count), scratch);
            barrier.wait();
            pass.project_in(index, count);
            barrier.wait();
            pass.activate(part(pass.tiles.len(), index, count), scratch);
            barrier.wait();
            pass.project_out(part(width.div_ceil(LANES), index, count), scratch);
        });
    }

    fn route(
        &mut self,
        threads: &mut Threads,
        logits: &CpuBuffer,
        routing: &Routing,
        correction: Option<&[f32]>,
    ) {
        let (rows, num_experts, num_chosen) = (logits.rows(), logits.width(), routing.num_chosen);
        self.choices.clear();
        self.choices.resize(rows * num_chosen, Choice::default());
        // A token's choice takes about a microsecond for a hundred experts, less than waking the threads.
        let count = if rows < 8 { 1 } else { threads.count() };
        self.routers.resize_with(count.max(self.routers.len()), Router::default);
        let routers = SharedMut::new(&mut self.routers);
        let choices = SharedMut::new(&mut self.choices);
        let task = |index: usize| {
            for row in part(rows, index, count) {
                let logits = &logits.as_slice()[row * num_experts..(row + 1) * num_experts];
                // SAFETY: each row, and each thread's router, is one thread's.
                unsafe {
                    let chosen = choices.slice(row * num_chosen..(row + 1) * num_chosen);
                    routers.slice(index..index + 1)[0].choose(logits, correction, routing, chosen);
                }
            }
        };
        if count == 1 { task(0) } else { threads.run(&task) }
    }

    /// Sorts what was chosen by expert and cuts it into tiles.
    fn cut(&mut self, num_experts: usize, num_chosen: usize, max_tile: usize) {
        self.next.clear();
        self.next.resize(num_experts + 1, 0);
        for choice in &self.choices {
            self.next[choice.expert + 1] += 1;
        }
        self.runs.clear();
        self.tiles.clear();
        let mut packed = 0;
        for expert in 0..num_experts {
            let first = self.next[expert];
            let slots = first..first + self.next[expert + 1];
            self.next[expert + 1] = slots.end;
            if slots.is_empty() {
                continue;
            }
            self.runs.push(Run { expert, slots: slots.clone(), packed });
            for start in slots.clone().step_by(max_tile) {
                let slots = start..slots.end.min(start + max_tile);
                let padded = padded_tile(slots.len());
                self.tiles.push(Tile { slots, packed });
                packed += padded;
            }
        }
        self.slots.clear();
        self.slots.resize(self.choices.len(), Slot::default());
        for (index, choice) in self.choices.iter().enumerate() {
            let slot = &mut self.next[choice.expert];
            self.slots[*slot] = Slot { row: index / num_chosen, weight: choice.weight };
            *slot += 1;
        }
    }
}

/// What all threads of one operation see.
struct Pass<'a> {
    kernels: &'a Kernels,
    experts: &'a CpuExperts,
    x: &'a [f32],
    slots: &'a [Slot],
    runs: &'a [Run],
    tiles: &'a [Tile],
    packed_x: SharedMut<u32>,
    gate_up: SharedMut<f32>,
    activated: SharedMut<u32>,
    out: SharedMut<f32>,
    rows: usize,
}

impl Pass<'_> {
    /// Packs the inputs of some tiles.
    fn pack(&self, tiles: Range<usize>, scratch: &mut [f32]) {
        let linear = &self.experts.gate_up[0];
        let width = linear.in_features;
        for tile in &self.tiles[tiles] {
            for (gathered, slot) in scratch.chunks_exact_mut(width).zip(&self.slots[tile.slots.clone()]) {
                gathered.copy_from_slice(&self.x[slot.row * width..(slot.row + 1) * width]);
            }
            self.pack_tile(linear, tile, scratch, self.packed_x);
        }
    }

    /// Gates the results of some tiles and packs them.
    fn activate(&self, tiles: Range<usize>, scratch: &mut [f32]) {
        let linear = &self.experts.down[0];
        let width = linear.in_features;
        for tile in &self.tiles[tiles] {
            for (activated, slot) in scratch.chunks_exact_mut(width).zip(tile.slots.clone()) {
                // SAFETY: written by `project_in`, before the barrier; the processor has the instruction set.
                unsafe {
                    let gate_up = self.gate_up.read(slot * 2 * width..(slot + 1) * 2 * width);
                    (self.kernels.gated)(gate_up, self.experts.activation, activated);
                }
            }
            self.pack_tile(linear, tile, scratch, self.activated);
        }
    }

    fn pack_tile(&self, linear: &PackedLinear, tile: &Tile, x: &[f32], packed: SharedMut<u32>) {
        let (rows, width) = (tile.slots.len(), linear.in_features);
        let row_elements = row_elements(self.kernels, linear);
        let start = tile.packed * row_elements;
        // SAFETY: a tile is one thread's; the processor has the instruction set.
        unsafe {
            (self.kernels.typed(linear.dtype).pack)(PackArgs {
                x: &x[..rows * width],
                width,
                rows,
                out: packed.slice(start..start + padded_tile(rows) * row_elements),
            });
        }
    }

    /// Multiplies this thread's part of all experts' panels, as much work as the others have.
    fn project_in(&self, index: usize, count: usize) {
        let linear = &self.experts.gate_up[0];
        let panels = linear.out_features.div_ceil(LANES);
        let costs = self.runs.iter().map(|run| panel_cost(run.slots.len()));
        let own = part(panels * costs.clone().sum::<usize>(), index, count);
        let mut before = 0;
        for (run, cost) in self.runs.iter().zip(costs) {
            // A panel belongs to the part in which its work begins.
            let panel_at = |work: usize| work.saturating_sub(before).div_ceil(cost).min(panels);
            let own_panels = panel_at(own.start)..panel_at(own.end);
            before += panels * cost;
            if own_panels.is_empty() {
                continue;
            }
            let linear = &self.experts.gate_up[run.expert];
            let first = run.slots.start * linear.out_features;
            let typed = self.kernels.typed(linear.dtype);
            // SAFETY: packed before the barrier; results of these panels are this thread's.
            unsafe {
                (typed.matmul)(&MatmulArgs {
                    weights: linear.memory.as_slice::<u8>().as_ptr(),
                    panels: own_panels,
                    steps: linear.steps,
                    x: self.packed_x.get().add(run.packed * row_elements(self.kernels, linear)),
                    rows: run.slots.len(),
                    out: self.gate_up.get().add(first),
                    out_width: linear.out_features,
                    bias: None,
                });
            }
        }
    }

    /// Computes the columns of some panels of the result.
    fn project_out(&self, panels: Range<usize>, scratch: &mut [f32]) {
        let width = self.experts.down[0].out_features;
        let columns = |panels: &Range<usize>| panels.start * LANES..(panels.end * LANES).min(width);
        let own = columns(&panels);
        for row in 0..self.rows {
            // SAFETY: these columns are this thread's.
            unsafe { self.out.slice(row * width + own.start..row * width + own.end) }.fill(0.0);
        }
        for run in self.runs {
            let rows = run.slots.len();
            let linear = &self.experts.down[run.expert];
            // What is multiplied at a time fits into the scratch.
            let at_once = (PRODUCTS / (rows * LANES)).max(1);
            let mut next = panels.start;
            while next < panels.end {
                let some = next..(next + at_once).min(panels.end);
                let columns = columns(&some);
                next = some.end;
                let typed = self.kernels.typed(linear.dtype);
                let skipped = some.start * linear.steps * typed.step_bytes;
                // SAFETY: packed before the barrier; the scratch is this thread's and large enough.
                unsafe {
                    (typed.matmul)(&MatmulArgs {
                        weights: linear.memory.as_slice::<u8>()[skipped..].as_ptr(),
                        panels: 0..some.len(),
                        steps: linear.steps,
                        x: self.activated.get().add(run.packed * row_elements(self.kernels, linear)),
                        rows,
                        out: scratch.as_mut_ptr(),
                        out_width: columns.len(),
                        bias: None,
                    });
                }
                for (slot, products) in
                    self.slots[run.slots.clone()].iter().zip(scratch.chunks(columns.len()))
                {
                    let start = slot.row * width;
                    // SAFETY: these columns are this thread's.
                    let sums = unsafe { self.out.slice(start + columns.start..start + columns.end) };
                    sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += slot.weight * product);
                }
            }
        }
    }
}

/// What a panel of an expert with so many rows takes, where reading it takes as long as multiplying 16 rows.
const fn panel_cost(rows: usize) -> usize {
    rows + 16
}

/// Elements of a packed row of inputs.
pub(super) fn row_elements(kernels: &Kernels, linear: &PackedLinear) -> usize {
    linear.steps * kernels.typed(linear.dtype).step_inputs
}

/// At least `len` elements; the warm-up brings them to their final number.
pub(super) fn grow<T: Copy + Default>(memory: &mut Vec<T>, len: usize) {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
}
