//! From files to a model that is ready to run.

use std::time::Instant;

use backend::{AttentionShape, Backend, BackendError, DType, KvDType, KvLayout};
use hub::{ModelFiles, RopeOverride};

use crate::decoder::{Decoder, Layer, Mixer};
use crate::families::spec_with;
use crate::layers::{
    Attention, Embedding, Fp8Use, LatentAttention, LmHead, Loader, Mlp, Norm, Residual, Stream,
};
use crate::quantization::{Quantize, stored_as};
use crate::spec::{DecoderSpec, ExpectedTensor, LayerSpec, MixerSpec, ResidualSpec};
use crate::weights::{
    self, WeightSource, check_cache_scales, check_tensors, prevailing_dtype, with_names_of,
};
use crate::{ModelError, ModelInfo};

/// How a model is to be loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// Type of the weights; none: what the backend makes of the stored one, and quantized ones stay as they are.
    pub dtype: Option<DType>,
    /// Type of the KV cache; none: what the backend makes of the weights' type.
    pub kv_dtype: Option<KvDType>,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Rows whose logits exist at a time; more are computed in several rounds.
    pub max_rows_sampled: usize,
    /// Threads that may dequantize while loading.
    pub threads: usize,
    /// In place of the configuration's rotary scaling.
    pub rope_scaling: Option<RopeOverride>,
    /// How the weights are to be quantized; none: as the files have them.
    pub quantize: Option<Quantize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        // 64 rows of 49152 logits take 12 MiB, and a matrix product gains little from more rows.
        Self {
            dtype: None,
            kv_dtype: None,
            block_size: 16,
            max_rows_sampled: 64,
            threads: 1,
            rope_scaling: None,
            quantize: None,
        }
    }
}

/// Loads this rank's part of the model. The KV cache is to be allocated before the first step.
///
/// # Errors
/// [`ModelError::Unusable`] when the files contradict themselves or are of a kind that is not run, else what the backend
/// reports, such as too little memory.
pub fn load<B: Backend>(
    backend: B,
    files: &ModelFiles,
    options: &LoadOptions,
) -> Result<Decoder<B>, ModelError> {
    let begin = Instant::now();
    let config = files.config()?;
    let spec = spec_with(&config, options.rope_scaling.as_ref())?;
    let fp8 = stored_as(&config, options.quantize)?;
    let source = with_names_of(&spec, weights::open(files, options.threads, fp8)?);
    check_tensors(&spec, source.as_ref())?;
    check_cache_scales(source.as_ref(), options.kv_dtype)?;
    let quantizes = fp8.is_none() && options.quantize == Some(Quantize::Fp8);
    if quantizes && !backend.keeps_fp8() {
        return Err(ModelError::Unusable(vec![
            "--quantize fp8 rounds weights for a GPU, and this is the CPU: leave it out, or use --device cuda".to_owned(),
        ]));
    }
    let decoder = assemble(backend, &spec, (source.as_ref(), quantizes), options)?;
    tracing::debug!(elapsed_ms = begin.elapsed().as_millis(), "weights loaded");
    Ok(decoder)
}

/// Packs the weights and makes the buffers.
pub(crate) fn assemble<B: Backend>(
    backend: B,
    spec: &DecoderSpec,
    (source, quantizes): (&dyn WeightSource, bool),
    options: &LoadOptions,
) -> Result<Decoder<B>, ModelError> {
    let dtype = options.dtype.unwrap_or_else(|| backend.default_dtype(prevailing_dtype(spec, source)));
    let (_, world_size) = backend.rank_and_world();
    let keeps_quantized = options.dtype.is_none() && backend.keeps_quantized();
    if let Some(dtype) = options.kv_dtype {
        backend.check_kv_dtype(dtype)?;
    }
    let fp8 = Fp8Use { dtype: options.dtype.unwrap_or_else(|| backend.fp8_dtype(dtype)), quantizes };
    let fp8_bytes = if backend.keeps_fp8() { 1 } else { fp8.dtype.size_bytes() };
    check_memory(
        weight_bytes(spec, source, (dtype, keeps_quantized), (fp8_bytes, quantizes)) / world_size,
        backend.memory()?.available_bytes,
    )?;
    let max_step_tokens = backend.max_step_tokens().max(1);
    let max_rows_sampled = options.max_rows_sampled.max(1);
    let mut loader = Loader::new(&backend, source, (dtype, keeps_quantized, fp8), max_step_tokens);

    let embedding = Embedding::load(&mut loader, spec)?;
    let layers = load_layers(&mut loader, spec)?;
    let norm = Norm::load(&mut loader, &spec.norm, spec.hidden_size)?;
    let lm_head = LmHead::new(&loader, spec, max_rows_sampled)?;
    let is_parallel = |layer: &LayerSpec| matches!(layer.residual, ResidualSpec::Parallel { .. });
    let has_parallel = spec.layers.iter().any(is_parallel);
    let stream = Stream::new(&backend, (max_step_tokens, spec.hidden_size), dtype, has_parallel)?;
    let head_stream = Stream::new(&backend, (max_rows_sampled, spec.hidden_size), dtype, false)?;
    let (weight_bytes, scratch) = (loader.weight_bytes, loader.scratch);

    let kv_layout = kv_layout(&backend, &layers, options, dtype)?;
    let workspace_bytes = scratch.bytes
        + Stream::<B>::bytes(max_step_tokens, spec.hidden_size, has_parallel)
        + Stream::<B>::bytes(max_rows_sampled, spec.hidden_size, false);
    let info = ModelInfo {
        dtype,
        device: backend.device(),
        vocab_size: spec.vocab_size,
        max_position_embeddings: spec.max_position_embeddings,
        block_size: options.block_size,
        block_bytes: kv_layout.block_bytes(),
        max_step_tokens,
        memory: vec![
            ("weights".to_owned(), weight_bytes),
            ("workspace".to_owned(), workspace_bytes),
            ("logits".to_owned(), lm_head.bytes),
        ],
    };
    Ok(Decoder {
        backend,
        info,
        kv_layout,
        embedding,
        layers,
        norm,
        lm_head,
        scratch,
        stream,
        head_stream,
        max_rows_sampled,
        cache: None,
        logits_rows: Vec::new(),
        num_tokens: 0,
    })
}

