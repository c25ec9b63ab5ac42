//! The paged KV cache on the device.

use std::sync::Arc;

use super::driver::{Context, DeviceMemory, DevicePtr};
use crate::{BackendError, KvLayout};

/// Keys of a head that the kernels take to lie in one run.
pub(super) const PAGE_KEYS: usize = 16;

/// Keys and values of all layers: for each layer keys, then values, each `[num_blocks, num_kv_heads, block_size, head_dim]`.
pub struct CudaKvCache {
    memory: DeviceMemory,
    layout: KvLayout,
    num_blocks: usize,
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
        Ok(Self { memory, layout, num_blocks })
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
