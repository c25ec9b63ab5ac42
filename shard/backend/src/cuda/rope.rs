//! Rotary embeddings, and storing keys and values.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Argument, Launch, Queue, args};
use super::module::{ByCache, Module};
use super::program::PlainRope;
use super::step::StepInputs;
use super::upload::Uploader;
use super::{CudaBuffer, CudaKvCache};
use crate::{AttentionShape, BackendError, LongFrequencies, RopeFrequencies, RopeStyle};

/// Most pairs of a head, see `rope.cu`.
const MAX_PAIRS: usize = 256;
/// Elements of a piece when everything is a multiple of it.
const PIECE: usize = 8;
const THREADS: u32 = 256;
/// A block has at least this many heads: what a token needs once is computed by each of its blocks.
const LEAST_HEADS: usize = 4;

/// `Frequencies` of `rope.cu`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Frequencies {
    inv_freq: DevicePtr,
    long_inv_freq: DevicePtr,
    pairs: i32,
    is_interleaved: i32,
    long_context: i32,
    scale: f32,
    long_scale: f32,
    theta: f64,
    factor: f64,
}

/// `Heads` of `rope.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Heads {
    num_heads: i32,
    num_kv_heads: i32,
    head_dim: i32,
    block_size: i32,
}

impl Argument for Frequencies {}
impl Argument for Heads {}

/// A rotary embedding on the device.
pub struct CudaRope {
    frequencies: Frequencies,
    /// What `frequencies` points to: those of usual prompts, then those of long ones where they are fixed.
    _tables: DeviceMemory,
}

impl CudaRope {
    /// Copies the frequencies. On the device once the uploader has finished.
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        frequencies: RopeFrequencies,
    ) -> Result<Self, BackendError> {
        let pairs = frequencies.inv_freq.len();
        if pairs > MAX_PAIRS {
            return Err(BackendError::Device {
                operation: "making a rotary embedding".to_owned(),
                reason: format!(
                    "{} elements of a head turn; CUDA takes at most {}",
                    2 * pairs,
                    2 * MAX_PAIRS
                ),
            });
        }
        let mut tables = frequencies.inv_freq;
        let mut device = Frequencies {
            pairs: pairs as i32,
            is_interleaved: i32::from(frequencies.style == RopeStyle::Interleaved),
            scale: frequencies.scale,
            ..Frequencies::default()
        };
        let mut has_long_table = false;
        if let Some(long) = frequencies.beyond {
            device.long_context = i32::try_from(long.context).unwrap_or(i32::MAX);
            match long.frequencies {
                LongFrequencies::Fixed { inv_freq, scale } => {
                    assert_eq!(inv_freq.len(), pairs, "as many frequencies for long prompts as for others");
                    tables.extend(inv_freq);
                    device.long_scale = scale;
                    has_long_table = true;
                }
                LongFrequencies::Ntk { theta, factor } => (device.theta, device.factor) = (theta, factor),
            }
        }
        let memory = DeviceMemory::new(context, size_of_val(&tables[..]), "a rotary embedding")?;
        uploader.bytes(bytemuck::cast_slice(&tables), memory.ptr())?;
        device.inv_freq = memory.ptr();
        if has_long_table {
            device.long_inv_freq = memory.ptr() + (pairs * size_of::<f32>()) as DevicePtr;
        }
        Ok(Self { frequencies: device, _tables: memory })
    }

    /// What it is, if it turns halves and never changes.
    pub(super) fn plain(&self) -> Option<PlainRope> {
        let Frequencies { inv_freq, pairs, is_interleaved, long_context, scale, .. } = self.frequencies;
        (is_interleaved == 0 && long_context == 0).then_some(PlainRope {
            inv_freq,
            pairs: pairs as usize,
            scale,
        })
    }
}

/// Kernels.
pub(super) struct Ropes {
    rope_store: ByCache,
    num_sms: usize,
}

impl Ropes {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "rope")?;
        let num_sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            rope_store: module.by_cache("rope_store")?,
            num_sms: usize::try_from(num_sms).unwrap_or(1),
        })
    }

    /// Rotates queries and keys in place and stores keys and values of `layer` at the step's slots.
    pub(super) fn rotate_and_store(
        &self,
        queue: &Queue,
        step: &StepInputs,
        (qkv, rope, shape): (&mut CudaBuffer, Option<&CudaRope>, &AttentionShape),
        (layer, cache): (usize, &mut CudaKvCache),
    ) -> Result<(), BackendError> {
        let layout = *cache.layout();
        check_shape(shape, qkv, cache);
        step.check_cache(cache.num_blocks(), layout.block_size)?;
        let tokens = step.facts().num_tokens;
        let heads = shape.num_heads + 2 * shape.num_kv_heads;
        let groups = (2 * self.num_sms / tokens.max(1)).clamp(1, heads.div_ceil(LEAST_HEADS));
        let frequencies = rope.map_or(Frequencies::default(), |rope| rope.frequencies);
        let pairs = frequencies.pairs as usize;
        assert!(2 * pairs <= shape.head_dim, "{} elements turn of a head of {}", 2 * pairs, shape.head_dim);
        let is_wide = i32::from(shape.head_dim.is_multiple_of(PIECE) && pairs.is_multiple_of(PIECE));
        let device_heads = Heads {
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            head_dim: shape.head_dim as i32,
            block_size: layout.block_size as i32,
        };
        let launch = Launch {
            function: self.rope_store.of(qkv.dtype(), layout.dtype),
            grid: [tokens as u32, groups as u32, 1],
            block: THREADS,
            shared_bytes: 0,
        };
        queue.launch(
            &launch,
            args![
                qkv.ptr(),
                cache.keys(layer),
                cache.values(layer),
                step.position_ids(),
                step.slot_mapping(),
                step.token_seqs(),
                step.prompt_lens(),
                frequencies,
                device_heads,
                is_wide,
            ],
        )
    }
}

/// That queries, keys and values are as wide as the shape says and the cache is made for them.
pub(super) fn check_shape(shape: &AttentionShape, qkv: &CudaBuffer, cache: &CudaKvCache) {
    let layout = cache.layout();
    assert!(
        qkv.width() == shape.qkv_width()
            && layout.num_kv_heads == shape.num_kv_heads
            && layout.head_dim == shape.head_dim,
        "{} columns for {shape:?} with a cache of {layout:?}",
        qkv.width()
    );
}
