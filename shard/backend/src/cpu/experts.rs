//! Mixtures of experts: each expert multiplies the rows that are sent to it, and their results are added up.
//!
//! Rows are gathered by expert. All threads work on every expert: of the projections in each has some panels, of the
//! projection out some columns, in which it also adds up the experts' results, in the order of their indices. So nothing
//! waits for one thread, a decoding step streams the weights of the chosen experts with all threads, and no other weight is
//! touched.

use std::ops::Range;

use super::buffer::CpuBuffer;
use super::kernels::{Kernels, LANES};

use super::linear_kernels::{LinearKernels, grow};
use super::packed_linear::PackedLinear;
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
        let shape = |linear: &PackedLinear| (linear.out_features(), linear.in_features());
        let are_equal = |all: &[PackedLinear]| all.windows(2).all(|pair| shape(&pair[0]) == shape(&pair[1]));
        let fit = gate_up.first().zip(down.first()).is_some_and(|(gate_up, down)| {
            gate_up.out_features() == 2 * down.in_features() && gate_up.in_features() == down.out_features()
        });
        if fit && are_equal(&gate_up) && are_equal(&down) {
            return Ok(Self { gate_up, down, activation });
        }
        let sizes = |all: &[PackedLinear]| all.first().map(shape);
        Err(BackendError::Device {
            operation: "making a mixture of experts".to_owned(),
            reason: format!(
                "{} experts of {:?} and {:?}, expected at least one, all of one shape, whose gate and up are twice as wide \
                 as what their down takes",
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
    /// Where its packed rows begin, of the inputs of the projections in and out.
    packed: [usize; 2],
}

/// Rows of an expert that are packed together.
#[derive(Debug)]
struct Tile {
    expert: usize,
    slots: Range<usize>,
    /// Where its packed rows begin.
    packed: usize,
}

/// The work of an operation and memory for it, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct ExpertPlan {
    choices: Vec<Choice>,
    /// By expert, then by row.
    slots: Vec<Slot>,
    runs: Vec<Run>,
    /// Of the inputs of the projections in and out.
    tiles: [Vec<Tile>; 2],
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
        check((x, router_logits), (routing, correction), experts, out);
        self.route(threads, router_logits, routing, correction);
        self.sort(experts.len(), routing.num_chosen);
        let [gate_up, down] =
            [&experts.gate_up[0], &experts.down[0]].map(|one| LinearKernels::of(kernels, one));
        for (side, linears) in [&experts.gate_up, &experts.down].into_iter().enumerate() {
            self.cut(side, |expert| LinearKernels::of(kernels, &linears[expert]));
        }
        out.resize(rows);
        grow(&mut self.gate_up, self.slots.len() * gate_up.out_features());
        let longest = self.tiles.iter().flatten().map(|tile| tile.slots.len()).max().unwrap_or(0);
        let tile_len = longest * width.max(down.in_features());
        let scratch_len = tile_len.max(PRODUCTS).max(rows * LANES);
        grow(&mut self.scratch, threads.count() * scratch_len);
        let [packed_x, activated] = &mut self.packed;
        let pass = Pass {
            kernels,
            experts,
            x: x.as_slice(),
            slots: &self.slots,
            runs: &self.runs,
            packed_x: SharedMut::new(packed_x),
            gate_up: SharedMut::new(&mut self.gate_up),
            activated: SharedMut::new(activated),
            out: SharedMut::new(out.as_mut_slice()),
            rows,
        };
        let scratch = SharedMut::new(&mut self.scratch);
        let [tiles_in, tiles_out] = &self.tiles;
        let (barrier, count) = (threads.barrier(), threads.count());
        threads.run(&|index| {
            // SAFETY: each thread has its part. What a thread reads below was written before a barrier.
            let scratch = unsafe { scratch.slice(index * scratch_len..(index + 1) * scratch_len) };
            pass.pack(&tiles_in[part(tiles_in.len(), index, count)], scratch);
            barrier.wait();
            pass.project_in(index, count);
            barrier.wait();
            pass.activate(&tiles_out[part(tiles_out.len(), index, count)], scratch);
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
        // A token's choice among a hundred experts takes about a microsecond, as long as waking the threads.
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

    /// Sorts what was chosen by expert.
    fn sort(&mut self, num_experts: usize, num_chosen: usize) {
        self.next.clear();
        self.next.resize(num_experts, 0);
        self.choices.iter().for_each(|choice| self.next[choice.expert] += 1);
        self.runs.clear();
        let mut first = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let slots = first..first + std::mem::replace(next, first);
            first = slots.end;
            if !slots.is_empty() {
                self.runs.push(Run { expert, slots, packed: [0; 2] });
            }
        }
        self.slots.clear();
        self.slots.resize(self.choices.len(), Slot::default());
        for (index, choice) in self.choices.iter().enumerate() {
            let next = &mut self.next[choice.expert];
            self.slots[*next] = Slot { row: index / num_chosen, weight: choice.weight };
            *next += 1;
        }
    }

    /// Cuts the inputs of one side's projections into tiles and makes room for them.
    fn cut<'a>(&mut self, side: usize, linear: impl Fn(usize) -> LinearKernels<'a>) {
        let tiles = &mut self.tiles[side];
        tiles.clear();
        let mut packed = 0;
        for run in &mut self.runs {
            let linear = linear(run.expert);
            run.packed[side] = packed;
            for start in run.slots.clone().step_by(linear.max_tile()) {
                let slots = start..run.slots.end.min(start + linear.max_tile());
                let len = linear.packed_len(slots.len());
                tiles.push(Tile { expert: run.expert, slots, packed });
                packed += len;
            }
        }
        grow(&mut self.packed[side], packed);
    }
}

/// That shapes fit one another.
fn check(
    (x, router_logits): (&CpuBuffer, &CpuBuffer),
    (routing, correction): (&Routing, Option<&[f32]>),
    experts: &CpuExperts,
    out: &CpuBuffer,
) {
    let (count, width) = (experts.len(), experts.gate_up[0].in_features());
    assert!(
        x.width() == width && out.width() == width && router_logits.width() == count,
        "{count} experts of width {width} between buffers of width {} and {}, with {} router logits",
        x.width(),
        out.width(),
        router_logits.width()
    );
    assert!(
        router_logits.rows() == x.rows() && correction.is_none_or(|bias| bias.len() == count),
        "{} rows, router logits of {}",
        x.rows(),
        router_logits.rows()
    );
    assert_eq!(routing.problem(count), None);
}

/// What all threads of one operation see.
struct Pass<'a> {
    kernels: &'a Kernels,
    experts: &'a CpuExperts,
    x: &'a [f32],
    slots: &'a [Slot],
    runs: &'a [Run],
    packed_x: SharedMut<u32>,
    gate_up: SharedMut<f32>,
    activated: SharedMut<u32>,
    out: SharedMut<f32>,
    rows: usize,
}