/// What the tensors of the model take once they are packed: in `dtype`, or those that stay quantized with a scale and an offset
/// of 32 bits for each group, or those of eight bits with `fp8_bytes` an element. Files may hold more, of any size.
fn weight_bytes(
    spec: &DecoderSpec,
    source: &dyn WeightSource,
    (dtype, keeps_quantized): (DType, bool),
    (fp8_bytes, quantizes): (usize, bool),
) -> usize {
    let product = |sum: usize, size: &usize| sum.saturating_mul(*size);
    let is_table = |shape: &[usize]| shape.first() == Some(&spec.vocab_size);
    let bytes = |tensor: &ExpectedTensor| {
        let elements = tensor.shape.iter().fold(1, product);
        if source.is_fp8(&tensor.name) || (quantizes && tensor.shape.len() > 1 && !is_table(&tensor.shape)) {
            return elements.saturating_mul(fp8_bytes);
        }
        match source.meta(&tensor.name).and_then(|meta| meta.quantized).filter(|_| keeps_quantized) {
            Some(quantized) => {
                let values = elements.saturating_mul(quantized.bits as usize) / 8;
                values.saturating_add((elements / quantized.group_size).saturating_mul(2 * size_of::<f32>()))
            }
            None => elements.saturating_mul(dtype.size_bytes()),
        }
    };
    spec.tensors().iter().map(bytes).fold(0, usize::saturating_add)
}

/// Pages are only taken when they are written, so a model that does not fit would end in the system's killer rather than
/// in an error: it is refused before the first write.
fn check_memory(needed_bytes: usize, available_bytes: usize) -> Result<(), BackendError> {
    if needed_bytes <= available_bytes {
        return Ok(());
    }
    Err(BackendError::OutOfMemory {
        what: "the weights of this rank".to_owned(),
        needed_bytes,
        available_bytes,
    })
}

fn load_layers<B: Backend>(
    loader: &mut Loader<'_, B>,
    spec: &DecoderSpec,
) -> Result<Vec<Layer<B>>, ModelError> {
    let width = spec.hidden_size;
    let mut layers: Vec<Layer<B>> = Vec::with_capacity(spec.layers.len());
    for layer in &spec.layers {
        let residual = Residual::load(loader, &layer.residual, width)?;
        let mixer = match &layer.mixer {
            MixerSpec::Attention(spec) => {
                Mixer::Attention(Attention::load(loader, spec, width, layers.len())?)
            }
            MixerSpec::LatentAttention(spec) => {
                Mixer::LatentAttention(LatentAttention::load(loader, spec, width, layers.len())?)
            }
        };
        layers.push(Layer { residual, mixer, mlp: Mlp::load(loader, &layer.mlp, width)? });
    }
    Ok(layers)
}

/// One layout for all layers, since blocks are handed out for all of them at once.
fn kv_layout<B: Backend>(
    backend: &B,
    layers: &[Layer<B>],
    options: &LoadOptions,
    dtype: DType,
) -> Result<KvLayout, ModelError> {
    let mut shapes = layers.iter().map(|layer| layer.mixer.shape());
    let size = |shape: &AttentionShape| (shape.num_kv_heads, shape.head_dim);
    let first = shapes.next().map(size).unwrap_or_default();
    if let Some(other) = shapes.map(size).find(|&other| other != first) {
        return Err(ModelError::Unusable(vec![format!(
            "layers with {first:?} and {other:?} KV heads and elements a head, expected the same in all"
        )]));
    }
    Ok(KvLayout {
        num_layers: layers.len(),
        num_kv_heads: first.0,
        head_dim: first.1,
        block_size: options.block_size,
        dtype: options.kv_dtype.unwrap_or_else(|| backend.default_kv_dtype(dtype).into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_do_not_fit_are_refused_with_both_sizes() {
        assert!(check_memory(100, 100).is_ok());
        let message = check_memory(101, 100).unwrap_err().to_string();
        assert!(message.contains("needs 101 bytes, 100 bytes are free"), "{message}");
    }
}
