//! bf16 weights packed for the kernels in 12 bits without loss, as `kernels/compact.rs` says.
//!
//! Panels of sixteen outputs follow one another, `[panel][quad]`, then the bases of their groups, then the exponents of products in fixed
//! point where the processor has those. Weights that four bits of exponent do not reach are in a list beside.

use super::arena::{Arena, Region};
use super::kernels::{
    CompactKernels, CompactPanels, EncodedPanel, Exception, GROUP, Kernels, LANES, QUAD_BYTES, QUAD_INPUTS,
    bases_len, decode, is_worth_it, max_exceptions,
};
use super::plain_linear::{pack_panel, panel_rows};
use super::threads::{SharedMut, Threads, part};
use crate::{BackendError, DType, HostMatrix};

/// Inputs of a step.
const STEP_INPUTS: usize = 2;

/// A packed linear layer of compact bf16 weights.
#[derive(Debug)]
pub(super) struct CompactLinear {
    memory: Region,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    /// Quads of a panel.
    quads: usize,
    kernels: &'static CompactKernels,
    exceptions: Vec<Exception>,
    /// Where each panel's exceptions begin, and their number.
    first_exceptions: Vec<u32>,
}

/// What a layer's weights take, each for itself.
struct Sizes {
    quads: usize,
    panels: usize,
    panel_bytes: usize,
    bases_len: usize,
    exponents_len: usize,
}

