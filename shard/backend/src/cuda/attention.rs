//! Attention over the paged cache.
//!
//! Sequences with one query take the decode kernel, the others the prefill kernel, both on tensor cores; Hopper has a prefill
//! kernel of its own. Models in f32 and heads of other sizes take a plain kernel for all of them.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::kv_cache::PAGE_KEYS;
use super::launch::{Argument, Launch, Queue, args};
use super::module::{ByCache, Function, Module, cache_suffix};
use super::rope::check_shape;
use super::shared_split;
use super::step::{QUERY_TILE, StepInputs};
use super::{CudaBuffer, CudaKvCache, DeviceFacts};
use crate::{AttentionShape, BackendError, DType, Fp8Format, KvDType};

/// Query heads of a KV head that the decode kernel computes together, and rows of a part it leaves.
const FEW_HEADS: usize = 8;
const MOST_HEADS: usize = 16;
const DECODE_WARPS: usize = 4;
const DECODE_THREADS: u32 = 32 * DECODE_WARPS as u32;
/// Rings of more pages gain nothing.
const MOST_STAGES: usize = 4;
/// Blocks of the decode kernel that a multiprocessor runs at most.
const MOST_BLOCKS: usize = 4;
const PREFILL_THREADS: u32 = 2 * QUERY_TILE as u32;
const HOPPER_THREADS: u32 = 384;
/// Tiles of keys, and of values, in shared memory of the Hopper kernel.
const HOPPER_STAGES: usize = 2;
/// The Hopper kernel aligns its shared memory by itself.
const HOPPER_ALIGNMENT: usize = 1024;
const PLAIN_THREADS: u32 = 128;
/// Largest head of the plain kernel.
const MOST_PLAIN_DIM: usize = 512;
/// What the driver keeps of each block's shared memory, and what the kernels declare statically.
const RESERVED_SHARED: usize = 1024 + 1024;

/// `Attention` of `attention.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Attention {
    qkv: DevicePtr,
    keys: DevicePtr,
    values: DevicePtr,
    out: DevicePtr,
    header: DevicePtr,
    cu_seqlens_q: DevicePtr,
    context_lens: DevicePtr,
    block_tables: DevicePtr,
    num_heads: i32,
    num_kv_heads: i32,
    head_dim: i32,
    pages_per_block: i32,
    window: i32,
    scale: f32,
    soft_cap: f32,
    alibi_heads: i32,
    alibi_first: i32,
    alibi_max_bias: f32,
    alibi_multiplier: f32,
}

/// `Parts` of `attention_decode.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Parts {
    sums: DevicePtr,
    weights: DevicePtr,
    finished: DevicePtr,
    stages: i32,
}

impl Argument for Attention {}
impl Argument for Parts {}

/// A kernel for bf16 and for f16.
type Both = [Function; 2];

/// A kernel for a cache of the activations' type, of E4M3 and of E5M2.
type Forms = [Both; 3];

/// Which of [`Forms`] a cache of `dtype` takes; none: tensor cores do not take it beside `activations`.
fn form(activations: DType, cache: KvDType) -> Option<usize> {
    match cache {
        _ if activations == DType::F32 => None,
        KvDType::Plain(dtype) => (dtype == activations).then_some(0),
        KvDType::Fp8(Fp8Format::E4M3) => Some(1),
        KvDType::Fp8(Fp8Format::E5M2) => Some(2),
    }
}

/// The instantiations for heads of at most `dim` elements.
struct Size {
    dim: usize,
    /// For at most [`FEW_HEADS`] query heads of a KV head at a time, and for [`MOST_HEADS`] where registers allow it; each with
    /// the blocks that a multiprocessor runs at a time.
    decode: (Forms, usize),
    decode_many: Option<(Forms, usize)>,
    prefill: Forms,
    /// Keys of a tile of the prefill kernel.
    prefill_keys: usize,
}

/// Head size, blocks of the decode kernels a multiprocessor, keys of a tile of the prefill kernel; as in the sources.
const SIZES: [(usize, usize, Option<usize>, usize); 5] = [
    (64, 4, Some(4), 64),
    (96, 3, Some(3), 64),
    (128, 3, Some(2), 64),
    (192, 2, None, 32),
    (256, 1, None, 32),
];

/// Head sizes of the Hopper kernel, which takes exactly these, and keys of a tile.
const HOPPER_SIZES: [(usize, usize); 3] = [(64, 128), (128, 128), (256, 64)];

/// A Hopper kernel.
struct HopperSize {
    dim: usize,
    kernel: Both,
    shared: usize,
}

