//! The shape of the paged KV cache.

use crate::DType;

/// Shape of one rank's paged KV cache. A *block* is `block_size` tokens; a *slot* is `block * block_size + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers that have a cache.
    pub num_layers: usize,
    /// KV heads of this rank.
    pub num_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of one block.
    pub block_size: usize,
    /// Element type.
    pub dtype: DType,
}

impl KvLayout {
    /// Bytes of one block over all layers, keys and values.
    pub const fn block_bytes(&self) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_size * self.dtype.size_bytes()
    }
}
