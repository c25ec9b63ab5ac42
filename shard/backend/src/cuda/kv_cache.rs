//! The paged KV cache on the device.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::Argument;
use super::tensor_map::Boxes;
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
        let is_hopper = context.compute_capability()? == (9, 0);
        if let Some(dtype) = cache.box_dtype().filter(|_| is_hopper) {
            cache.pages = (0..layout.num_layers)
                .map(|layer| {
                    Ok(Pages {
                        keys: cache.tensor_map(dtype, cache.keys(layer))?,
                        values: cache.tensor_map(dtype, cache.values(layer))?,
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

    /// Its elements' type where tensor copies can read it for the kernels: their coordinates are `i32`, and elements of eight bits
    /// would have to be widened.
    fn box_dtype(&self) -> Option<DType> {
        let fits = self.layout.head_dim.is_multiple_of(BOX_COLUMNS)
            && (1..=i32::MAX as usize).contains(&self.rows());
        match self.layout.dtype {
            KvDType::Plain(dtype @ (DType::BF16 | DType::F16)) if fits => Some(dtype),
            _ => None,
        }
    }

    /// `[rows, head_dim]` at `address` in boxes of one page and [`BOX_COLUMNS`], whose chunks of 16 bytes are exchanged.
    fn tensor_map(&self, dtype: DType, address: DevicePtr) -> Result<sys::CUtensorMap, BackendError> {
        let Self { layout, .. } = self;
        let boxes = Boxes {
            address,
            dtype,
            rows: self.rows(),
            columns: layout.head_dim,
            row_bytes: layout.head_dim * dtype.size_bytes(),
            box_size: [PAGE_KEYS, BOX_COLUMNS],
        };
        boxes.map()
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
