//! Spreads a matrix product over the threads.

use super::buffer::CpuBuffer;
use super::compact_linear::CompactLinear;
use super::kernels::{Kernels, LANES, MatmulArgs, PackArgs, padded_tile, padded_tokens};
use super::memory::Memory;
use super::packed_linear::{PackedLinear, Storage};
use super::threads::{SharedMut, Threads, part};
use crate::{BackendError, DType};

/// Memory for packed activations, grown by the warm-up and then constant.
#[derive(Debug)]
pub(super) struct Workspace(Memory);

impl Workspace {
    pub(super) fn new() -> Result<Self, BackendError> {
        Ok(Workspace(Memory::zeroed(0, "packed activations")?))
    }

    /// At least `elements` elements.
    fn at_least(&mut self, elements: usize) -> Result<&mut [u32], BackendError> {
        let bytes = elements * size_of::<u32>();
        if self.0.len() < bytes {
            self.0 = Memory::zeroed(bytes, "packed activations")?;
        }
        Ok(self.0.as_mut_slice())
    }
}

/// Rows from which on bf16 weights are converted to fixed point, where the processor gains by that: fewer wait for memory, and
/// converting costs more than it saves (`docs/kernels.md`).
const FIXED_ROWS: usize = 5;

/// Multiplies panels, with the thread's memory.
type Multiply<'a> = dyn Fn(&MatmulArgs<'_>, &mut [u32]) + Sync + 'a;

/// How a product is computed, whatever the weight's storage.
struct Product<'a> {
    weights: &'a [u8],
    /// Steps or groups of a panel.
    steps: usize,
    bias: Option<&'a [f32]>,
    /// 32-bit elements of a row's packed activations.
    row_elements: usize,
    /// Largest tile of tokens.
    max_tile: usize,
    /// The tokens a tile of so many is padded to.
    padded: fn(usize) -> usize,
    /// 32-bit elements of memory that each thread needs beside.
    scratch_elements: usize,
    /// Packs a tile.
    pack: &'a (dyn Fn(PackArgs<'_>) + Sync),
    multiply: &'a Multiply<'a>,
}

/// `out = x weight^T (+ bias)`.
pub(super) fn matmul(
    (kernels, threads, workspace): (&Kernels, &mut Threads, &mut Workspace),
    x: &CpuBuffer,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    let (in_features, out_features) = (weight.in_features(), weight.out_features());
    assert!(
        x.width() == in_features && out.width() == out_features,
        "a weight of {out_features} x {in_features} between buffers of width {} and {}",
        x.width(),
        out.width()
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == out_features),
        "the bias has another width than the outputs"
    );
    let tools = (threads, workspace);
    // SAFETY: of all calls of kernels: the processor has the instruction set; `compute` gives them weights, activations, results
    // and memory of the sizes they say, and panels that are the thread's.
    match (&weight.0, kernels.fixed) {
        (Storage::Plain(weight), Some(fixed)) if weight.dtype == DType::BF16 && x.rows() >= FIXED_ROWS => {
            let (weights, exponents) = weight.panels_and_exponents();
            let product = Product {
                weights,
                steps: weight.steps,
                bias,
                row_elements: (fixed.row_elements)(in_features),
                max_tile: (fixed.tile_tokens)(x.rows()),
                padded: fixed.padded,
                scratch_elements: (fixed.scratch_elements)(in_features),
                // SAFETY: as above.
                pack: &|args| unsafe { (fixed.pack)(args) },
                // SAFETY: as above.
                multiply: &|args, scratch| unsafe { (fixed.matmul)(args, exponents, scratch) },
            };
            product.compute(tools, x, out)
        }
        (Storage::Plain(weight), _) => {
            let typed = kernels.typed(weight.dtype);
            let product = Product {
                weights: weight.memory.as_slice(),
                steps: weight.steps,
                bias,
                row_elements: weight.steps * typed.step_inputs,
                max_tile: kernels.max_tile,
                padded: padded_tile,
                scratch_elements: 0,
                // SAFETY: as above.
                pack: &|args| unsafe { (typed.pack)(args) },
                // SAFETY: as above.
                multiply: &|args, _| unsafe { (typed.matmul)(args) },
            };
            product.compute(tools, x, out)
        }
        (Storage::Compact(weight), _) => compact_matmul((kernels, tools), x, weight, bias, out),
        (Storage::Quantized(weight), _) => {
            let (kernels, layout) = (&kernels.quantized, &weight.layout);
            let product = Product {
                weights: weight.memory.as_slice(),
                steps: layout.groups,
                bias,
                row_elements: layout.row_elements(),
                max_tile: kernels.max_tokens,
                padded: padded_tokens,
                scratch_elements: 0,
                // SAFETY: as above.
                pack: &|args| unsafe { (kernels.pack)(args, layout) },
                // SAFETY: as above.
                multiply: &|args, _| unsafe { (kernels.matmul)(args, layout) },
            };
            product.compute(tools, x, out)
        }
    }
}