impl CompactLinear {
    /// Packs `parts`, stacked along their rows; nothing when too many of their weights are exceptions.
    pub(super) fn pack(
        parts: &[HostMatrix<'_>],
        (kernels, compact): (&Kernels, &'static CompactKernels),
        (threads, arena): (&mut Threads, &mut Arena),
    ) -> Result<Option<Self>, BackendError> {
        let in_features = HostMatrix::common_columns(parts)?;
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        let sizes = Sizes::of(in_features, out_features, kernels);
        let Sizes { quads, panels, panel_bytes, bases_len, exponents_len } = sizes;
        let what = format!("a weight of {out_features} x {in_features} in 12 bits");
        let mut memory = arena.region(panels * (panel_bytes + bases_len + exponents_len), &what)?;
        let (quad_memory, rest) = memory.as_mut_slice::<u8>().split_at_mut(panels * panel_bytes);
        let (bases, exponents) = rest.split_at_mut(panels * bases_len);
        let (quad_memory, bases, exponents) =
            (SharedMut::new(quad_memory), SharedMut::new(bases), SharedMut::new(exponents));
        let count = threads.count();
        let mut found: Vec<Vec<Exception>> = vec![Vec::new(); count];
        let mut counts = vec![0; panels];
        let (all_found, all_counts) = (SharedMut::new(&mut found), SharedMut::new(&mut counts));
        let most = max_exceptions(out_features * in_features);
        threads.run(&|index| {
            let mut panel_memory = vec![0u32; quads * QUAD_INPUTS / STEP_INPUTS * LANES];
            let mut values = vec![0.0; in_features];
            // SAFETY: each thread has its list.
            let found = unsafe { &mut all_found.slice(index..index + 1)[0] };
            for panel in part(panels, index, count) {
                let rows = panel_rows(parts, panel, out_features);
                if rows.len() < LANES {
                    panel_memory.fill(0);
                }
                pack_panel(&rows, DType::BF16, bytemuck::cast_slice_mut(&mut panel_memory), &mut values);
                let before = found.len();
                // SAFETY: each panel is one thread's; the processor has the instruction set.
                unsafe {
                    let encoded = EncodedPanel {
                        quads: quad_memory.slice(panel * panel_bytes..(panel + 1) * panel_bytes),
                        bases: bases.slice(panel * bases_len..(panel + 1) * bases_len),
                        exceptions: found,
                    };
                    (compact.encode)(&panel_memory, encoded);
                    all_counts.slice(panel..panel + 1)[0] = (found.len() - before) as u32;
                    if let Some(fixed) = kernels.fixed {
                        let own = exponents.slice(panel * exponents_len..(panel + 1) * exponents_len);
                        (fixed.exponents)(bytemuck::cast_slice(&panel_memory), own);
                        lower_exponents(own, &found[before..]);
                    }
                }
                if found.len() > most {
                    break;
                }
            }
        });
        let exceptions = found.concat();
        if !is_worth_it(exceptions.len(), out_features * in_features) {
            arena.take_back(memory);
            return Ok(None);
        }
        let first_exceptions = std::iter::once(0)
            .chain(counts.iter().scan(0, |sum, count| {
                *sum += count;
                Some(*sum)
            }))
            .collect();
        let kernels = compact;
        Ok(Some(Self { memory, out_features, in_features, quads, kernels, exceptions, first_exceptions }))
    }

    /// Memory it occupies.
    pub(super) fn bytes(&self) -> usize {
        self.memory.len()
            + size_of_val(self.exceptions.as_slice())
            + size_of_val(self.first_exceptions.as_slice())
    }

    /// Steps of a panel.
    pub(super) fn steps(&self) -> usize {
        self.quads * QUAD_INPUTS / STEP_INPUTS
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self) -> usize {
        self.quads * QUAD_BYTES
    }

    /// The kernels that encoded it.
    pub(super) fn kernels(&self) -> &'static CompactKernels {
        self.kernels
    }

    /// 32-bit elements of memory that a product of so many rows gains by.
    pub(super) fn scratch_elements(&self, rows: usize) -> usize {
        (self.kernels.scratch_elements)(rows, self.quads)
    }

    /// The quads of the panels from `first` on, and what belongs to them.
    pub(super) fn panels(&self, first: usize) -> (&[u8], CompactPanels<'_>) {
        let (panels, bases_len) = (self.out_features.div_ceil(LANES), bases_len(self.quads));
        let (quads, rest) = self.memory.as_slice::<u8>().split_at(panels * self.panel_bytes());
        let bases = &rest[first * bases_len..panels * bases_len];
        let first_exceptions = &self.first_exceptions[first..];
        let panels = CompactPanels { bases, exceptions: &self.exceptions, first_exceptions };
        (&quads[first * self.panel_bytes()..], panels)
    }

    /// The exponents of products in fixed point.
    pub(super) fn exponents(&self) -> &[u8] {
        let panels = self.out_features.div_ceil(LANES);
        &self.memory.as_slice::<u8>()[panels * (self.panel_bytes() + bases_len(self.quads))..]
    }

    /// Row `row` (the weights of output `row`) as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (row / LANES, row % LANES);
        let (quads, panels) = self.panels(panel);
        for (input, value) in out.iter_mut().enumerate() {
            *value = decode(quads, panels.bases, input, lane).to_f32();
        }
        let own = self.first_exceptions[panel] as usize..self.first_exceptions[panel + 1] as usize;
        for exception in self.exceptions[own].iter().filter(|exception| usize::from(exception.lane) == lane) {
            out[exception.input as usize] = exception.value.to_f32();
        }
    }
}

impl Sizes {
    fn of(in_features: usize, out_features: usize, kernels: &Kernels) -> Self {
        let quads = in_features.div_ceil(QUAD_INPUTS);
        let steps = quads * QUAD_INPUTS / STEP_INPUTS;
        Sizes {
            quads,
            panels: out_features.div_ceil(LANES),
            panel_bytes: quads * QUAD_BYTES,
            bases_len: bases_len(quads),
            exponents_len: kernels.fixed.map_or(0, |fixed| (fixed.exponents_len)(steps)),
        }
    }
}

/// Lowers the powers of two of groups in which an exception would become another integer than zero, for products in fixed point leave
/// exceptions out. An exception is below 2^-14 of its group's largest power of two and that becomes 2^14 or less, so that
/// one less is enough.
fn lower_exponents(exponents: &mut [u8], exceptions: &[Exception]) {
    for exception in exceptions {
        let exponent = &mut exponents[exception.input as usize / GROUP * LANES + usize::from(exception.lane)];
        let power = exponent.cast_signed();
        let value = exception.value.to_f32().abs();
        if value.is_finite() && value * f32::from(power).exp2() > 0.5 {
            *exponent = (power - 1).cast_unsigned();
        }
    }
}
