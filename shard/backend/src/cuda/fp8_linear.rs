//! Weights of eight bits: on their way to the device, and rounded there.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Once};

use cudarc::driver::sys;

use super::driver::{Context, DeviceMemory, DevicePtr, check};
use super::launch::{Launch, Queue, args};
use super::module::{ByType, Function, Module};
use super::upload::{Uploader, convert_row};
use super::{CudaBuffer, CudaLinear};
use crate::{BackendError, DType, Fp8Matrix, HostMatrix};

const THREADS: u32 = 256;
/// Elements that the kernels read as one.
const PIECE: usize = 16;
/// Bytes of plain weights that wait to be rounded.
const STAGING_BYTES: usize = 64 << 20;

/// Says that weights of eight bits take more memory than they could, once a process.
pub(super) fn say_once(dtype: DType) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::info!(
            "fp8 weights with scales of blocks, of experts, or of a float32 model run as {dtype} on CUDA"
        );
    });
}

/// Rows of plain numbers and rows of eight bits with a scale each.
pub(super) struct Rounding {
    quantize: ByType,
    gate: ByType,
    dequantize: ByType,
    add_bias: ByType,
}

impl Rounding {
    /// Loads the kernels.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "fp8_linear")?;
        Ok(Self {
            quantize: module.by_type("fp8_quantize")?,
            gate: module.by_type("fp8_gate")?,
            dequantize: module.by_type("fp8_dequantize")?,
            add_bias: module.by_type("fp8_add_bias")?,
        })
    }

    /// `out = sums + bias` of `rows` rows of float32 sums, which may be `out`.
    pub(super) fn add_bias(
        &self,
        queue: &Queue,
        (sums, bias): (DevicePtr, DevicePtr),
        [rows, width]: [usize; 2],
        (out, dtype): (DevicePtr, DType),
    ) -> Result<(), BackendError> {
        let grid = [(width as u32).div_ceil(THREADS), rows.min(1024) as u32, 1];
        let launch = Launch { function: self.add_bias.of(dtype), grid, block: THREADS, shared_bytes: 0 };
        let (rows, width) = (rows as i32, width as i32);
        queue.launch(&launch, args![sums, out, bias, rows, width])
    }

    /// Rounds `rows` rows of activations `[rows, width]` of `dtype` at `x` to `out`, whose rows lie `width` apart, with a scale each.
    pub(super) fn quantize(
        &self,
        queue: &Queue,
        (x, dtype): (DevicePtr, DType),
        [rows, width]: [usize; 2],
        (out, scales): (DevicePtr, DevicePtr),
    ) -> Result<(), BackendError> {
        let function = self.quantize.of(dtype);
        let launch = Launch { function, grid: [rows as u32, 1, 1], block: THREADS, shared_bytes: 0 };
        let (pitch, is_wide, width) = (width as i64, i32::from(width.is_multiple_of(PIECE)), width as i32);
        queue.launch(&launch, args![x, pitch, out, pitch, scales, width, is_wide])
    }

    /// `out = activation(gate) * up`, rounded row by row; the width of `out` is a multiple of 16.
    pub(super) fn gate(
        &self,
        queue: &Queue,
        gate_up: &CudaBuffer,
        activation: i32,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let rows = gate_up.rows();
        let (numbers, scales) = out.round(rows);
        let function = self.gate.of(gate_up.dtype());
        let launch = Launch { function, grid: [rows as u32, 1, 1], block: THREADS, shared_bytes: 0 };
        queue.launch(&launch, args![gate_up.ptr(), numbers, scales, out.width() as i32, activation])
    }

    /// Widens the rows `first..first + rows` of a weight to `out`, whose rows lie `out_pitch` elements apart.
    pub(super) fn dequantize(
        &self,
        queue: &Queue,
        weight: &CudaLinear,
        (first, rows): (usize, usize),
        (out, out_pitch): (DevicePtr, usize),
    ) -> Result<(), BackendError> {
        let launch = Launch {
            function: self.dequantize.of(weight.dtype),
            grid: [rows as u32, 1, 1],
            block: THREADS,
            shared_bytes: 0,
        };
        let (from, scales) = rows_of(weight, first);
        let (pitch, out_pitch, width) =
            (weight.row_stride as i64, out_pitch as i64, weight.in_features as i32);
        queue.launch(&launch, args![from, pitch, scales, out, out_pitch, width])
    }

    /// `parts`, stacked along their rows, rounded on the device with a scale a row. On the device once the uploader has finished.
    pub(super) fn quantized(
        &self,
        context: &Arc<Context>,
        uploader: &Uploader,
        parts: &[HostMatrix<'_>],
        dtype: DType,
    ) -> Result<CudaLinear, BackendError> {
        let in_features = HostMatrix::common_columns(parts)?;
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        let weight = CudaLinear::of_eight_bits(context, [out_features, in_features], dtype)?;
        let row_bytes = (in_features * dtype.size_bytes()).next_multiple_of(PIECE);
        let rows_at_once = (STAGING_BYTES / row_bytes).clamp(1, out_features.max(1));
        let staging = DeviceMemory::new(context, rows_at_once * row_bytes, "weights to be rounded")?;
        let mut done = 0;
        for part in parts {
            for first in (0..part.rows).step_by(rows_at_once) {
                let rows = rows_at_once.min(part.rows - first);
                let fill = |row: usize, out: &mut [u8]| convert_row(part, row, dtype, out);
                uploader.rows(first..first + rows, &fill, (staging.ptr(), row_bytes))?;
                let (to, scales) = rows_of(&weight, done);
                let (from, pitch) = (staging.ptr(), (row_bytes / dtype.size_bytes()) as i64);
                let (out_pitch, width) = (weight.row_stride as i64, in_features as i32);
                let is_wide = i32::from(in_features.is_multiple_of(PIECE));
                let arguments = args![from, pitch, to, out_pitch, scales, width, is_wide];
                launch_rows(uploader, self.quantize.of(dtype), rows, arguments)?;
                done += rows;
            }
        }
        // The staging memory is gone after this.
        uploader.finish()?;
        Ok(weight)
    }

    /// A weight of eight bits as a plain one. On the device once the uploader has finished.
    pub(super) fn dequantized(
        &self,
        context: &Arc<Context>,
        uploader: &Uploader,
        weight: &CudaLinear,
    ) -> Result<CudaLinear, BackendError> {
        let plain = CudaLinear::plain_like(context, weight)?;
        let (from, scales) = rows_of(weight, 0);
        let (to, pitch, out_pitch) = (plain.ptr(), weight.row_stride as i64, plain.row_stride as i64);
        let width = weight.in_features as i32;
        let arguments = args![from, pitch, scales, to, out_pitch, width];
        launch_rows(uploader, self.dequantize.of(weight.dtype), weight.out_features, arguments)?;
        // The other weight is gone after this.
        uploader.finish()?;
        Ok(plain)
    }
}