/// How the decode kernel is launched.
#[derive(Debug, Clone, Copy)]
struct DecodePlan {
    function: Function,
    /// Which of [`Forms`].
    form: usize,
    blocks: usize,
    shared: usize,
    stages: usize,
}

/// Kernels.
pub(super) struct Attentions {
    sizes: Vec<Size>,
    /// Empty where the device is another.
    hopper: Vec<HopperSize>,
    plain: ByCache,
    num_sms: usize,
    /// Bytes of shared memory of a block, and of all blocks of a multiprocessor.
    block_shared: usize,
    sm_shared: usize,
    /// The decode kernel's counters; zero between launches.
    finished: DeviceMemory,
}

/// Bytes of a row of `dim` elements in shared memory, as `Rows` of `attention.cuh` lays it out.
const fn row_bytes(dim: usize) -> usize {
    let chunks = dim / 8;
    16 * if chunks.is_multiple_of(8) { chunks } else { chunks | 1 }
}

/// Shared memory of a block of the decode kernel for `seqs` sequences and `heads` heads at a time, and the pages a warp has
/// room for: as many as let `room` bytes be enough. Of a cache of eight bits (`widens`) they lie there as they are, beside one in the
/// activations' type. None: not even two fit.
fn decode_shared(
    dim: usize,
    widens: bool,
    (heads, seqs): (usize, usize),
    room: usize,
) -> Option<(usize, usize)> {
    let wide = DECODE_WARPS * 2 * PAGE_KEYS * row_bytes(dim);
    let stage = if widens { DECODE_WARPS * 2 * PAGE_KEYS * dim } else { wide };
    let sums = DECODE_WARPS * heads * (dim + 4) * size_of::<f32>();
    let fixed = sums + (2 * seqs + 1) * size_of::<i32>() + if widens { wide } else { 0 };
    let stages = (room.checked_sub(fixed)? / stage).min(MOST_STAGES);
    (stages >= 2).then_some((fixed + stages * stage, stages))
}

/// Shared memory of a block of the prefill kernel.
const fn prefill_shared(dim: usize, keys: usize, widens: bool) -> usize {
    let tile = keys * row_bytes(dim);
    let tiles = if widens { 4 * keys * dim + 2 * tile } else { 4 * tile };
    tiles + if dim > 128 { QUERY_TILE * row_bytes(dim) } else { 0 }
}

