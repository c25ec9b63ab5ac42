//! Descriptions of matrices for Hopper's copy engine.

use std::collections::HashMap;
use std::ffi::c_void;
use std::{mem, ptr};

use cudarc::driver::sys;

use super::driver::{DevicePtr, check};
use crate::{BackendError, DType};

/// Descriptions that are kept: prompts have many lengths, and the driver takes a microsecond for each.
const MAX_MAPS: usize = 1 << 14;

/// Descriptions that were made.
#[derive(Default)]
pub(super) struct TensorMaps(HashMap<Boxes, sys::CUtensorMap>);

impl TensorMaps {
    /// The description of a matrix.
    pub(super) fn of(&mut self, boxes: Boxes) -> Result<sys::CUtensorMap, BackendError> {
        if let Some(map) = self.0.get(&boxes) {
            return Ok(*map);
        }
        if self.0.len() >= MAX_MAPS {
            self.0.clear();
        }
        let map = boxes.map()?;
        self.0.insert(boxes, map);
        Ok(map)
    }
}

/// A matrix `[rows, columns]`, copied in boxes whose rows of 128 bytes have their chunks of 16 bytes exchanged; what lies
/// outside is zero, and not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Boxes {
    pub(super) address: DevicePtr,
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// From one row to the next.
    pub(super) row_bytes: usize,
    /// Rows and columns of a box.
    pub(super) box_size: [usize; 2],
}

impl Boxes {
    /// The driver's description.
    pub(super) fn map(&self) -> Result<sys::CUtensorMap, BackendError> {
        let sizes = [self.columns as u64, self.rows as u64];
        let strides = [self.row_bytes as u64];
        let boxes = [self.box_size[1] as u32, self.box_size[0] as u32];
        encode((self.address, self.dtype), &sizes, &strides, &boxes)
    }

    /// The same matrix in blocks of 128 bytes of a row: a box has `box_size[0]` rows of as many whole blocks as `box_size[1]`
    /// columns are, a block's rows one after the other. Columns are whole blocks.
    pub(super) fn map_of_blocks(&self) -> Result<sys::CUtensorMap, BackendError> {
        let sizes = [BLOCK_COLUMNS as u64, self.rows as u64, (self.columns / BLOCK_COLUMNS) as u64];
        let strides = [self.row_bytes as u64, 2 * BLOCK_COLUMNS as u64];
        let boxes =
            [BLOCK_COLUMNS, self.box_size[0], self.box_size[1] / BLOCK_COLUMNS].map(|size| size as u32);
        encode((self.address, self.dtype), &sizes, &strides, &boxes)
    }
}

/// Elements of a row whose chunks are exchanged: 128 bytes.
const BLOCK_COLUMNS: usize = 64;

/// The driver's description of a tensor of as many dimensions as there are `sizes`, the innermost first, in bytes from one to the
/// next but for the innermost.
fn encode<const RANK: usize>(
    (address, dtype): (DevicePtr, DType),
    sizes: &[u64; RANK],
    strides: &[u64],
    boxes: &[u32; RANK],
) -> Result<sys::CUtensorMap, BackendError> {
    assert_eq!(strides.len() + 1, RANK, "strides of a tensor");
    let dtype = match dtype {
        DType::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let steps = [1_u32; RANK];
    // SAFETY: a map is plain data; the driver fills it in.
    let mut map: sys::CUtensorMap = unsafe { mem::zeroed() };
    let base = ptr::with_exposed_provenance_mut::<c_void>(address as usize);
    // SAFETY: the arrays have as many elements as the rank says, the strides one fewer.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            dtype,
            RANK as u32,
            base,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check(&format!("describing a tensor of {sizes:?} for bulk copies"), code)?;
    Ok(map)
}