/// [`matmul`] with compact weights; the widths fit.
fn compact_matmul(
    (kernels, tools): (&Kernels, (&mut Threads, &mut Workspace)),
    x: &CpuBuffer,
    weight: &CompactLinear,
    bias: Option<&[f32]>,
    out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    let (weights, compact) = weight.panels(0);
    // SAFETY: of all calls of kernels: as in `matmul`.
    match kernels.fixed {
        Some(fixed) if x.rows() >= FIXED_ROWS => {
            let exponents = weight.exponents();
            let product = Product {
                weights,
                steps: weight.steps(),
                bias,
                row_elements: (fixed.row_elements)(x.width()),
                max_tile: (fixed.tile_tokens)(x.rows()),
                padded: fixed.padded,
                scratch_elements: (fixed.scratch_elements)(x.width()),
                // SAFETY: as above.
                pack: &|args| unsafe { (fixed.pack)(args) },
                // SAFETY: as above.
                multiply: &|args, scratch| unsafe {
                    (fixed.compact_matmul)(args, &compact, exponents, scratch);
                },
            };
            product.compute(tools, x, out)
        }
        _ => {
            let (typed, compact_kernels) = (kernels.typed(DType::BF16), weight.kernels());
            let product = Product {
                weights,
                steps: weight.steps(),
                bias,
                row_elements: weight.steps() * typed.step_inputs,
                max_tile: kernels.max_tile,
                padded: padded_tile,
                scratch_elements: weight.scratch_elements(x.rows()),
                // SAFETY: as above.
                pack: &|args| unsafe { (typed.pack)(args) },
                // SAFETY: as above.
                multiply: &|args, scratch| unsafe { (compact_kernels.matmul)(args, &compact, scratch) },
            };
            product.compute(tools, x, out)
        }
    }
}

impl Product<'_> {
    fn compute(
        &self,
        (threads, workspace): (&mut Threads, &mut Workspace),
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let &Product { row_elements, max_tile, scratch_elements, .. } = self;
        let (rows, out_width) = (x.rows(), out.width());
        out.resize(rows);
        let tiles = rows.div_ceil(max_tile);
        let threads_count = threads.count();
        // One row is packed by each thread for itself, which is quicker than waiting for one another.
        let copies = if rows == 1 { threads_count } else { 1 };
        let copy_elements = (rows + max_tile) * row_elements;
        // On a cache line, as what a thread streams should be.
        let scratch_start = (copies * copy_elements).next_multiple_of(LANES);
        let needed = scratch_start + threads_count * scratch_elements;
        let packed = SharedMut::new(workspace.at_least(needed)?);
        let results = SharedMut::new(out.as_mut_slice());
        let panels = out_width.div_ceil(LANES);
        let barrier = threads.barrier();
        threads.run(&|index| {
            let own_copy = if copies > 1 { index * copy_elements } else { 0 };
            let own_tiles = if copies > 1 { 0..tiles } else { part(tiles, index, threads_count) };
            for tile in own_tiles {
                let first = tile * max_tile;
                let count = (rows - first).min(max_tile);
                let start = own_copy + first * row_elements;
                (self.pack)(PackArgs {
                    x: &x.as_slice()[first * x.width()..(first + count) * x.width()],
                    width: x.width(),
                    rows: count,
                    // SAFETY: the tile is this thread's, and all before it are full, so that it starts here.
                    out: unsafe { packed.slice(start..start + (self.padded)(count) * row_elements) },
                });
            }
            if copies == 1 {
                barrier.wait();
            }
            let scratch = scratch_start + index * scratch_elements;
            // SAFETY: within the workspace, behind the activations, and each thread's own.
            let (x, scratch) =
                unsafe { (packed.get().add(own_copy), packed.slice(scratch..scratch + scratch_elements)) };
            let args = MatmulArgs {
                weights: self.weights.as_ptr(),
                panels: part(panels, index, threads_count),
                steps: self.steps,
                x,
                rows,
                out: results.get(),
                out_width,
                bias: self.bias,
            };
            (self.multiply)(&args, scratch);
        });
        Ok(())
    }
}
