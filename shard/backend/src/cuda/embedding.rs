//! Rows of tables: embeddings, learned positions, and gathering rows.

use std::sync::Arc;

use super::driver::{Context, DeviceMemory};
use super::launch::{Launch, Queue, args};
use super::module::{ALL_TYPES, ByTypes, Function, Module};
use super::step::StepInputs;
use super::{CudaBuffer, CudaLinear};
use crate::BackendError;

const MAX_THREADS: usize = 512;

/// Kernels.
pub(super) struct Embeddings {
    embed: ByTypes,
    add_positions: ByTypes,
    /// By units of 16 and of 2 bytes.
    gather: [Function; 2],
    /// `[max_rows]`: what is gathered.
    rows: DeviceMemory,
    max_rows: usize,
}

/// One block for each row, with a thread for each `elements`.
fn launch(function: Function, rows: usize, width: usize, elements: usize) -> Launch {
    let threads = width.div_ceil(elements).next_multiple_of(32).clamp(32, MAX_THREADS);
    Launch { function, grid: [rows as u32, 1, 1], block: threads as u32, shared_bytes: 0 }
}

impl Embeddings {
    /// Loads them; at most `max_rows` rows are gathered at once.
    pub(super) fn load(context: &Arc<Context>, max_rows: usize) -> Result<Self, BackendError> {
        let module = Module::load(context, "embedding")?;
        Ok(Self {
            embed: module.by_types("embed", &ALL_TYPES)?,
            add_positions: module.by_types("add_positions", &ALL_TYPES)?,
            gather: [module.function("gather_rows_16")?, module.function("gather_rows_2")?],
            rows: DeviceMemory::new(context, max_rows * size_of::<u32>(), "rows to gather")?,
            max_rows,
        })
    }

    /// `out[t] = table[input_ids[t] - first_id]`, zeros where that is no row of the table.
    pub(super) fn embed(
        &self,
        queue: &Queue,
        step: &StepInputs,
        table: &CudaLinear,
        first_id: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        assert_eq!(out.width(), table.in_features, "the embedding and the buffer differ in width");
        out.resize(step.facts().num_tokens);
        let function = self.embed.of(table.dtype, out.dtype())?;
        let (pitch, rows) = (table.row_stride as i32, table.out_features as i32);
        let (first, width) = (first_id as i32, out.width() as i32);
        queue.launch(
            &launch(function, out.rows(), out.width(), 8),
            args![table.ptr(), pitch, rows, first, step.input_ids(), out.ptr(), width],
        )
    }

    /// `out[t] += table[position_ids[t] + offset]`.
    pub(super) fn add_positions(
        &self,
        queue: &Queue,
        step: &StepInputs,
        table: &CudaLinear,
        offset: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let facts = step.facts();
        assert!(
            out.width() == table.in_features && out.rows() == facts.num_tokens,
            "positions of {} on {} rows of {}",
            table.in_features,
            out.rows(),
            out.width()
        );
        let last = facts.max_position.map_or(0, |position| position + offset);
        if last >= table.out_features {
            return Err(BackendError::Device {
                operation: "adding positions".to_owned(),
                reason: format!("row {last} of a table of {}", table.out_features),
            });
        }
        let function = self.add_positions.of(table.dtype, out.dtype())?;
        let (pitch, rows) = (table.row_stride as i32, table.out_features as i32);
        let (offset, width) = (offset as i32, out.width() as i32);
        queue.launch(
            &launch(function, out.rows(), out.width(), 8),
            args![table.ptr(), pitch, rows, offset, step.position_ids(), out.ptr(), width],
        )
    }

    /// `out[i] = x[rows[i]]`.
    pub(super) fn gather_rows(
        &mut self,
        queue: &Queue,
        x: &CudaBuffer,
        rows: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        assert!(
            x.width() == out.width() && x.dtype() == out.dtype(),
            "rows of {} {} gathered into {} {}",
            x.width(),
            x.dtype(),
            out.width(),
            out.dtype()
        );
        assert!(rows.iter().all(|&row| (row as usize) < x.rows()), "rows {rows:?} of {}", x.rows());
        out.resize(rows.len());
        let row_bytes = x.width() * x.dtype().size_bytes();
        // In a decode step every row is wanted.
        if rows.iter().enumerate().all(|(at, &row)| row as usize == at) {
            return queue.copy(out.ptr(), x.ptr(), rows.len() * row_bytes);
        }
        let (function, unit) =
            if row_bytes.is_multiple_of(16) { (self.gather[0], 16) } else { (self.gather[1], 2) };
        let units = row_bytes / unit;
        let a_part = self.max_rows.max(1);
        for (index, part) in rows.chunks(a_part).enumerate() {
            if !queue.is_dry() {
                // From memory that is not page-locked the driver has copied when it returns.
                queue.stream().upload(self.rows.ptr(), bytemuck::cast_slice(part))?;
            }
            let to = out.ptr() + (index * a_part * row_bytes) as u64;
            queue.launch(
                &launch(function, part.len(), units, 1),
                args![x.ptr(), self.rows.ptr(), to, units as i32],
            )?;
        }
        Ok(())
    }
}
