//! The kernels of a packed layer, for operations that multiply parts of several: experts and heads.

use std::ops::Range;

use super::compact_linear::CompactLinear;
use super::kernels::{
    GroupLayout, Kernels, LANES, MatmulArgs, PackArgs, QuantizedKernels, TypedKernels, padded_tile,
    padded_tokens,
};
use super::packed_linear::{PackedLinear, Storage};
use crate::DType;

/// A packed layer with the kernels for how it is stored.
#[derive(Clone, Copy)]
pub(super) struct LinearKernels<'a> {
    in_features: usize,
    out_features: usize,
    kind: Kind<'a>,
}

#[derive(Clone, Copy)]
enum Kind<'a> {
    Plain { kernels: &'a TypedKernels, max_tile: usize, steps: usize, weights: &'a [u8] },
    Compact { kernels: &'a TypedKernels, max_tile: usize, steps: usize, linear: &'a CompactLinear },
    Quantized { kernels: &'a QuantizedKernels, layout: &'a GroupLayout, weights: &'a [u8] },
}

impl<'a> LinearKernels<'a> {
    /// Those of `linear`.
    pub(super) fn of(kernels: &'a Kernels, linear: &'a PackedLinear) -> Self {
        let (in_features, out_features) = (linear.in_features(), linear.out_features());
        let max_tile = kernels.max_tile;
        let kind = match &linear.0 {
            Storage::Plain(linear) => Kind::Plain {
                kernels: kernels.typed(linear.dtype),
                max_tile,
                steps: linear.steps,
                weights: linear.memory.as_slice(),
            },
            Storage::Compact(linear) => {
                Kind::Compact { kernels: kernels.typed(DType::BF16), max_tile, steps: linear.steps(), linear }
            }
            Storage::Quantized(linear) => Kind::Quantized {
                kernels: &kernels.quantized,
                layout: &linear.layout,
                weights: linear.memory.as_slice(),
            },
        };
        Self { in_features, out_features, kind }
    }

    /// Most rows that are packed together.
    pub(super) fn max_tile(&self) -> usize {
        match self.kind {
            Kind::Plain { max_tile, .. } | Kind::Compact { max_tile, .. } => max_tile,
            Kind::Quantized { kernels, .. } => kernels.max_tokens,
        }
    }

    pub(super) fn in_features(&self) -> usize {
        self.in_features
    }

    pub(super) fn out_features(&self) -> usize {
        self.out_features
    }

    /// Panels of sixteen outputs.
    pub(super) fn panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    /// The outputs of some panels.
    pub(super) fn columns(&self, panels: &Range<usize>) -> Range<usize> {
        panels.start * LANES..(panels.end * LANES).min(self.out_features)
    }

    /// Elements of a tile of so many rows once it is packed.
    pub(super) fn packed_len(&self, rows: usize) -> usize {
        match self.kind {
            Kind::Plain { kernels, steps, .. } | Kind::Compact { kernels, steps, .. } => {
                padded_tile(rows) * steps * kernels.step_inputs
            }
            Kind::Quantized { layout, .. } => padded_tokens(rows) * layout.row_elements(),
        }
    }

    /// Packs a tile, `[rows, in_features]`, to the start of `out`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    pub(super) unsafe fn pack(&self, x: &[f32], rows: usize, out: &mut [u32]) {
        let width = self.in_features;
        let args = PackArgs { x: &x[..rows * width], width, rows, out: &mut out[..self.packed_len(rows)] };
        // SAFETY: as the caller says.
        unsafe {
            match self.kind {
                Kind::Plain { kernels, .. } | Kind::Compact { kernels, .. } => (kernels.pack)(args),
                Kind::Quantized { kernels, layout, .. } => (kernels.pack)(args, layout),
            }
        }
    }

    /// The columns of `panels` in the results `[rows, out_features]`.
    ///
    /// # Safety
    /// The processor has the instruction set; `x` has packed rows, tile after tile; nobody else uses these results now.
    pub(super) unsafe fn multiply(
        &self,
        panels: Range<usize>,
        (x, rows): (*const u32, usize),
        out: *mut f32,
    ) {
        // SAFETY: as the caller says.
        unsafe { self.run((0, panels), (x, rows), (out, self.out_features)) };
    }

    /// The columns of `panels` alone, `[rows, columns]`.
    ///
    /// # Safety
    /// As for [`LinearKernels::multiply`].
    pub(super) unsafe fn multiply_part(
        &self,
        panels: Range<usize>,
        (x, rows): (*const u32, usize),
        out: &mut [f32],
    ) {
        let columns = self.columns(&panels).len();
        assert!(out.len() >= rows * columns, "{rows} x {columns} results in {} elements", out.len());
        // SAFETY: as the caller says.
        unsafe { self.run((panels.start, 0..panels.len()), (x, rows), (out.as_mut_ptr(), columns)) };
    }

    /// Some panels, counted from panel `first` on.
    ///
    /// # Safety
    /// As for [`LinearKernels::multiply`].
    unsafe fn run(
        &self,
        (first, panels): (usize, Range<usize>),
        (x, rows): (*const u32, usize),
        (out, out_width): (*mut f32, usize),
    ) {
        let args = |weights: &[u8], steps| {
            let weights = weights.as_ptr();
            MatmulArgs { weights, panels: panels.clone(), steps, x, rows, out, out_width, bias: None }
        };
        // SAFETY: the weights are those of the layer; the rest is as the caller says.
        unsafe {
            match self.kind {
                Kind::Plain { kernels, steps, weights, .. } => {
                    (kernels.matmul)(&args(&weights[first * steps * kernels.step_bytes..], steps));
                }
                Kind::Compact { steps, linear, .. } => {
                    let (weights, compact) = linear.panels(first);
                    (linear.kernels().matmul)(&args(weights, steps), &compact, &mut []);
                }
                Kind::Quantized { kernels, layout, weights } => {
                    let weights = &weights[first * layout.panel_bytes()..];
                    (kernels.matmul)(&args(weights, layout.groups), layout);
                }
            }
        }
    }
}

/// At least `len` elements; the warm-up brings them to their final number.
pub(super) fn grow<T: Copy + Default>(memory: &mut Vec<T>, len: usize) {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
}
