//! Cuts the attention of a step into tiles and spreads them over the threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffer::CpuBuffer;
use super::kernels::{AttentionArgs, AttentionConfig, Kernels, QueryRow, scratch_len};
use super::kv_cache::CpuKvCache;
use super::threads::{SharedMut, Threads};
use crate::{AttentionShape, StepInput};

/// The query rows of one KV head of one sequence that are computed together. Rows are the tokens' heads: all heads that
/// share the KV head, token after token.
#[derive(Debug, Clone, Copy)]
struct Tile {
    seq: usize,
    kv_head: usize,
    first_row: usize,
    num_rows: usize,
}

/// The tiles of a step and scratch for them, kept from step to step.
#[derive(Debug, Default)]
pub(super) struct AttentionPlan {
    tiles: Vec<Tile>,
    scratch: Vec<f32>,
}

impl AttentionPlan {
    fn cut(&mut self, step: &StepInput, shape: &AttentionShape, max_tile: usize) {
        self.tiles.clear();
        let group = shape.num_heads / shape.num_kv_heads;
        for seq in 0..step.num_seqs() {
            let rows = (step.cu_seqlens_q[seq + 1] - step.cu_seqlens_q[seq]) as usize * group;
            // The last tokens see most keys: the long tiles go first, so that no thread gets one when all others end.
            for first_row in (0..rows).step_by(max_tile).rev() {
                let num_rows = (rows - first_row).min(max_tile);
                self.tiles.extend((0..shape.num_kv_heads).map(|kv_head| Tile {
                    seq,
                    kv_head,
                    first_row,
                    num_rows,
                }));
            }
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
        let next = AtomicUsize::new(0);
        let tiles = &self.tiles;
        let typed = kernels.typed(cache.layout().dtype);
        let config = AttentionConfig { head_dim, scale: shape.scale, soft_cap: shape.soft_cap };
        threads.run(&|index| {
            let mut rows = [QueryRow { query: 0, out: 0, first_key: 0, end_key: 0 }; 24];
            while let Some(tile) = tiles.get(next.fetch_add(1, Ordering::Relaxed)) {
                let rows = tile.rows(step, shape, &mut rows);
                // SAFETY: the processor has the instruction set; `out` has all rows, a tile's are its own, and each
                // thread has its part of the scratch. `begin_step` checked that the tables hold the contexts.
                unsafe {
                    (typed.attention)(AttentionArgs {
                        config,
                        rows,
                        cache: cache.keys_values(layer, tile.kv_head, step.block_table(tile.seq)),
                        qkv: qkv.as_slice(),
                        out: results.get(),
                        scratch: scratch.slice(index * scratch_len..(index + 1) * scratch_len),
                    });
                }
            }
        });
    }
}

impl Tile {
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
            };
        }
        rows
    }
}
