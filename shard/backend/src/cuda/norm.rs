//! RMSNorm and LayerNorm.

use std::ops::Range;
use std::sync::Arc;

use super::driver::Context;
use super::launch::{Launch, Queue, args};
use super::module::{ByType, ByTypes, MIXED_TYPES, Module};
use super::{CudaBuffer, CudaVector};
use crate::{BackendError, DType, SplitNorm};

/// Elements a thread has of a row, at least; up to twice as many stay in registers, see `norm.cu`.
const ELEMENTS_A_THREAD: usize = 8;
/// More threads than these take longer to meet than to read twice as much.
const MANY_THREADS: usize = 512;
const MAX_THREADS: usize = 1024;
/// Threads of a block that normalises heads, one warp each.
const HEAD_THREADS: usize = 128;

/// Kernels.
pub(super) struct Norms {
    rms: ByTypes,
    layer: ByTypes,
    add_rms: ByTypes,
    add_layer: ByTypes,
    add_rms_rounded: ByType,
    rms_heads: ByType,
    layer_heads: ByType,
    squares: ByType,
    scale_by_squares: ByType,
}

/// One block for each row.
fn row_launch(rows: usize, width: usize) -> ([u32; 3], u32) {
    let vectors = width.div_ceil(ELEMENTS_A_THREAD);
    let vectors = if vectors > MANY_THREADS { vectors.div_ceil(2) } else { vectors };
    let threads = vectors.next_multiple_of(32).clamp(32, MAX_THREADS);
    ([rows as u32, 1, 1], threads as u32)
}

/// That a norm's parameters and result are as wide as its input.
fn check_widths(width: usize, others: &[usize]) {
    assert!(others.iter().all(|&other| other == width), "a norm of another width than {width}: {others:?}");
}

/// That the residual is what `delta` can be added to.
fn check_residual(residual: &CudaBuffer, delta: &CudaBuffer) {
    assert!(
        residual.width() == delta.width()
            && residual.rows() == delta.rows()
            && residual.dtype() == DType::F32,
        "residual {} x {} of {}, delta {} x {}; the residual stream is float32",
        residual.rows(),
        residual.width(),
        residual.dtype(),
        delta.rows(),
        delta.width()
    );
}

