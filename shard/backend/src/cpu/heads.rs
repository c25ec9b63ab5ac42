//! What works on heads in strided columns: a matrix for each of them, and copies.

use super::buffer::CpuBuffer;
use super::kernels::Kernels;
use super::linear_kernels::{LinearKernels, grow};
use super::packed_linear::PackedLinear;
use super::threads::{SharedMut, Threads, part};
use crate::HeadColumns;

/// Memory of the threads, kept from one operation to the next.
#[derive(Debug, Default)]
pub(super) struct HeadPlan {
    packed: Vec<u32>,
    scratch: Vec<f32>,
}

impl HeadPlan {
    /// `out[h] = x[h] weights[h]^T`. A thread takes a tile of rows of a head, or of few rows a part of the outputs too.
    pub(super) fn matmul(
        &mut self,
        (kernels, threads): (&Kernels, &mut Threads),
        (x, from): (&CpuBuffer, HeadColumns),
        weights: &[PackedLinear],
        (out, to): (&mut CpuBuffer, HeadColumns),
    ) {
        check(from, weights.len(), x);
        check(to, weights.len(), out);
        let Some(first) = weights.first() else { return };
        let fits =
            |weight: &PackedLinear| (weight.in_features(), weight.out_features()) == (from.width, to.width);
        assert!(
            weights.iter().all(fits),
            "heads of width {} from heads of width {} by weights such as {} x {}",
            to.width,
            from.width,
            first.out_features(),
            first.in_features()
        );
        let rows = x.rows();
        out.resize(rows);
        let linears = || weights.iter().map(|weight| LinearKernels::of(kernels, weight));
        // All heads have the tiles of the one with the smallest.
        let max_tile = linears().map(|linear| linear.max_tile()).min().unwrap_or(1);
        let panels = LinearKernels::of(kernels, first).panels();
        let count = threads.count();
        let tiles = rows.div_ceil(max_tile);
        // Four pieces of work for each thread even out how long they take.
        let parts = (4 * count).div_ceil((weights.len() * tiles).max(1)).clamp(1, panels);
        let packed_len = linears().map(|linear| linear.packed_len(max_tile)).max().unwrap_or(0);
        let scratch_len = max_tile * from.width.max(to.width);
        grow(&mut self.packed, count * packed_len);
        grow(&mut self.scratch, count * scratch_len);
        let packed = SharedMut::new(&mut self.packed);
        let scratch = SharedMut::new(&mut self.scratch);
        let out_width = out.width();
        let results = SharedMut::new(out.as_mut_slice());
        threads.run(&|index| {
            // SAFETY: each thread has its part.
            let (packed, scratch) = unsafe {
                (
                    packed.slice(index * packed_len..(index + 1) * packed_len),
                    scratch.slice(index * scratch_len..(index + 1) * scratch_len),
                )
            };
            for piece in part(weights.len() * tiles * parts, index, count) {
                let (head, tile, piece) = (piece / (tiles * parts), piece / parts % tiles, piece % parts);
                let linear = LinearKernels::of(kernels, &weights[head]);
                let tile = tile * max_tile..rows.min((tile + 1) * max_tile);
                let own = part(panels, piece, parts);
                let columns = linear.columns(&own);
                let first = from.first + head * from.stride;
                for (row, gathered) in tile.clone().zip(scratch.chunks_exact_mut(from.width)) {
                    gathered.copy_from_slice(&x.as_slice()[row * x.width() + first..][..from.width]);
                }
                // SAFETY: the processor has the instruction set; scratch and packed rows are this thread's.
                unsafe {
                    linear.pack(scratch, tile.len(), packed);
                    linear.multiply_part(own, (packed.as_ptr(), tile.len()), scratch);
                }
                let first = to.first + head * to.stride + columns.start;
                for (row, products) in tile.zip(scratch.chunks_exact(columns.len())) {
                    let start = row * out_width + first;
                    // SAFETY: these columns of these rows are this piece's.
                    unsafe { results.slice(start..start + columns.len()) }.copy_from_slice(products);
                }
            }
        });
    }
}

/// Copies heads from some columns to others.
pub(super) fn copy(
    (x, from): (&CpuBuffer, HeadColumns),
    num_heads: usize,
    (out, to): (&mut CpuBuffer, HeadColumns),
) {
    check(from, num_heads, x);
    check(to, num_heads, out);
    assert_eq!(from.width, to.width, "heads copied into columns of another width");
    out.resize(x.rows());
    let (x_width, out_width) = (x.width(), out.width());
    let rows = x.as_slice().chunks_exact(x_width).zip(out.as_mut_slice().chunks_exact_mut(out_width));
    for (x, out) in rows {
        for head in 0..num_heads {
            let (source, target) = (from.first + head * from.stride, to.first + head * to.stride);
            out[target..target + to.width].copy_from_slice(&x[source..source + from.width]);
        }
    }
}

/// That the heads lie within the buffer and do not overlap.
fn check(columns: HeadColumns, num_heads: usize, buffer: &CpuBuffer) {
    let HeadColumns { first, stride, width } = columns;
    let end = first + num_heads.saturating_sub(1) * stride + width;
    assert!(
        end <= buffer.width() && (stride >= width || num_heads <= 1),
        "{num_heads} heads in the columns {columns:?} of {}",
        buffer.width()
    );
}