impl<'a> Pass<'a> {
    fn gate_up(&self, expert: usize) -> LinearKernels<'a> {
        LinearKernels::of(self.kernels, &self.experts.gate_up[expert])
    }

    fn down(&self, expert: usize) -> LinearKernels<'a> {
        LinearKernels::of(self.kernels, &self.experts.down[expert])
    }

    /// Packs the inputs of some tiles.
    fn pack(&self, tiles: &[Tile], scratch: &mut [f32]) {
        let width = self.gate_up(0).in_features();
        for tile in tiles {
            for (gathered, slot) in scratch.chunks_exact_mut(width).zip(&self.slots[tile.slots.clone()]) {
                gathered.copy_from_slice(&self.x[slot.row * width..(slot.row + 1) * width]);
            }
            pack_tile(self.gate_up(tile.expert), tile, scratch, self.packed_x);
        }
    }

    /// Gates the results of some tiles and packs them.
    fn activate(&self, tiles: &[Tile], scratch: &mut [f32]) {
        let width = self.down(0).in_features();
        for tile in tiles {
            for (activated, slot) in scratch.chunks_exact_mut(width).zip(tile.slots.clone()) {
                // SAFETY: written by `project_in`, before the barrier; the processor has the instruction set.
                unsafe {
                    let gate_up = self.gate_up.read(slot * 2 * width..(slot + 1) * 2 * width);
                    (self.kernels.gated)(gate_up, self.experts.activation, activated);
                }
            }
            pack_tile(self.down(tile.expert), tile, scratch, self.activated);
        }
    }

    /// Multiplies this thread's part of all experts' panels, as much work as the others have.
    fn project_in(&self, index: usize, count: usize) {
        let panels = self.gate_up(0).panels();
        let costs = self.runs.iter().map(|run| panel_cost(run.slots.len()));
        let own = part(panels * costs.clone().sum::<usize>(), index, count);
        let mut before = 0;
        for (run, cost) in self.runs.iter().zip(costs) {
            // A panel belongs to the part in which its work begins.
            let panel_at = |work: usize| work.saturating_sub(before).div_ceil(cost).min(panels);
            let own = panel_at(own.start)..panel_at(own.end);
            before += panels * cost;
            if own.is_empty() {
                continue;
            }
            let linear = self.gate_up(run.expert);
            // SAFETY: packed before the barrier; results of these panels are this thread's.
            unsafe {
                let x = self.packed_x.get().add(run.packed[0]);
                let out = self.gate_up.get().add(run.slots.start * linear.out_features());
                linear.multiply(own, (x, run.slots.len()), out);
            }
        }
    }

    /// Computes the columns of some panels of the result.
    fn project_out(&self, panels: Range<usize>, scratch: &mut [f32]) {
        let width = self.down(0).out_features();
        let own = self.down(0).columns(&panels);
        for row in 0..self.rows {
            // SAFETY: these columns are this thread's.
            unsafe { self.out.slice(row * width + own.start..row * width + own.end) }.fill(0.0);
        }
        for run in self.runs {
            let linear = self.down(run.expert);
            // What is multiplied at a time fits into the scratch.
            let at_once = (PRODUCTS / (run.slots.len() * LANES)).max(1);
            for first in panels.clone().step_by(at_once) {
                let some = first..(first + at_once).min(panels.end);
                let columns = linear.columns(&some);
                // SAFETY: packed before the barrier; the scratch is this thread's.
                unsafe {
                    let x = self.activated.get().add(run.packed[1]);
                    linear.multiply_part(some, (x, run.slots.len()), scratch);
                }
                let products = scratch.chunks_exact(columns.len());
                for (slot, products) in self.slots[run.slots.clone()].iter().zip(products) {
                    let start = slot.row * width;
                    // SAFETY: these columns are this thread's.
                    let sums = unsafe { self.out.slice(start + columns.start..start + columns.end) };
                    sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += slot.weight * product);
                }
            }
        }
    }
}

fn pack_tile(linear: LinearKernels<'_>, tile: &Tile, x: &[f32], packed: SharedMut<u32>) {
    let rows = tile.slots.len();
    // SAFETY: a tile is one thread's; the processor has the instruction set.
    unsafe { linear.pack(x, rows, packed.slice(tile.packed..tile.packed + linear.packed_len(rows))) };
}

/// What a panel of an expert with so many rows takes, where reading it takes as long as multiplying 16 rows.
const fn panel_cost(rows: usize) -> usize {
    rows + 16
}
