//! The paged KV cache.
//!
//! `[layer][block][kv_head]`, then the head's keys `[block_size / 16][head_dim][16]` and its values
//! `[block_size][head_dim padded to 16]`: a group of sixteen keys is laid out like a panel of weights, so that a lane of a
//! score vector is a token.

use super::kernels::{KeysValues, LANES};
use super::memory::Memory;
use crate::{BackendError, DType, KvDType, KvLayout};

/// The type of a cache's elements.
///
/// # Errors
/// They are of eight bits, which the CPU has no kernels for.
pub(super) fn plain_dtype(dtype: KvDType) -> Result<DType, BackendError> {
    match dtype {
        KvDType::Plain(dtype) => Ok(dtype),
        KvDType::Fp8(_) => Err(BackendError::Device {
            operation: format!("--kv-cache-dtype {dtype}"),
            reason: "the CPU keeps keys and values in 16 or 32 bits: leave it out, or use --device cuda"
                .to_owned(),
        }),
    }
}

/// Keys and values of all layers, touched as they are written.
#[derive(Debug)]
pub struct CpuKvCache {
    memory: Memory,
    layout: KvLayout,
    dtype: DType,
    num_blocks: usize,
}

impl CpuKvCache {
    pub(super) fn new(layout: KvLayout, num_blocks: usize) -> Result<Self, BackendError> {
        if layout.block_size == 0 || !layout.block_size.is_multiple_of(LANES) {
            return Err(BackendError::Device {
                operation: "making the KV cache".to_owned(),
                reason: format!(
                    "a block of {} tokens; the CPU needs a multiple of {LANES}",
                    layout.block_size
                ),
            });
        }
        let (memory, dtype) = (Memory::zeroed(0, "the KV cache")?, plain_dtype(layout.dtype)?);
        let mut cache = CpuKvCache { memory, layout, dtype, num_blocks };
        let bytes = cache.layer_bytes().checked_mul(layout.num_layers).unwrap_or(usize::MAX / 2);
        cache.memory = Memory::zeroed(
            bytes,
            &format!("a KV cache of {num_blocks} blocks of {} tokens", layout.block_size),
        )?;
        Ok(cache)
    }

    /// Its shape.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Type of its elements.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    fn padded_dim(&self) -> usize {
        self.layout.head_dim.next_multiple_of(LANES)
    }

    /// Elements of one head's keys in a block.
    fn key_elements(&self) -> usize {
        self.layout.block_size * self.layout.head_dim
    }

    /// Elements of one head's keys and values in a block.
    fn head_elements(&self) -> usize {
        self.key_elements() + self.layout.block_size * self.padded_dim()
    }

    fn block_elements(&self) -> usize {
        self.head_elements() * self.layout.num_kv_heads
    }

    fn layer_bytes(&self) -> usize {
        (self.block_elements() * self.layout.dtype.size_bytes()).saturating_mul(self.num_blocks)
    }

    /// One head of one sequence, for the attention kernel.
    pub(super) fn keys_values<'a>(
        &'a self,
        layer: usize,
        kv_head: usize,
        blocks: &'a [u32],
    ) -> KeysValues<'a> {
        let size = self.layout.dtype.size_bytes();
        let key_offset = kv_head * self.head_elements() * size;
        KeysValues {
            layer: self.memory.as_slice::<u8>()[layer * self.layer_bytes()..].as_ptr(),
            blocks,
            block_size: self.layout.block_size,
            block_stride: self.block_elements() * size,
            key_offset,
            value_offset: key_offset + self.key_elements() * size,
        }
    }

    /// For storing keys and values of `layer` from several threads.
    pub(super) fn writer(&mut self, layer: usize) -> KvWriter {
        let elements = self.block_elements() * self.num_blocks;
        let size = self.layout.dtype.size_bytes();
        // SAFETY: the layer lies within the cache.
        let start = unsafe { self.memory.as_mut_ptr().add(layer * elements * size) };
        KvWriter {
            start,
            layout: self.layout,
            dtype: self.dtype,
            key_elements: self.key_elements(),
            head_elements: self.head_elements(),
            block_elements: self.block_elements(),
            padded_dim: self.padded_dim(),
        }
    }
}

/// Stores keys and values of one layer.
pub(super) struct KvWriter {
    start: *mut u8,
    layout: KvLayout,
    dtype: DType,
    key_elements: usize,
    head_elements: usize,
    block_elements: usize,
    padded_dim: usize,
}

// SAFETY: it only writes, and the caller of `store` says that no two threads write the same slot.
unsafe impl Sync for KvWriter {}

impl KvWriter {
    /// Stores one head's key and value at `slot`.
    ///
    /// # Safety
    /// The cache lives and has the slot, nobody else uses the slot now.
    pub(super) unsafe fn store(&self, kv_head: usize, slot: usize, key: &[f32], value: &[f32]) {
        let (block, token) = (slot / self.layout.block_size, slot % self.layout.block_size);
        let head = block * self.block_elements + kv_head * self.head_elements;
        let first_key = head + token / LANES * self.layout.head_dim * LANES + token % LANES;
        let first_value = head + self.key_elements + token * self.padded_dim;
        let at = (first_key, first_value);
        // SAFETY: the indices are those of the layout, of which the memory was made.
        unsafe {
            match self.dtype {
                DType::F32 => scatter(self.start.cast::<f32>(), at, (key, value), |x| x),
                DType::F16 => scatter(self.start.cast(), at, (key, value), half::f16::from_f32),
                DType::BF16 => scatter(self.start.cast(), at, (key, value), half::bf16::from_f32),
            }
        }
    }
}

/// Writes a key with stride 16 and a value in one run.
///
/// # Safety
/// `all` is valid for the elements they go to.
unsafe fn scatter<T>(
    all: *mut T,
    (first_key, first_value): (usize, usize),
    (key, value): (&[f32], &[f32]),
    convert: impl Fn(f32) -> T,
) {
    for (d, (&key, &value)) in key.iter().zip(value).enumerate() {
        // SAFETY: as the caller says.
        unsafe {
            all.add(first_key + d * LANES).write(convert(key));
            all.add(first_value + d).write(convert(value));
        }
    }
}
