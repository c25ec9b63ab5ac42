//! What works on heads in strided columns: a matrix for each of them, and copies.

use std::sync::Arc;

use super::driver::{Context, DevicePtr};
use super::elementwise::check_type;
use super::launch::{Argument, Launch, Queue, args};
use super::module::{ByType, Function, Module, tensor_tile_bytes};
use super::{CudaBuffer, CudaLinear};
use crate::{BackendError, DType, HeadColumns};

const THREADS: u32 = 256;
/// Heads of a launch, see `heads.cu`.
const HEADS: usize = 64;

/// Addresses of the matrices of a launch.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Matrices([DevicePtr; HEADS]);
impl Argument for Matrices {}

/// Kernels.
pub(super) struct Heads {
    /// By rows of a tile: 32 and 128; of bfloat16 and float16.
    tensor: [(usize, [Function; 2]); 2],
    plain: ByType,
    /// By units of 16 and of 2 bytes.
    copy: [Function; 2],
}

/// Rows and weight rows of a tile of plain arithmetic, and weight rows of one on tensor cores.
const PLAIN_TILE: usize = 32;
const TENSOR_COLUMNS: usize = 128;

impl Heads {
    /// Loads them.
    /// Tiles are of one kind where results must not depend on the number of rows.
    pub(super) fn load(context: &Arc<Context>, is_deterministic: bool) -> Result<Self, BackendError> {
        let module = Module::load(context, "heads")?;
        let tensor = |rows: usize| -> Result<(usize, [Function; 2]), BackendError> {
            let function = |name: &str| -> Result<Function, BackendError> {
                let function = module.function(&format!("matmul_heads_{rows}_{name}"))?;
                function.allow_shared_memory(tensor_tile_bytes(rows))?;
                Ok(function)
            };
            Ok((rows, [function("bf16")?, function("f16")?]))
        };
        Ok(Self {
            tensor: [tensor(if is_deterministic { 128 } else { 32 })?, tensor(128)?],
            plain: module.by_type("matmul_heads_plain")?,
            copy: [module.function("copy_heads_16")?, module.function("copy_heads_2")?],
        })
    }

    /// The kernel, rows and columns of its tiles, and its shared memory: tensor cores want 16 bits and rows that are aligned to
    /// 16 bytes.
    fn matmul_kernel(&self, x: &CudaBuffer, columns: HeadColumns) -> (Function, [usize; 2], u32) {
        let HeadColumns { first, stride, width } = columns;
        let is_aligned = [x.width(), first, stride, width].iter().all(|size| size.is_multiple_of(8));
        let [few, many] = &self.tensor;
        let (rows, functions) = if x.rows() <= few.0 { few } else { many };
        let tensor = |function| (function, [*rows, TENSOR_COLUMNS], tensor_tile_bytes(*rows));
        match x.dtype() {
            DType::BF16 if is_aligned => tensor(functions[0]),
            DType::F16 if is_aligned => tensor(functions[1]),
            dtype => (self.plain.of(dtype), [PLAIN_TILE; 2], 0),
        }
    }

    /// `out[h] = x[h] weights[h]^T`.
    pub(super) fn matmul(
        &self,
        queue: &Queue,
        (x, from): (&CudaBuffer, HeadColumns),
        weights: &[CudaLinear],
        (out, to): (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        check(from, weights.len(), x);
        check(to, weights.len(), out);
        let Some(first) = weights.first() else { return Ok(()) };
        let fits = |weight: &CudaLinear| {
            (weight.in_features, weight.out_features) == (from.width, to.width) && weight.dtype == first.dtype
        };
        assert!(
            weights.iter().all(fits),
            "heads of width {} from heads of width {} by weights such as {} x {}",
            to.width,
            from.width,
            first.out_features,
            first.in_features
        );
        check_type("multiplying heads", x.dtype(), first.dtype)?;
        check_type("multiplying heads", out.dtype(), first.dtype)?;
        out.resize(x.rows());
        let (function, [tile_rows, tile_columns], shared_bytes) = self.matmul_kernel(x, from);
        for (group, weights) in weights.chunks(HEADS).enumerate() {
            let mut matrices = Matrices([0; HEADS]);
            matrices.0.iter_mut().zip(weights).for_each(|(place, weight)| *place = weight.ptr());
            let before = group * HEADS;
            let [x_columns, out_columns] = [(x.width(), from), (out.width(), to)].map(|(width, columns)| {
                [width, columns.first + before * columns.stride, columns.stride].map(|size| size as i32)
            });
            let launch = Launch {
                function,
                grid: [
                    to.width.div_ceil(tile_columns) as u32,
                    x.rows().div_ceil(tile_rows) as u32,
                    weights.len() as u32,
                ],
                block: THREADS,
                shared_bytes,
            };
            let [rows, inputs, outputs] = [x.rows(), from.width, to.width].map(|size| size as i32);
            let pitch = first.row_stride as i32;
            let ([x_width, x_first, x_stride], [out_width, out_first, out_stride]) = (x_columns, out_columns);
            queue.launch(
                &launch,
                args![
                    x.ptr(),
                    x_width,
                    x_first,
                    x_stride,
                    matrices,
                    pitch,
                    out.ptr(),
                    out_width,
                    out_first,
                    out_stride,
                    rows,
                    inputs,
                    outputs
                ],
            )?;
        }
        Ok(())
    }

    /// Copies heads from some columns to others.
    pub(super) fn copy(
        &self,
        queue: &Queue,
        (x, from): (&CudaBuffer, HeadColumns),
        num_heads: usize,
        (out, to): (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        check(from, num_heads, x);
        check(to, num_heads, out);
        assert_eq!(from.width, to.width, "heads copied into columns of another width");
        check_type("copying heads", x.dtype(), out.dtype())?;
        out.resize(x.rows());
        let size = x.dtype().size_bytes();
        let sizes = [x.width(), from.first, from.stride, out.width(), to.first, to.stride, to.width];
        let is_wide = sizes.iter().all(|elements| (elements * size).is_multiple_of(16));
        let (function, unit) = if is_wide { (self.copy[0], 16) } else { (self.copy[1], 2) };
        let [x_width, x_first, x_stride, out_width, out_first, out_stride, width] =
            sizes.map(|elements| (elements * size / unit) as i32);
        let units = num_heads * to.width * size / unit;
        let launch = Launch {
            function,
            grid: [x.rows() as u32, 1, 1],
            block: units.next_multiple_of(32).clamp(32, THREADS as usize) as u32,
            shared_bytes: 0,
        };
        let num_heads = num_heads as i32;
        queue.launch(
            &launch,
            args![
                x.ptr(),
                x_width,
                x_first,
                x_stride,
                out.ptr(),
                out_width,
                out_first,
                out_stride,
                num_heads,
                width
            ],
        )
    }
}

/// That the heads lie within the buffer and do not overlap.
fn check(columns: HeadColumns, num_heads: usize, buffer: &CudaBuffer) {
    let HeadColumns { first, stride, width } = columns;
    let end = first + num_heads.saturating_sub(1) * stride + width;
    assert!(
        end <= buffer.width() && (stride >= width || num_heads <= 1),
        "{num_heads} heads in the columns {columns:?} of {}",
        buffer.width()
    );
}
