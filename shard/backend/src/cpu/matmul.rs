//! Spreads a matrix product over the threads.

use super::buffer::CpuBuffer;
use super::kernels::{Kernels, LANES, MatmulArgs, PackArgs, padded_tile};
use super::linear::PackedLinear;
use super::memory::Memory;
use super::threads::{SharedMut, Threads, part};
use crate::BackendError;

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

/// `out = x weight^T (+ bias)`.
pub(super) fn matmul(
    (kernels, threads, workspace): (&Kernels, &mut Threads, &mut Workspace),
    x: &CpuBuffer,
    weight: &PackedLinear,
    bias: Option<&[f32]>,
    out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    assert!(
        x.width() == weight.in_features && out.width() == weight.out_features,
        "a weight of {} x {} between buffers of width {} and {}",
        weight.out_features,
        weight.in_features,
        x.width(),
        out.width()
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == weight.out_features),
        "the bias has another width than the outputs"
    );
    let rows = x.rows();
    out.resize(rows);
    let typed = kernels.typed(weight.dtype);
    let row_elements = weight.steps * typed.step_inputs;
    let tiles = rows.div_ceil(kernels.max_tile);
    let threads_count = threads.count();
    // One row is packed by each thread for itself, which is quicker than waiting for one another.
    let copies = if rows == 1 { threads_count } else { 1 };
    let copy_elements = (rows + kernels.max_tile) * row_elements;
    let packed = SharedMut::new(workspace.at_least(copies * copy_elements)?);
    let results = SharedMut::new(out.as_mut_slice());
    let panels = weight.out_features.div_ceil(LANES);
    let barrier = threads.barrier();
    threads.run(&|index| {
        let own_copy = if copies > 1 { index * copy_elements } else { 0 };
        let own_tiles = if copies > 1 { 0..tiles } else { part(tiles, index, threads_count) };
        for tile in own_tiles {
            let first = tile * kernels.max_tile;
            let count = (rows - first).min(kernels.max_tile);
            let start = own_copy + first * row_elements;
            // SAFETY: the tile is this thread's, and all before it are full, so that it starts here. The processor has
            // the instruction set.
            unsafe {
                (typed.pack)(PackArgs {
                    x: &x.as_slice()[first * x.width()..(first + count) * x.width()],
                    width: x.width(),
                    rows: count,
                    out: packed.slice(start..start + padded_tile(count) * row_elements),
                });
            }
        }
        if copies == 1 {
            barrier.wait();
        }
        let args = MatmulArgs {
            weights: weight.memory.as_slice::<u8>().as_ptr(),
            panels: part(panels, index, threads_count),
            steps: weight.steps,
            // SAFETY: within the workspace.
            x: unsafe { packed.get().add(own_copy) },
            rows,
            out: results.get(),
            out_width: weight.out_features,
            bias,
        };
        // SAFETY: weights, activations and results have the sizes given; the panels are this thread's.
        unsafe { (typed.matmul)(&args) };
    });
    Ok(())
}
