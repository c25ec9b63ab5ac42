//! The kernels of a packed layer, for operations that multiply parts of several: experts and heads.

use std::ops::Range;

use super::kernels::{Kernels, LANES, MatmulArgs, PackArgs, TypedKernels, padded_tile};
use super::linear::PackedLinear;

/// A packed layer with the kernels for how it is stored.
#[derive(Clone, Copy)]
pub(super) struct LinearKernels<'a> {
    linear: &'a PackedLinear,
    typed: &'a TypedKernels,
    /// Most rows that are packed together.
    pub(super) max_tile: usize,
}

impl<'a> LinearKernels<'a> {
    /// Those of `linear`.
    pub(super) fn of(kernels: &'a Kernels, linear: &'a PackedLinear) -> Self {
        Self { linear, typed: kernels.typed(linear.dtype), max_tile: kernels.max_tile }
    }

    pub(super) fn in_features(&self) -> usize {
        self.linear.in_features
    }

    pub(super) fn out_features(&self) -> usize {
        self.linear.out_features
    }

    /// Panels of sixteen outputs.
    pub(super) fn panels(&self) -> usize {
        self.out_features().div_ceil(LANES)
    }

    /// The outputs of some panels.
    pub(super) fn columns(&self, panels: &Range<usize>) -> Range<usize> {
        panels.start * LANES..(panels.end * LANES).min(self.out_features())
    }

    /// Elements of a packed row.
    pub(super) fn row_elements(&self) -> usize {
        self.linear.steps * self.typed.step_inputs
    }

    /// Rows that a tile of so many takes once it is packed.
    pub(super) fn padded(&self, rows: usize) -> usize {
        padded_tile(rows)
    }

    /// Packs a tile, `[rows, in_features]`, to the start of `out`.
    ///
    /// # Safety
    /// The processor has the instruction set.
    pub(super) unsafe fn pack(&self, x: &[f32], rows: usize, out: &mut [u32]) {
        let out = &mut out[..self.padded(rows) * self.row_elements()];
        let width = self.in_features();
        // SAFETY: as the caller says.
        unsafe { (self.typed.pack)(PackArgs { x: &x[..rows * width], width, rows, out }) };
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
        let weights = self.linear.memory.as_slice::<u8>();
        // SAFETY: as the caller says.
        unsafe { self.run((weights, panels), (x, rows), (out, self.out_features())) };
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
        let skipped = panels.start * self.linear.steps * self.typed.step_bytes;
        let weights = &self.linear.memory.as_slice::<u8>()[skipped..];
        assert!(out.len() >= rows * columns, "{rows} x {columns} results in {} elements", out.len());
        // SAFETY: as the caller says.
        unsafe { self.run((weights, 0..panels.len()), (x, rows), (out.as_mut_ptr(), columns)) };
    }

    /// # Safety
    /// As for [`LinearKernels::multiply`].
    unsafe fn run(
        &self,
        (weights, panels): (&[u8], Range<usize>),
        (x, rows): (*const u32, usize),
        (out, out_width): (*mut f32, usize),
    ) {
        let args = MatmulArgs {
            weights: weights.as_ptr(),
            panels,
            steps: self.linear.steps,
            x,
            rows,
            out,
            out_width,
            bias: None,
        };
        // SAFETY: the weights are those of the layer; the rest is as the caller says.
        unsafe { (self.typed.matmul)(&args) };
    }
}

/// At least `len` elements; the warm-up brings them to their final number.
pub(super) fn grow<T: Copy + Default>(memory: &mut Vec<T>, len: usize) {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
}
