//! Weights packed for the kernels.
//!
//! Sixteen outputs make a panel. Within it a step is one input's sixteen weights, for bf16 two inputs' sixteen pairs:
//! `[panel][step][16][step_inputs]`. Outputs are padded to 16, inputs to a step, with zeros. Behind bf16 panels lie the exponents of
//! their groups, where the processor multiplies in fixed point.

use super::arena::{Arena, Region};
use super::kernels::{Kernels, LANES};
use super::threads::{SharedMut, Threads, part};
use crate::{BackendError, DType, HostMatrix};

/// A packed linear layer of plain numbers.
#[derive(Debug)]
pub(super) struct PlainLinear {
    pub(super) memory: Region,
    pub(super) dtype: DType,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    /// Steps of a panel.
    pub(super) steps: usize,
    step_inputs: usize,
    /// Bytes of the panels; what products in fixed point need beside follows them.
    panels_len: usize,
}

impl PlainLinear {
    /// Packs `parts`, stacked along their rows.
    pub(super) fn pack(
        parts: &[HostMatrix<'_>],
        dtype: DType,
        kernels: &Kernels,
        (threads, arena): (&mut Threads, &mut Arena),
    ) -> Result<Self, BackendError> {
        let in_features = HostMatrix::common_columns(parts)?;
        let fixed = kernels.fixed.filter(|_| dtype == DType::BF16);
        let kernels = kernels.typed(dtype);
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        let steps = in_features.div_ceil(kernels.step_inputs);
        let panels = out_features.div_ceil(LANES);
        let panel_bytes = steps * kernels.step_bytes;
        let exponents_len = fixed.map_or(0, |fixed| (fixed.exponents_len)(steps));
        let panels_len = panels * panel_bytes;
        let what = format!("a weight of {out_features} x {in_features} {dtype}");
        let memory = arena.region(panels_len + panels * exponents_len, &what)?;
        let step_inputs = kernels.step_inputs;
        let mut packed =
            PlainLinear { memory, dtype, out_features, in_features, steps, step_inputs, panels_len };
        let count = threads.count();
        let (panel_memory, exponents) = packed.memory.as_mut_slice::<u8>().split_at_mut(panels_len);
        let (target, exponents) = (SharedMut::new(panel_memory), SharedMut::new(exponents));
        threads.run(&|index| {
            let mut values = vec![0.0; in_features];
            for panel in part(panels, index, count) {
                // SAFETY: each panel is one thread's.
                let panel_memory = unsafe { target.slice(panel * panel_bytes..(panel + 1) * panel_bytes) };
                let rows = panel_rows(parts, panel, out_features);
                pack_panel(&rows, dtype, panel_memory, &mut values);
                if let Some(fixed) = fixed {
                    // SAFETY: each panel is one thread's; the processor has the instruction set.
                    unsafe {
                        let own = exponents.slice(panel * exponents_len..(panel + 1) * exponents_len);
                        (fixed.exponents)(panel_memory, own);
                    }
                }
            }
        });
        Ok(packed)
    }

    /// The panels, and the exponents of products in fixed point where the kernels have them.
    pub(super) fn panels_and_exponents(&self) -> (&[u8], &[u8]) {
        self.memory.as_slice::<u8>().split_at(self.panels_len)
    }

    /// Row `row` (the weights of output `row`) as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let elements = self.steps * LANES * self.step_inputs;
        let stride = LANES * self.step_inputs;
        let place = |k: usize| {
            panel * elements + k / self.step_inputs * stride + lane * self.step_inputs + k % self.step_inputs
        };
        match self.dtype {
            DType::F32 => {
                let all = self.memory.as_slice::<f32>();
                out.iter_mut().enumerate().for_each(|(k, value)| *value = all[place(k)]);
            }
            DType::F16 => {
                let all = self.memory.as_slice::<half::f16>();
                out.iter_mut().enumerate().for_each(|(k, value)| *value = all[place(k)].to_f32());
            }
            DType::BF16 => {
                let all = self.memory.as_slice::<half::bf16>();
                out.iter_mut().enumerate().for_each(|(k, value)| *value = all[place(k)].to_f32());
            }
        }
    }
}

/// The rows of panel `panel` of the stacked parts: each as its part and its place there.
pub(super) fn panel_rows<'a>(
    parts: &'a [HostMatrix<'a>],
    panel: usize,
    out_features: usize,
) -> Vec<(&'a HostMatrix<'a>, usize)> {
    let rows = panel * LANES..((panel + 1) * LANES).min(out_features);
    rows.map(|row| find_row(parts, row)).collect()
}

/// Row `row` of the stacked parts.
fn find_row<'a>(parts: &'a [HostMatrix<'a>], mut row: usize) -> (&'a HostMatrix<'a>, usize) {
    for part in parts {
        if row < part.rows {
            return (part, row);
        }
        row -= part.rows;
    }
    unreachable!("the panel's rows are below the sum of the parts'")
}

/// Packs up to sixteen rows into memory that is zeroed where nothing is packed. `values` is scratch for one row.
pub(super) fn pack_panel(
    rows: &[(&HostMatrix<'_>, usize)],
    dtype: DType,
    panel: &mut [u8],
    values: &mut [f32],
) {
    let is_bf16 = dtype == DType::BF16;
    if is_bf16 && rows.len() == LANES && rows.iter().all(|(part, _)| part.dtype == DType::BF16) {
        pack_bf16_panel(rows, panel);
        return;
    }
    for (lane, &(part, row)) in rows.iter().enumerate() {
        part.read_row(row, values);
        match dtype {
            DType::F32 => {
                for (step, &value) in
                    bytemuck::cast_slice_mut::<u8, f32>(panel).chunks_exact_mut(LANES).zip(&*values)
                {
                    step[lane] = value;
                }
            }
            DType::F16 => {
                let panel = bytemuck::cast_slice_mut::<u8, half::f16>(panel);
                for (step, &value) in panel.chunks_exact_mut(LANES).zip(&*values) {
                    step[lane] = half::f16::from_f32(value);
                }
            }
            DType::BF16 => {
                let panel = bytemuck::cast_slice_mut::<u8, half::bf16>(panel);
                for (step, pair) in panel.chunks_exact_mut(2 * LANES).zip(values.chunks(2)) {
                    for (place, &value) in step[2 * lane..].iter_mut().zip(pair) {
                        *place = half::bf16::from_f32(value);
                    }
                }
            }
        }
    }
}

/// Sixteen bf16 rows into pairs, without a detour over f32: what loading a checkpoint spends its time on.
fn pack_bf16_panel(rows: &[(&HostMatrix<'_>, usize)], panel: &mut [u8]) {
    let sources: [&[u8]; LANES] = std::array::from_fn(|lane| {
        let (part, row) = rows[lane];
        &part.bytes[row * part.row_stride * 2..][..part.cols * 2]
    });
    let pairs = sources[0].len() / 4;
    let panel = bytemuck::cast_slice_mut::<u8, u32>(panel);
    for (step, out) in panel.as_chunks_mut::<LANES>().0.iter_mut().take(pairs).enumerate() {
        for (place, source) in out.iter_mut().zip(&sources) {
            let raw = &source[step * 4..step * 4 + 4];
            *place = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
    }
    if !sources[0].len().is_multiple_of(4) {
        for (place, source) in panel[pairs * LANES..].iter_mut().zip(&sources) {
            *place = u32::from(u16::from_le_bytes([source[pairs * 4], source[pairs * 4 + 1]]));
        }
    }
}
