//! Cuts the attention of a step into tiles and spreads them over the threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffer::CpuBuffer;
use super::kernels::{
    AttentionArgs, AttentionConfig, Kernels, QueryRow, Target, merge, partial_len, scratch_len,
};
use super::kv_cache::CpuKvCache;
use super::threads::{SharedMut, Threads, part};
use crate::{AttentionShape, StepInput};

/// Keys a thread looks at before another may take over, where a sequence has only one tile of queries: decoding. A fixed
/// number, so that results depend neither on the batch nor on the threads.
const KEYS_PER_PART: usize = 256;

/// The query rows of one KV head of one sequence that are computed together. Rows are the tokens' heads: all heads that
/// share the KV head, token after token.
#[derive(Debug, Clone, Copy)]
struct Tile {
    seq: usize,
    kv_head: usize,
    first_row: usize,
    num_rows: usize,
}

/// A tile over some of its keys.
#[derive(Debug, Clone)]
struct Work {
    tile: Tile,
    keys: Range<usize>,
    /// Where the result goes in `partial`, if it is to be merged.
    partial: Option<usize>,
}

/// A tile whose parts are to be merged.
#[derive(Debug, Clone, Copy)]
struct Merge {
    tile: Tile,
    partial: usize,
    parts: usize,
}

/// The work of an operation and memory for it, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct AttentionPlan {
    work: Vec<Work>,
    merges: Vec<Merge>,
    partial: Vec<f32>,
    scratch: Vec<f32>,
}

impl AttentionPlan {
    fn cut(&mut self, step: &StepInput, shape: &AttentionShape, max_tile: usize) {
        self.work.clear();
        self.merges.clear();
        let mut partial = 0;
        let group = shape.num_heads / shape.num_kv_heads;
        for seq in 0..step.num_seqs() {
            let tokens = (step.cu_seqlens_q[seq + 1] - step.cu_seqlens_q[seq]) as usize;
            let context = step.context_lens[seq] as usize;
            let rows = tokens * group;
            let seen = context.min(shape.window.map_or(context, |window| window.saturating_add(tokens) - 1));
            let first_part = (context - seen) / KEYS_PER_PART;
            let parts = first_part..context.div_ceil(KEYS_PER_PART);
            let is_split = rows <= max_tile && parts.len() > 1;
            // The last tokens see most keys: the long tiles go first, so that no thread gets one when all others end.
            for first_row in (0..rows).step_by(max_tile).rev() {
                let num_rows = (rows - first_row).min(max_tile);
                for kv_head in 0..shape.num_kv_heads {
                    let tile = Tile { seq, kv_head, first_row, num_rows };
                    if !is_split {
                        self.work.push(Work { tile, keys: 0..context, partial: None });
                        continue;
                    }
                    self.merges.push(Merge { tile, partial, parts: parts.len() });
                    for part in parts.clone() {
                        let keys = part * KEYS_PER_PART..((part + 1) * KEYS_PER_PART).min(context);
                        self.work.push(Work { tile, keys, partial: Some(partial) });
                        partial += num_rows * partial_len(shape.head_dim);
                    }
                }
            }
        }
        if self.partial.len() < partial {
            self.partial.resize(partial, 0.0);
        }
    }

    /// `out = attention(qkv)`.
    pub(super) fn run(
        &mut self,
        (kernels, threads): (&Kernels, &mut Threads),
        (step, shape, layer): (&StepInput, &AttentionShape, usize),
        qkv: &CpuBuffer,
        cache: &CpuKvCache,
        out: &mut CpuBuffer,
    ) {
        let head_dim = shape.head_dim;
        self.cut(step, shape, kernels.max_tile);
        let scratch_len = scratch_len(head_dim).next_multiple_of(16);
        if self.scratch.len() < scratch_len * threads.count() {
            self.scratch.resize(scratch_len * threads.count(), 0.0);
        }
        out.resize(step.num_tokens());
        let results = SharedMut::new(out.as_mut_slice());
        let scratch = SharedMut::new(&mut self.scratch);
        let partial = SharedMut::new(&mut self.partial);
        let next = AtomicUsize::new(0);
        let (work, merges) = (&self.work, &self.merges);
        let (barrier, count) = (threads.barrier(), threads.count());
        let typed = kernels.typed(cache.dtype());
        let config = AttentionConfig { head_dim, scale: shape.scale, soft_cap: shape.soft_cap };
        threads.run(&|index| {
            let mut rows = [QueryRow { query: 0, out: 0, first_key: 0, end_key: 0, slope: 0.0 }; 24];
            while let Some(Work { tile, keys, partial: merged }) =
                work.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let len = tile.num_rows * partial_len(head_dim);
                // SAFETY: the processor has the instruction set; results and parts of one piece of work are its own, and
                // each thread has its part of the scratch. `begin_step` checked that the tables hold the contexts.
                unsafe {
                    (typed.attention)(AttentionArgs {
                        config,
                        rows: tile.rows(step, shape, &mut rows),
                        cache: cache.keys_values(layer, tile.kv_head, step.block_table(tile.seq)),
                        keys: keys.clone(),
                        qkv: qkv.as_slice(),
                        target: match *merged {
                            None => Target::Out(results.get()),
                            Some(start) => Target::Partial(partial.slice(start..start + len)),
                        },
                        scratch: scratch.slice(index * scratch_len..(index + 1) * scratch_len),
                    });
                }
            }
            if merges.is_empty() {
                return;
            }
            barrier.wait();
            for &Merge { tile, partial: start, parts } in &merges[part(merges.len(), index, count)] {
                let stride = tile.num_rows * partial_len(head_dim);
                for (row, at) in
                    tile.rows(step, shape, &mut rows).iter().zip((start..).step_by(partial_len(head_dim)))
                {
                    // SAFETY: all parts are written, and each row's result is one thread's.
                    unsafe {
                        let partial = partial.read(at..at + (parts - 1) * stride + partial_len(head_dim));
                        merge(partial, parts, stride, results.slice(row.out..row.out + head_dim));
                    }
                }
            }
        });
    }
}

impl Tile {
    /// Its rows, written to `rows`.
    fn rows<'a>(&self, step: &StepInput, shape: &AttentionShape, rows: &'a mut [QueryRow]) -> &'a [QueryRow] {
        let group = shape.num_heads / shape.num_kv_heads;
        let (start, end) = (step.cu_seqlens_q[self.seq] as usize, step.cu_seqlens_q[self.seq + 1] as usize);
        let context = step.context_lens[self.seq] as usize;
        let rows = &mut rows[..self.num_rows];
        for (row, index) in rows.iter_mut().zip(self.first_row..) {
            let token = start + index / group;
            let head = self.kv_head * group + index % group;
            let end_key = context - (end - 1 - token);
            *row = QueryRow {
                query: token * shape.qkv_width() + head * shape.head_dim,
                out: (token * shape.num_heads + head) * shape.head_dim,
                first_key: shape.window.map_or(0, |window| end_key.saturating_sub(window)),
                end_key,
                slope: shape.alibi.map_or(0.0, |alibi| alibi.slope(head)),
            };
        }
        rows
    }
}
