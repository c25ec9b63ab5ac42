//! Normalisations, row by row.

use std::ops::Range;

use super::buffer::CpuBuffer;
use super::kernels::Kernels;
use super::rows::{for_each_row, for_each_row_of_two};
use super::threads::Threads;

/// A normalisation of rows.
#[derive(Clone, Copy)]
pub(super) enum RowNorm<'a> {
    /// RMSNorm with a weight.
    Rms { weight: &'a [f32], eps: f32 },
    /// LayerNorm with a weight and a bias.
    Layer { weight: &'a [f32], bias: &'a [f32], eps: f32 },
}

impl RowNorm<'_> {
    /// `out = norm(x)`.
    pub(super) fn apply(
        &self,
        (kernels, threads): (&Kernels, &mut Threads),
        x: &CpuBuffer,
        out: &mut CpuBuffer,
    ) {
        let width = x.width();
        self.check(width, out);
        out.resize(x.rows());
        for_each_row(threads, out, &|row, out| {
            self.row(kernels, &x.as_slice()[row * width..(row + 1) * width], out);
        });
    }

    /// `x = norm(x)`.
    pub(super) fn apply_in_place(&self, (kernels, threads): (&Kernels, &mut Threads), x: &mut CpuBuffer) {
        self.check(x.width(), x);
        // SAFETY: the processor has the instruction set.
        for_each_row(threads, x, &|_, row| unsafe {
            match *self {
                RowNorm::Rms { weight, eps } => (kernels.rms_norm_in_place)(row, weight, eps),
                RowNorm::Layer { weight, bias, eps } => {
                    (kernels.layer_norm_in_place)(row, (weight, bias), eps);
                }
            }
        });
    }

    /// `residual += delta; out = norm(residual)`.
    pub(super) fn add_and_apply(
        &self,
        (kernels, threads): (&Kernels, &mut Threads),
        residual: &mut CpuBuffer,
        delta: &CpuBuffer,
        out: &mut CpuBuffer,
    ) {
        let width = delta.width();
        assert!(
            residual.width() == width && residual.rows() == delta.rows(),
            "residual {} x {}, delta {} x {width}",
            residual.rows(),
            residual.width(),
            delta.rows()
        );
        self.check(width, out);
        out.resize(delta.rows());
        for_each_row_of_two(threads, (residual, out), &|row, sum, out| {
            // SAFETY: the processor has the instruction set.
            unsafe { (kernels.add)(sum, &delta.as_slice()[row * width..(row + 1) * width]) };
            self.row(kernels, sum, out);
        });
    }

    fn check(&self, width: usize, out: &CpuBuffer) {
        let fits = match self {
            RowNorm::Rms { weight, .. } => weight.len() == width,
            RowNorm::Layer { weight, bias, .. } => weight.len() == width && bias.len() == width,
        };
        assert!(fits && out.width() == width, "a norm of another width than {width}");
    }

    fn row(&self, kernels: &Kernels, x: &[f32], out: &mut [f32]) {
        // SAFETY: the processor has the instruction set.
        unsafe {
            match *self {
                RowNorm::Rms { weight, eps } => (kernels.rms_norm)(x, weight, eps, out),
                RowNorm::Layer { weight, bias, eps } => (kernels.layer_norm)(x, (weight, bias), eps, out),
            }
        }
    }
}

/// LayerNorm without a bias of each head in the columns, in place, each with its part of the weight.
pub(super) fn layer_norm_heads(
    threads: &mut Threads,
    x: &mut CpuBuffer,
    columns: Range<usize>,
    head_dim: usize,
    (weight, eps): (&[f32], f32),
) {
    assert!(
        columns.end <= x.width() && weight.len() == columns.len() && columns.len().is_multiple_of(head_dim),
        "heads of {head_dim} in the columns {columns:?} with a weight of {}",
        weight.len()
    );
    for_each_row(threads, x, &|_, row| {
        let heads = row[columns.clone()].chunks_exact_mut(head_dim).zip(weight.chunks_exact(head_dim));
        for (head, weight) in heads {
            let mean = head.iter().sum::<f32>() / head_dim as f32;
            head.iter_mut().for_each(|x| *x -= mean);
            let variance = sum_of_squares(head) / head_dim as f32;
            let factor = 1.0 / (variance + eps).sqrt();
            head.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * factor * weight);
        }
    });
}

/// This rank's share of each row's sum of squares: it is divided by the number of ranks that bring the same columns.
pub(super) fn squares(
    threads: &mut Threads,
    x: &CpuBuffer,
    columns: Range<usize>,
    copies: usize,
    out: &mut CpuBuffer,
) {
    assert!(columns.end <= x.width() && out.width() == 1, "columns {columns:?} of {}", x.width());
    let width = x.width();
    out.resize(x.rows());
    for_each_row(threads, out, &|row, out| {
        let columns = row * width + columns.start..row * width + columns.end;
        out[0] = sum_of_squares(&x.as_slice()[columns]) / copies as f32;
    });
}

/// Multiplies the columns by what the sums of squares of `total_width` elements and the weight say.
pub(super) fn scale_by_squares(
    threads: &mut Threads,
    x: &mut CpuBuffer,
    columns: Range<usize>,
    (squares, total_width): (&CpuBuffer, usize),
    (weight, eps): (&[f32], f32),
) {
    assert!(weight.len() == columns.len() && squares.rows() == x.rows(), "a norm of {columns:?}");
    for_each_row(threads, x, &|row, x| {
        let factor = 1.0 / (squares.as_slice()[row] / total_width as f32 + eps).sqrt();
        x[columns.clone()].iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * factor * weight);
    });
}

/// Sixteen sums side by side, as the compiler makes vectors of.
fn sum_of_squares(x: &[f32]) -> f32 {
    let (whole, rest) = x.as_chunks::<16>();
    let mut sums = [0.0_f32; 16];
    for chunk in whole {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * x);
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}