impl Attentions {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        let decode = Module::load(context, "attention_decode")?;
        let prefill = Module::load(context, "attention_prefill")?;
        let shared = |attribute| Ok(usize::try_from(context.attribute(attribute)?).unwrap_or(0));
        let block_shared = shared(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let sm_shared = shared(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let both = |module: &Module, name: &str| {
            let functions =
                [module.function(&format!("{name}_bf16"))?, module.function(&format!("{name}_f16"))?];
            for function in functions {
                function.allow_shared_memory((block_shared - RESERVED_SHARED) as u32)?;
            }
            Ok::<_, BackendError>(functions)
        };
        let decode_fp8 = Module::load(context, "attention_decode_fp8")?;
        let prefill_fp8 = Module::load(context, "attention_prefill_fp8")?;
        let forms = |plain: &Module, fp8: &Module, name: &str| -> Result<Forms, BackendError> {
            let of = |module: &Module, cache: [KvDType; 2]| {
                let functions = [
                    module.function(&format!("{name}_bf16_{}", cache_suffix(cache[0])))?,
                    module.function(&format!("{name}_f16_{}", cache_suffix(cache[1])))?,
                ];
                for function in functions {
                    function.allow_shared_memory((block_shared - RESERVED_SHARED) as u32)?;
                }
                Ok::<_, BackendError>(functions)
            };
            Ok([
                of(plain, [KvDType::Plain(DType::BF16), KvDType::Plain(DType::F16)])?,
                of(fp8, [KvDType::Fp8(Fp8Format::E4M3); 2])?,
                of(fp8, [KvDType::Fp8(Fp8Format::E5M2); 2])?,
            ])
        };
        let decode_of = |dim: usize, heads: usize| {
            forms(&decode, &decode_fp8, &format!("attention_decode_{dim}_{heads}"))
        };
        let mut sizes = Vec::new();
        for (dim, blocks, many_blocks, prefill_keys) in SIZES {
            let many = many_blocks.map(|blocks| Ok((decode_of(dim, MOST_HEADS)?, blocks)));
            sizes.push(Size {
                dim,
                decode: (decode_of(dim, FEW_HEADS)?, blocks),
                decode_many: many.transpose()?,
                prefill: forms(&prefill, &prefill_fp8, &format!("attention_prefill_{dim}"))?,
                prefill_keys,
            });
        }
        let mut hopper = Vec::new();
        // Without machine code for it the kernel is empty.
        if facts.capability == (9, 0) && kernels::architectures().contains(&"sm_90a") {
            let module = Module::load(context, "attention_hopper")?;
            for (dim, keys) in HOPPER_SIZES {
                hopper.push(HopperSize {
                    dim,
                    kernel: both(&module, &format!("attention_hopper_{dim}"))?,
                    shared: HOPPER_ALIGNMENT + (QUERY_TILE + 2 * HOPPER_STAGES * keys) * dim * 2,
                });
            }
        }
        let most_blocks = MOST_BLOCKS * facts.num_sms;
        Ok(Self {
            sizes,
            hopper,
            plain: Module::load(context, "attention_plain")?.by_cache("attention_plain")?,
            num_sms: facts.num_sms,
            block_shared,
            sm_shared,
            finished: DeviceMemory::zeroed(
                context,
                most_blocks * size_of::<i32>(),
                "the counters of attention",
            )?,
        })
    }

    /// `out = attention(qkv)` over the cache of `layer`.
    pub(super) fn attend(
        &mut self,
        (queue, step, workspace): (&Queue, &StepInputs, &DeviceMemory),
        (qkv, shape): (&CudaBuffer, &AttentionShape),
        (layer, cache): (usize, &CudaKvCache),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        check_shape(shape, qkv, cache);
        assert!(
            out.width() == shape.num_heads * shape.head_dim && out.dtype() == qkv.dtype(),
            "attention of {} into {} columns of {}",
            qkv.dtype(),
            out.width(),
            out.dtype()
        );
        step.check_cache(cache.num_blocks(), cache.layout().block_size)?;
        let facts = step.facts();
        out.resize(facts.num_tokens);
        let attention = attention(step, (qkv, shape), (layer, cache), out);
        let dtypes = (qkv.dtype(), cache.layout().dtype);
        let which = usize::from(qkv.dtype() == DType::F16);
        let group = shape.num_heads / shape.num_kv_heads;
        let Some((size, plan)) = self.size_for(shape.head_dim, dtypes, (group, facts.num_decode_seqs), which)
        else {
            return self.attend_plainly(queue, step, &attention, dtypes);
        };
        if facts.num_decode_seqs > 0 {
            let parts = self.parts(workspace, plan.blocks, size.dim, plan.stages);
            let launch = Launch {
                function: plan.function,
                grid: [plan.blocks as u32, 1, 1],
                block: DECODE_THREADS,
                shared_bytes: plan.shared as u32,
            };
            queue.launch(&launch, args![attention, parts, step.decode_seqs()])?;
        }
        if facts.num_prefill_tiles == 0 {
            return Ok(());
        }
        let tiles = facts.num_prefill_tiles as i32;
        let grid = [(facts.num_prefill_tiles * shape.num_heads) as u32, 1, 1];
        let hopper = self.hopper.iter().find(|hopper| hopper.dim == shape.head_dim);
        if let (Some(hopper), Some(pages)) = (hopper, cache.pages(layer)) {
            let launch = Launch {
                function: hopper.kernel[which],
                grid,
                block: HOPPER_THREADS,
                shared_bytes: hopper.shared as u32,
            };
            return queue.launch(&launch, args![attention, step.prefill_tiles(), tiles, *pages]);
        }
        let launch = Launch {
            function: size.prefill[plan.form][which],
            grid,
            block: PREFILL_THREADS,
            shared_bytes: prefill_shared(size.dim, size.prefill_keys, plan.form > 0) as u32,
        };
        queue.launch(&launch, args![attention, step.prefill_tiles(), tiles])
    }

    /// The tensor-core kernels that take these heads, and how the decode kernel is launched for `seqs` sequences; none: the plain
    /// kernel takes them.
    fn size_for(
        &self,
        head_dim: usize,
        (activations, cache): (DType, KvDType),
        (group, seqs): (usize, usize),
        which: usize,
    ) -> Option<(&Size, DecodePlan)> {
        let form = form(activations, cache)?;
        // What lies in a piece of 16 bytes.
        if !head_dim.is_multiple_of(if form > 0 { 16 } else { 8 }) {
            return None;
        }
        let size = self.sizes.iter().find(|size| head_dim <= size.dim)?;
        let most = self.block_shared - RESERVED_SHARED;
        if prefill_shared(size.dim, size.prefill_keys, form > 0) > most {
            return None;
        }
        let (kernel, most_blocks, heads) = match size.decode_many {
            Some((kernel, blocks)) if group > FEW_HEADS => (kernel, blocks, group.min(MOST_HEADS)),
            _ => (size.decode.0, size.decode.1, group.min(FEW_HEADS)),
        };
        let blocks_in = |bytes: usize| {
            (1..=most_blocks).rev().find_map(|blocks| {
                let share = (bytes / blocks).saturating_sub(RESERVED_SHARED).min(most);
                Some((blocks, decode_shared(size.dim, form > 0, (heads, seqs), share)?))
            })
        };
        // Large heads take all there is.
        let preferred = shared_split::attention_bytes(seqs, self.sm_shared);
        let (blocks, (shared, stages)) = blocks_in(preferred).or_else(|| blocks_in(self.sm_shared))?;
        let function = kernel[form][which];
        Some((size, DecodePlan { function, form, blocks: blocks * self.num_sms, shared, stages }))
    }

    /// Where the decode kernel leaves parts of heads.
    fn parts(&self, workspace: &DeviceMemory, blocks: usize, dim: usize, stages: usize) -> Parts {
        let rows = 2 * blocks * MOST_HEADS;
        let sums_bytes = rows * dim * size_of::<f32>();
        assert!(
            sums_bytes + rows * 2 * size_of::<f32>() <= workspace.bytes(),
            "{blocks} blocks of attention over heads of {dim} in a workspace of {} bytes",
            workspace.bytes()
        );
        Parts {
            sums: workspace.ptr(),
            weights: workspace.ptr() + sums_bytes as DevicePtr,
            finished: self.finished.ptr(),
            stages: stages as i32,
        }
    }

    fn attend_plainly(
        &self,
        queue: &Queue,
        step: &StepInputs,
        attention: &Attention,
        (activations, cache): (DType, KvDType),
    ) -> Result<(), BackendError> {
        if attention.head_dim as usize > MOST_PLAIN_DIM {
            return Err(BackendError::Device {
                operation: "attention".to_owned(),
                reason: format!(
                    "heads of {} elements; CUDA takes at most {MOST_PLAIN_DIM}",
                    attention.head_dim
                ),
            });
        }
        let launch = Launch {
            function: self.plain.of(activations, cache),
            grid: [step.facts().num_tokens as u32, attention.num_heads as u32, 1],
            block: PLAIN_THREADS,
            shared_bytes: 0,
        };
        queue.launch(&launch, args![*attention, step.token_seqs()])
    }
}

/// What every kernel is told.
fn attention(
    step: &StepInputs,
    (qkv, shape): (&CudaBuffer, &AttentionShape),
    (layer, cache): (usize, &CudaKvCache),
    out: &CudaBuffer,
) -> Attention {
    let alibi = shape.alibi;
    Attention {
        qkv: qkv.ptr(),
        keys: cache.keys(layer),
        values: cache.values(layer),
        out: out.ptr(),
        header: step.header(),
        cu_seqlens_q: step.cu_seqlens_q(),
        context_lens: step.context_lens(),
        block_tables: step.block_tables(),
        num_heads: shape.num_heads as i32,
        num_kv_heads: shape.num_kv_heads as i32,
        head_dim: shape.head_dim as i32,
        pages_per_block: (cache.layout().block_size / PAGE_KEYS) as i32,
        window: shape.window.map_or(0, |window| i32::try_from(window).unwrap_or(i32::MAX)),
        scale: shape.scale,
        soft_cap: shape.soft_cap.unwrap_or(0.0),
        alibi_heads: alibi.map_or(0, |alibi| alibi.total_heads as i32),
        alibi_first: alibi.map_or(0, |alibi| alibi.first_head as i32),
        alibi_max_bias: alibi.map_or(0.0, |alibi| alibi.max_bias),
        alibi_multiplier: alibi.map_or(0.0, |alibi| alibi.multiplier),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_128_bytes_exchange_chunks_and_others_are_an_odd_number_of_chunks() {
        assert_eq!(row_bytes(128), 256);
        assert_eq!(row_bytes(96), 13 * 16);
    }

    #[test]
    fn a_ring_takes_the_room_there_is() {
        // An H100's multiprocessor has 228 KiB, a third of it for each of three blocks.
        let third = 228 * 1024 / 3 - RESERVED_SHARED;
        let (bytes, stages) = decode_shared(128, false, (4, 128), third).unwrap();
        assert_eq!(stages, 2);
        assert!(bytes <= third);
        assert_eq!(decode_shared(128, false, (4, 128), 60 * 1024), None);
        assert_eq!(decode_shared(256, false, (1, 1), 227 * 1024).unwrap().1, 3);
        assert_eq!(decode_shared(128, true, (4, 128), third).unwrap().1, 2);
        assert_eq!(decode_shared(256, true, (1, 1), 227 * 1024).unwrap().1, 4);
    }
}