impl CudaLinear {
    /// Stacks `parts`, which have a scale a row, along their rows. On the device once the uploader has finished.
    pub(super) fn from_fp8(
        context: &Arc<Context>,
        uploader: &Uploader,
        parts: &[Fp8Matrix<'_>],
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let refuse =
            |reason: String| BackendError::Device { operation: "packing a weight".to_owned(), reason };
        let in_features = parts.first().map_or(0, |part| part.cols);
        for (index, part) in parts.iter().enumerate() {
            let needed = part.rows.saturating_sub(1) * part.row_stride + part.cols;
            if part.cols != in_features || part.bytes.len() < needed || part.scales.len() != part.rows {
                return Err(refuse(format!(
                    "part {index} has {} x {} numbers of eight bits in {} bytes with {} scales, expected {in_features} columns \
                     and a scale a row",
                    part.rows,
                    part.cols,
                    part.bytes.len(),
                    part.scales.len()
                )));
            }
        }
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        if in_features == 0 || out_features == 0 {
            return Err(refuse("it has no elements".to_owned()));
        }
        let weight = Self::of_eight_bits(context, [out_features, in_features], dtype)?;
        let mut done = 0;
        let mut scales = Vec::with_capacity(out_features);
        for part in parts {
            let fill = |row: usize, out: &mut [u8]| {
                out[..part.cols].copy_from_slice(&part.bytes[row * part.row_stride..][..part.cols]);
            };
            uploader.rows(0..part.rows, &fill, (rows_of(&weight, done).0, weight.row_stride))?;
            scales.extend_from_slice(&part.scales);
            done += part.rows;
        }
        uploader.bytes(bytemuck::cast_slice(&scales), rows_of(&weight, 0).1)?;
        Ok(weight)
    }
}

/// Addresses of a row of a weight of eight bits and of its scale.
fn rows_of(weight: &CudaLinear, row: usize) -> (DevicePtr, DevicePtr) {
    let scales = weight.scales().unwrap_or_default();
    (weight.ptr() + (row * weight.row_stride) as DevicePtr, scales + (row * size_of::<f32>()) as DevicePtr)
}

/// Launches a kernel with a block a row behind the copies.
fn launch_rows(
    uploader: &Uploader,
    function: Function,
    rows: usize,
    arguments: &mut [*mut c_void],
) -> Result<(), BackendError> {
    let stream = uploader.stream().raw();
    // SAFETY: the arguments are as many and of the types the kernel has.
    check("launching a kernel", unsafe {
        sys::cuLaunchKernel(
            function.raw,
            rows as u32,
            1,
            1,
            THREADS,
            1,
            1,
            0,
            stream,
            arguments.as_mut_ptr(),
            ptr::null_mut(),
        )
    })
}
