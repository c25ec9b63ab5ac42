//! Queries, keys and values of one token with weights of eight bits, rotated and stored in the same launch: `fp8_gemv.cu`.

use std::sync::Arc;

use super::driver::{Context, DevicePtr};
use super::fp8_matmul::{GEMV_OUTPUTS, MAX_SHARED_BYTES, gemv_launch, gemv_parameters, takes_activations};
use super::launch::{Argument, Queue, args};
use super::linear::NextWeight;
use super::matmul::task;
use super::module::{Function, Module, cache_suffix};
use super::rope::{Heads, check_shape};
use super::step::StepInputs;
use super::{CudaBuffer, CudaKvCache, CudaLinear, CudaRope, CudaVector, DeviceFacts};
use crate::{AttentionShape, BackendError, DType, Fp8Format, KvDType};

/// A projection: its input, weight and bias.
pub(super) type Projection<'a> = (&'a CudaBuffer, &'a CudaLinear, Option<&'a CudaVector>);

/// Bytes of the next weight that are asked for: what the L2 cache keeps until they are read.
const MOST_AHEAD: usize = 20 << 20;

/// `Ahead` of fp8_gemv.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Ahead {
    from: DevicePtr,
    bytes: i64,
    blocks: i32,
}

impl Argument for Ahead {}

/// Kernels.
pub(super) struct Fp8Projections {
    functions: Vec<((DType, KvDType), Function)>,
    num_sms: u32,
}

impl Fp8Projections {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        let module = Module::load(context, "fp8_gemv")?;
        let caches = |dtype: DType| {
            [KvDType::Plain(dtype), KvDType::Fp8(Fp8Format::E4M3), KvDType::Fp8(Fp8Format::E5M2)]
                .map(|cache| (dtype, cache))
        };
        let types = [caches(DType::BF16), caches(DType::F16)].concat().into_iter();
        let functions = types.map(|(dtype, cache)| {
            let name = format!("fp8_project_{}_{}", cache_suffix(dtype.into()), cache_suffix(cache));
            let function = module.function(&name)?;
            function.allow_shared_memory(MAX_SHARED_BYTES as u32)?;
            Ok(((dtype, cache), function))
        });
        Ok(Self { functions: functions.collect::<Result<_, BackendError>>()?, num_sms: facts.num_sms as u32 })
    }

    /// `qkv = rotated(x weight^T (+ bias))`, keys and values stored; false: this is for others.
    pub(super) fn project(
        &self,
        (queue, step): (&Queue, &StepInputs),
        (x, weight, bias): Projection<'_>,
        qkv: &mut CudaBuffer,
        (rope, shape): (Option<&CudaRope>, &AttentionShape),
        (layer, cache, next): (usize, &CudaKvCache, Option<NextWeight>),
    ) -> Result<bool, BackendError> {
        let layout = cache.layout();
        let types = (qkv.dtype(), layout.dtype);
        let task = task(x, (weight, bias), qkv);
        let is_taken = x.rows() == 1
            && weight.scales().is_some()
            && takes_activations(task, x.dtype())
            && qkv.dtype() == x.dtype()
            && x.width() * x.dtype().size_bytes() <= MAX_SHARED_BYTES;
        let function = self.functions.iter().find(|(known, _)| *known == types).filter(|_| is_taken);
        let frequencies = rope.and_then(|rope| rope.halves(shape.head_dim));
        let (Some((_, function)), Some(frequencies)) = (function, frequencies) else { return Ok(false) };
        check_shape(shape, qkv, cache);
        step.check_cache(cache.num_blocks(), layout.block_size)?;
        qkv.resize(1);
        let parameters = gemv_parameters(x, (weight, bias), qkv, weight.out_features);
        let mut launch = gemv_launch(*function, x, weight.out_features);
        // A warp has two outputs.
        launch.grid[0] = (weight.out_features / 2).div_ceil(GEMV_OUTPUTS) as u32;
        let heads = Heads::new(shape, layout.block_size);
        let ahead = Ahead {
            from: next.map_or(0, |next| next.address),
            bytes: next.map_or(0, |next| next.bytes.min(MOST_AHEAD) as i64),
            blocks: launch.grid[0].min(2 * self.num_sms) as i32,
        };
        queue.launch(
            &launch,
            args![
                parameters,
                cache.keys(layer),
                cache.values(layer),
                step.position_ids(),
                step.slot_mapping(),
                step.token_seqs(),
                step.prompt_lens(),
                frequencies,
                heads,
                ahead,
            ],
        )?;
        Ok(true)
    }
}
