//! The paged KV cache on the device.

use std::ffi::c_void;
use std::mem;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DeviceMemory, DevicePtr, check};
use super::launch::Argument;
use crate::{BackendError, DType, KvDType, KvLayout};

/// Keys of a head that the kernels take to lie in one run.
pub(super) const PAGE_KEYS: usize = 16;

/// Columns of a box of a tensor copy: rows of 128 bytes.
const BOX_COLUMNS: usize = 64;

/// One layer's keys and values for tensor copies: `Pages` of `attention_hopper.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Pages {
    keys: sys::CUtensorMap,
    values: sys::CUtensorMap,
}

impl Argument for Pages {}

/// Keys and values of all layers: for each layer keys, then values, each `[num_blocks, num_kv_heads, block_size, head_dim]`.
pub struct CudaKvCache {
    memory: DeviceMemory,
    layout: KvLayout,
    num_blocks: usize,
    /// For each layer, where the device copies tensors and a head is made of whole boxes.
    pages: Vec<Pages>,
}

impl CudaKvCache {
    pub(super) fn new(
        context: &Arc<Context>,
        layout: KvLayout,
        num_blocks: usize,
    ) -> Result<Self, BackendError> {
        if layout.block_size == 0 || !layout.block_size.is_multiple_of(PAGE_KEYS) {
            return Err(BackendError::Device {
                operation: "making the KV cache".to_owned(),
                reason: format!(
                    "a block of {} tokens; CUDA needs a multiple of {PAGE_KEYS}",
                    layout.block_size
                ),
            });
        }
        let bytes = layout.block_bytes().saturating_mul(num_blocks);
        let memory = DeviceMemory::zeroed(context, bytes, "the KV cache")?;
        let mut cache = Self { memory, layout, num_blocks, pages: Vec::new() };
        if context.compute_capability()? == (9, 0) && cache.has_boxes() {
            cache.pages = (0..layout.num_layers)
                .map(|layer| {
                    Ok(Pages {
                        keys: cache.tensor_map(cache.keys(layer))?,
                        values: cache.tensor_map(cache.values(layer))?,
                    })
                })
                .collect::<Result<_, BackendError>>()?;
        }
        Ok(cache)
    }

    /// Rows of one layer's keys.
    fn rows(&self) -> usize {
        self.num_blocks * self.layout.num_kv_heads * self.layout.block_size
    }

    /// Whether tensor copies can read it: their coordinates are `i32`.
    fn has_boxes(&self) -> bool {
        matches!(self.layout.dtype, KvDType::Plain(DType::BF16 | DType::F16))
            && self.layout.head_dim.is_multiple_of(BOX_COLUMNS)
            && (1..=i32::MAX as usize).contains(&self.rows())
    }

    /// `[rows, head_dim]` at `address` in boxes of one page and [`BOX_COLUMNS`], whose chunks of 16 bytes are exchanged.
    fn tensor_map(&self, address: DevicePtr) -> Result<sys::CUtensorMap, BackendError> {
        let row_bytes = self.layout.head_dim * self.layout.dtype.size_bytes();
        let sizes = [self.layout.head_dim as u64, self.rows() as u64];
        let strides = [row_bytes as u64];
        let boxes = [BOX_COLUMNS as u32, PAGE_KEYS as u32];
        let steps = [1_u32, 1];
        let dtype = match self.layout.dtype {
            KvDType::Plain(DType::F16) => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        // SAFETY: a map is plain data; the driver fills it in.
        let mut map: sys::CUtensorMap = unsafe { mem::zeroed() };
        let base = ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        // SAFETY: the arrays have as many elements as the rank says, the strides one fewer.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                dtype,
                2,
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
        check("describing the KV cache to the device", code)?;
        Ok(map)
    }

    /// For tensor copies of `layer`, where the device has them.
    pub(super) fn pages(&self, layer: usize) -> Option<&Pages> {
        self.pages.get(layer)
    }

    /// Bytes of one layer's keys, or of its values.
    fn plane_bytes(&self) -> usize {
        self.layout.block_bytes() / (2 * self.layout.num_layers) * self.num_blocks
    }

    /// Address of the keys of `layer`.
    pub(super) fn keys(&self, layer: usize) -> DevicePtr {
        self.memory.ptr() + (2 * layer * self.plane_bytes()) as DevicePtr
    }

    /// Address of the values of `layer`.
    pub(super) fn values(&self, layer: usize) -> DevicePtr {
        self.memory.ptr() + ((2 * layer + 1) * self.plane_bytes()) as DevicePtr
    }

    /// Its shape.
    pub(super) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Number of blocks.
    pub(super) fn num_blocks(&self) -> usize {
        self.num_blocks
    }
}