impl Norms {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "norm")?;
        Ok(Self {
            rms: module.by_types("rms_norm", &MIXED_TYPES)?,
            layer: module.by_types("layer_norm", &MIXED_TYPES)?,
            add_rms: module.by_types("add_rms_norm", &MIXED_TYPES)?,
            add_layer: module.by_types("add_layer_norm", &MIXED_TYPES)?,
            add_rms_rounded: module.by_type("add_rms_norm_rounded")?,
            rms_heads: module.by_type("rms_norm_heads")?,
            layer_heads: module.by_type("layer_norm_heads")?,
            squares: module.by_type("squares")?,
            scale_by_squares: module.by_type("scale_by_squares")?,
        })
    }

    /// `out = rms_norm(x)`.
    pub(super) fn rms(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, eps): (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check_widths(x.width(), &[weight.width, out.width()]);
        out.resize(x.rows());
        let function = self.rms.of(x.dtype(), out.dtype())?;
        let (grid, block) = row_launch(x.rows(), x.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), weight.ptr(), eps, out.ptr(), x.width() as i32])
    }

    /// `x = rms_norm(x)`.
    pub(super) fn rms_in_place(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        check_widths(x.width(), &[weight.width]);
        let function = self.rms.of(x.dtype(), x.dtype())?;
        let (grid, block) = row_launch(x.rows(), x.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), weight.ptr(), eps, x.ptr(), x.width() as i32])
    }

    /// `residual += delta; out = rms_norm(residual)`.
    pub(super) fn add_rms(
        &self,
        queue: &Queue,
        (residual, delta): (&mut CudaBuffer, &CudaBuffer),
        (weight, eps): (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check_residual(residual, delta);
        check_widths(delta.width(), &[weight.width, out.width()]);
        out.resize(delta.rows());
        let function = self.add_rms.of(delta.dtype(), out.dtype())?;
        let (grid, block) = row_launch(delta.rows(), delta.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        let width = delta.width() as i32;
        queue.launch(&launch, args![residual.ptr(), delta.ptr(), weight.ptr(), eps, out.ptr(), width])
    }

    /// The same with a row's numbers rounded to eight bits; false: it is too wide for that.
    pub(super) fn add_rms_rounded(
        &self,
        queue: &Queue,
        (residual, delta): (&mut CudaBuffer, &CudaBuffer),
        (weight, eps): (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<bool, BackendError> {
        check_residual(residual, delta);
        check_widths(delta.width(), &[weight.width, out.width()]);
        let (grid, block) = row_launch(delta.rows(), delta.width());
        let most = 2 * ELEMENTS_A_THREAD * block as usize;
        if delta.width() > most || !delta.width().is_multiple_of(ELEMENTS_A_THREAD) {
            return Ok(false);
        }
        let (numbers, scales) = out.round(delta.rows());
        let launch =
            Launch { function: self.add_rms_rounded.of(delta.dtype()), grid, block, shared_bytes: 0 };
        let (to, from, width) = (residual.ptr(), delta.ptr(), delta.width() as i32);
        queue.launch(&launch, args![to, from, weight.ptr(), eps, numbers, scales, width])?;
        Ok(true)
    }

    /// `out = layer_norm(x)`.
    pub(super) fn layer(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check_widths(x.width(), &[weight.width, bias.width, out.width()]);
        out.resize(x.rows());
        let function = self.layer.of(x.dtype(), out.dtype())?;
        let (grid, block) = row_launch(x.rows(), x.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), weight.ptr(), bias.ptr(), eps, out.ptr(), x.width() as i32])
    }

    /// `x = layer_norm(x)`.
    pub(super) fn layer_in_place(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
    ) -> Result<(), BackendError> {
        check_widths(x.width(), &[weight.width, bias.width]);
        let function = self.layer.of(x.dtype(), x.dtype())?;
        let (grid, block) = row_launch(x.rows(), x.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), weight.ptr(), bias.ptr(), eps, x.ptr(), x.width() as i32])
    }

    /// `residual += delta; out = layer_norm(residual)`.
    pub(super) fn add_layer(
        &self,
        queue: &Queue,
        (residual, delta): (&mut CudaBuffer, &CudaBuffer),
        (weight, bias, eps): (&CudaVector, &CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check_residual(residual, delta);
        check_widths(delta.width(), &[weight.width, bias.width, out.width()]);
        out.resize(delta.rows());
        let function = self.add_layer.of(delta.dtype(), out.dtype())?;
        let (grid, block) = row_launch(delta.rows(), delta.width());
        let launch = Launch { function, grid, block, shared_bytes: 0 };
        let width = delta.width() as i32;
        let (to, from) = (residual.ptr(), delta.ptr());
        queue.launch(&launch, args![to, from, weight.ptr(), bias.ptr(), eps, out.ptr(), width])
    }

    /// RMSNorm of each head in place, all with the same weight.
    pub(super) fn rms_heads(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        let launch = (self.rms_heads, weight.width);
        heads(queue, launch, x, columns, (weight, eps))
    }

    /// LayerNorm without a bias of each head in place, each with its part of the weight.
    pub(super) fn layer_heads(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        head_dim: usize,
        (weight, eps): (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        assert_eq!(weight.width, columns.len(), "a weight for heads in the columns {columns:?}");
        heads(queue, (self.layer_heads, head_dim), x, columns, (weight, eps))
    }

    /// This rank's share of each row's sum of squares: it is divided by the number of ranks that bring the same columns.
    pub(super) fn squares(
        &self,
        queue: &Queue,
        x: &CudaBuffer,
        columns: Range<usize>,
        copies: usize,
        squares: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        assert!(
            columns.end <= x.width() && squares.width() == 1 && squares.dtype() == DType::F32,
            "squares of the columns {columns:?} of {} in rows of {}",
            x.width(),
            squares.width()
        );
        squares.resize(x.rows());
        let (grid, block) = row_launch(x.rows(), columns.len());
        let launch = Launch { function: self.squares.of(x.dtype()), grid, block, shared_bytes: 0 };
        let (width, first, count) = (x.width() as i32, columns.start as i32, columns.len() as i32);
        let share = 1.0 / copies as f32;
        queue.launch(&launch, args![x.ptr(), width, first, count, share, squares.ptr()])
    }

    /// Multiplies the columns by what the sums of squares over all ranks and the weight say.
    pub(super) fn scale_by_squares(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        norm: SplitNorm<'_, CudaVector>,
        squares: &CudaBuffer,
    ) -> Result<(), BackendError> {
        let SplitNorm { weight, eps, total_width, .. } = norm;
        assert!(
            weight.width == columns.len() && squares.rows() == x.rows(),
            "a norm of the columns {columns:?} with a weight of {}",
            weight.width
        );
        let (grid, block) = row_launch(x.rows(), columns.len());
        let launch = Launch { function: self.scale_by_squares.of(x.dtype()), grid, block, shared_bytes: 0 };
        let (width, first, count) = (x.width() as i32, columns.start as i32, columns.len() as i32);
        let total = total_width as f32;
        queue.launch(&launch, args![x.ptr(), width, first, count, squares.ptr(), total, weight.ptr(), eps])
    }
}

/// Normalises heads of some size in place.
fn heads(
    queue: &Queue,
    (functions, head_dim): (ByType, usize),
    x: &mut CudaBuffer,
    columns: Range<usize>,
    (weight, eps): (&CudaVector, f32),
) -> Result<(), BackendError> {
    assert!(
        columns.start <= columns.end && columns.end <= x.width() && columns.len().is_multiple_of(head_dim),
        "heads of {head_dim} in the columns {columns:?} of {}",
        x.width()
    );
    let num_heads = columns.len() / head_dim;
    let blocks = (x.rows() * num_heads).div_ceil(HEAD_THREADS / 32);
    let launch = Launch {
        function: functions.of(x.dtype()),
        grid: [blocks as u32, 1, 1],
        block: HEAD_THREADS as u32,
        shared_bytes: 0,
    };
    let (rows, width, first) = (x.rows() as i32, x.width() as i32, columns.start as i32);
    let (num_heads, head_dim) = (num_heads as i32, head_dim as i32);
    queue.launch(&launch, args![x.ptr(), weight.ptr(), eps, rows, width, first, num_heads, head_dim])
}
