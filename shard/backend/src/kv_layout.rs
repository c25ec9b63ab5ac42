//! The shape of the paged KV cache.

use std::fmt;

use crate::{DType, Fp8Format};

/// An element type of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDType {
    /// That of activations or weights.
    Plain(DType),
    /// Eight bits: values beyond the largest become the largest.
    Fp8(Fp8Format),
}

impl KvDType {
    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            KvDType::Plain(dtype) => dtype.size_bytes(),
            KvDType::Fp8(_) => 1,
        }
    }

    /// The name a `--kv-cache-dtype` flag uses: `fp8_e4m3fn`, `fp8_e5m2`, or as [`DType::name`].
    pub const fn name(self) -> &'static str {
        match self {
            KvDType::Plain(dtype) => dtype.name(),
            KvDType::Fp8(Fp8Format::E4M3) => "fp8_e4m3fn",
            KvDType::Fp8(Fp8Format::E5M2) => "fp8_e5m2",
        }
    }

    /// The eight-bit type of that name.
    pub fn from_fp8_name(name: &str) -> Option<Self> {
        [Fp8Format::E4M3, Fp8Format::E5M2].map(KvDType::Fp8).into_iter().find(|dtype| dtype.name() == name)
    }
}

impl From<DType> for KvDType {
    fn from(dtype: DType) -> Self {
        KvDType::Plain(dtype)
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
    pub dtype: KvDType,
}

impl KvLayout {
    /// Bytes of one block over all layers, keys and values.
    pub const fn block_bytes(&self) -> usize {
        2 * self.num_layers * self.num_kv_heads * self.head_dim * self.block_size * self.dtype.size_bytes()
    }
}
