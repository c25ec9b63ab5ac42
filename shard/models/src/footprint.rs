//! What a model takes of each rank's memory, and what each rank owns, known before anything is loaded: from the
//! specification and the headers of the weight files alone.
//!
//! Weights are counted as [`load`](crate::load) packs them, without the padding of the last few outputs; of bf16 on the CPU that is
//! an upper bound, because how much of it fits into 12 bits shows only in the weights themselves.

use std::ops::Range;

use backend::{DType, KvDType};
use hub::ModelFiles;

use crate::families::spec_with;
use crate::load::LoadOptions;
use crate::quantization::{Quantize, stored_as};
use crate::spec::{
    AttentionSpec, DecoderSpec, ExpertsSpec, GatedSpec, LatentAttentionSpec, LinearSpec, LmHeadSpec,
    MixerSpec, MlpSpec, QkNormScope, ResidualSpec,
};
use crate::tensor_parallel::{split_heads, split_tiles};
use crate::weights::{
    self, WeightSource, check_cache_scales, check_tensors, prevailing_dtype, with_names_of,
};
use crate::{ModelError, ModelInfo};

/// What a device makes of weights: see the methods of [`backend::Backend`] of the same names.
#[derive(Debug, Clone, Copy)]
pub struct DeviceRules {
    /// Type of the weights by the type they are stored in.
    pub default_dtype: fn(DType) -> DType,
    /// Type of the KV cache by the weights' type.
    pub default_kv_dtype: fn(DType) -> DType,
    /// Quantized blocks are run as they are.
    pub keeps_quantized: bool,
    /// Weights of eight bits stay so; else they become float32 when nobody asks for a type.
    pub keeps_fp8: bool,
    /// Tokens of a step.
    pub max_step_tokens: usize,
    /// Rows whose logits exist at a time.
    pub max_rows_sampled: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
}

/// What a model takes and how it is split.
#[derive(Debug, Clone, PartialEq)]
pub struct Footprint {
    /// Type of the weights that are not kept quantized.
    pub dtype: DType,
    /// Type of the KV cache.
    pub kv_dtype: KvDType,
    /// Whether most weights stay quantized.
    pub is_quantized: bool,
    /// Layers.
    pub num_layers: usize,
    /// Longest sequence the positions allow.
    pub max_position_embeddings: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// One for each rank.
    pub ranks: Vec<RankFootprint>,
}

/// One rank's part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankFootprint {
    /// Packed weights, in bytes; on the CPU an upper bound where they are bf16.
    pub weight_bytes: usize,
    /// Buffers of a step, in bytes.
    pub workspace_bytes: usize,
    /// Buffers of the logits, in bytes.
    pub logits_bytes: usize,
    /// One KV block, in bytes.
    pub block_bytes: usize,
    /// Query heads of the first layer.
    pub query_heads: Range<usize>,
    /// KV heads that they read.
    pub kv_heads: Range<usize>,
    /// Columns of the first layer's feed-forward, or of each of its experts.
    pub feed_forward: Range<usize>,
    /// Rows of the embedding and logits.
    pub vocabulary: Range<usize>,
}

impl RankFootprint {
    /// All that does not grow with the number of tokens, in bytes.
    pub fn fixed_bytes(&self) -> usize {
        self.weight_bytes.saturating_add(self.workspace_bytes).saturating_add(self.logits_bytes)
    }
}

impl Footprint {
    /// The facts that the KV cache of `rank` is sized by.
    pub fn model_info(&self, rank: usize, device: backend::DeviceInfo) -> ModelInfo {
        ModelInfo {
            dtype: self.dtype,
            device,
            vocab_size: self.ranks.last().map_or(0, |last| last.vocabulary.end),
            max_position_embeddings: self.max_position_embeddings,
            block_size: self.block_size,
            block_bytes: self.ranks.get(rank).map_or(0, |rank| rank.block_bytes),
            max_step_tokens: 0,
            memory: Vec::new(),
        }
    }
}

/// Reads configuration and headers; no weight is read. Of `asked` the types and the rope count.
///
/// # Errors
/// As [`load`](crate::load): the files contradict themselves or are of a kind that is not run, or there are more ranks than
/// something can be split into.
pub fn footprint(
    files: &ModelFiles,
    asked: &LoadOptions,
    world_size: usize,
    rules: &DeviceRules,
) -> Result<Footprint, ModelError> {
    let config = files.config()?;
    let spec = spec_with(&config, asked.rope_scaling.as_ref())?;
    let fp8 = stored_as(&config, asked.quantize)?;
    let source = with_names_of(&spec, weights::open(files, 1, fp8)?);
    check_tensors(&spec, source.as_ref())?;
    check_cache_scales(source.as_ref(), asked.kv_dtype)?;
    let dtype =
        asked.dtype.unwrap_or_else(|| (rules.default_dtype)(prevailing_dtype(&spec, source.as_ref())));
    let kv_dtype = asked.kv_dtype.unwrap_or_else(|| (rules.default_kv_dtype)(dtype).into());
    let fp8_bytes = if rules.keeps_fp8 { 1 } else { asked.dtype.unwrap_or(DType::F32).size_bytes() };
    let quantizes = rules.keeps_fp8 && fp8.is_none() && asked.quantize == Some(Quantize::Fp8);
    let keeps_quantized = asked.dtype.is_none() && rules.keeps_quantized;
    let mut is_quantized = false;
    let mut ranks = Vec::with_capacity(world_size);
    for rank in 0..world_size {
        let kept = Kept { quantized: keeps_quantized, fp8_bytes, quantizes };
        let part = Part { rank, world_size, dtype, kept, source: source.as_ref() };
        let mut count = Count::default();
        count.model(&part, &spec)?;
        is_quantized |= count.quantized_bytes > count.bytes / 2;
        ranks.push(rank_footprint(&spec, &part, &count, (rules, kv_dtype))?);
    }
    Ok(Footprint {
        dtype,
        kv_dtype,
        is_quantized,
        num_layers: spec.layers.len(),
        max_position_embeddings: spec.max_position_embeddings,
        block_size: rules.block_size,
        ranks,
    })
}

fn rank_footprint(
    spec: &DecoderSpec,
    part: &Part<'_>,
    count: &Count,
    (rules, kv_dtype): (&DeviceRules, KvDType),
) -> Result<RankFootprint, ModelError> {
    let vocabulary = part.vocabulary(spec)?;
    let is_parallel = spec.layers.iter().any(|layer| matches!(layer.residual, ResidualSpec::Parallel { .. }));
    let stream_width = if is_parallel { 4 } else { 3 } * spec.hidden_size;
    let scratch_width: usize = count.buffers.iter().map(|(_, width)| width).sum();
    let float = size_of::<f32>();
    let local_logits = if part.world_size > 1 { vocabulary.len() } else { 0 };
    let (query_heads, kv_heads, kv_width) = match spec.layers.first().map(|layer| &layer.mixer) {
        None => (0..0, 0..0, 0),
        Some(MixerSpec::Attention(attention)) => {
            let split = split_heads(attention.num_heads, attention.num_kv_heads, part.rank, part.world_size)?;
            let width = split.kv.len() * attention.head_dim;
            (split.query, split.kv, width)
        }
        Some(MixerSpec::LatentAttention(latent)) => {
            let split = split_heads(latent.num_heads, 1, part.rank, part.world_size)?;
            (split.query, split.kv, latent.rotary_dim + latent.latent_dim)
        }
    };
    let feed_forward = match spec.layers.first().map(|layer| &layer.mlp) {
        None => 0..0,
        Some(MlpSpec::Gated { intermediate_size, .. } | MlpSpec::Plain { intermediate_size, .. }) => {
            part.tiles(*intermediate_size)?
        }
        Some(MlpSpec::Experts(experts)) => part.tiles(experts.intermediate_size)?,
    };
    Ok(RankFootprint {
        weight_bytes: count.bytes,
        workspace_bytes: (rules.max_step_tokens * (scratch_width + stream_width)
            + rules.max_rows_sampled * stream_width)
            * float,
        logits_bytes: rules.max_rows_sampled * (spec.vocab_size + local_logits) * float,
        // Keys and values.
        block_bytes: 2 * spec.layers.len() * kv_width * rules.block_size * kv_dtype.size_bytes(),
        query_heads,
        kv_heads,
        feed_forward,
        vocabulary,
    })
}

/// How weights are kept that are not of the model's type.
#[derive(Clone, Copy)]
struct Kept {
    /// Quantized blocks as they are.
    quantized: bool,
    /// Bytes of an element that is stored in eight bits.
    fp8_bytes: usize,
    /// Others are rounded to eight bits, all but tables.
    quantizes: bool,
}

/// Whose part of what is counted.
struct Part<'a> {
    rank: usize,
    world_size: usize,
    dtype: DType,
    kept: Kept,
    source: &'a dyn WeightSource,
}

impl Part<'_> {
    fn tiles(&self, width: usize) -> Result<Range<usize>, ModelError> {
        split_tiles(width, "columns of the MLP", self.rank, self.world_size)
    }

    fn vocabulary(&self, spec: &DecoderSpec) -> Result<Range<usize>, ModelError> {
        split_tiles(spec.vocab_size, "rows of the vocabulary", self.rank, self.world_size)
    }
}

/// What a buffer between operations is for; those of one width and purpose are shared by all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Buffer {
    Projected,
    Mixed,
    Squares,
    GateUp,
    Activated,
    RouterLogits,
    RoutedOut,
    QueryLatent,
    Queries,
    Latent,
    Values,
}

/// What has been counted.
#[derive(Default)]
struct Count {
    bytes: usize,
    /// Of these, in quantized blocks.
    quantized_bytes: usize,
    buffers: Vec<(Buffer, usize)>,
}

impl Count {
    fn model(&mut self, part: &Part<'_>, spec: &DecoderSpec) -> Result<(), ModelError> {
        let hidden = spec.hidden_size;
        let rows = part.vocabulary(spec)?.len();
        self.table(part, &LinearSpec::table(&spec.embedding.tokens), [rows, hidden]);
        if let Some(positions) = &spec.embedding.positions {
            self.table(part, &LinearSpec::table(&positions.weight), [positions.rows, hidden]);
        }
        if let LmHeadSpec::Own(linear) = &spec.lm_head {
            self.table(part, linear, [rows, hidden]);
        }
        for layer in &spec.layers {
            match &layer.mixer {
                MixerSpec::Attention(attention) => self.attention(part, attention, hidden)?,
                MixerSpec::LatentAttention(latent) => self.latent_attention(part, latent, hidden)?,
            }
            self.mlp(part, &layer.mlp, hidden)?;
        }
        // Norms are vectors of float32 that every rank has: two or so a layer, each as wide as the stream.
        let norms = spec.tensors().into_iter().filter(|tensor| tensor.shape == [hidden]);
        self.bytes += norms.count() * hidden * size_of::<f32>();
        Ok(())
    }

    fn attention(&mut self, part: &Part<'_>, spec: &AttentionSpec, hidden: usize) -> Result<(), ModelError> {
        let split = split_heads(spec.num_heads, spec.num_kv_heads, part.rank, part.world_size)?;
        let (queries, keys) = (split.query.len() * spec.head_dim, split.kv.len() * spec.head_dim);
        self.linear(part, &spec.q_proj, [queries, hidden]);
        self.linear(part, &spec.k_proj, [keys, hidden]);
        self.linear(part, &spec.v_proj, [keys, hidden]);
        self.linear(part, &spec.o_proj, [hidden, queries]);
        self.reserve(Buffer::Projected, queries + 2 * keys);
        self.reserve(Buffer::Mixed, queries);
        if spec.qk_norm.as_ref().is_some_and(|norm| norm.scope == QkNormScope::AllHeads) {
            self.reserve(Buffer::Squares, 1);
        }
        Ok(())
    }

    fn latent_attention(
        &mut self,
        part: &Part<'_>,
        spec: &LatentAttentionSpec,
        hidden: usize,
    ) -> Result<(), ModelError> {
        let heads = split_heads(spec.num_heads, 1, part.rank, part.world_size)?.query.len();
        let mut query_inputs = hidden;
        if let Some(down) = &spec.q_down {
            self.linear(part, &down.proj, [down.width, hidden]);
            self.reserve(Buffer::QueryLatent, down.width);
            query_inputs = down.width;
        }
        let (queries, cached) =
            (heads * (spec.plain_dim + spec.rotary_dim), spec.rotary_dim + spec.latent_dim);
        let values = heads * spec.value_dim;
        self.linear(part, &spec.q_proj, [queries, query_inputs]);
        self.linear(part, &spec.kv_down.proj, [cached, hidden]);
        // Taken apart and turned around, so never in quantized blocks.
        let up = heads * (spec.plain_dim + spec.value_dim) * spec.latent_dim;
        self.bytes += up * part.dtype.size_bytes();
        self.linear(part, &spec.o_proj, [hidden, values]);
        self.reserve(Buffer::Latent, cached);
        self.reserve(Buffer::Queries, queries);
        self.reserve(Buffer::Projected, (heads + 2) * cached);
        self.reserve(Buffer::Mixed, heads * cached);
        self.reserve(Buffer::Values, values);
        Ok(())
    }

    fn mlp(&mut self, part: &Part<'_>, spec: &MlpSpec, hidden: usize) -> Result<(), ModelError> {
        match spec {
            MlpSpec::Gated { intermediate_size, gate_proj, up_proj, down_proj, .. } => {
                self.gated(part, [gate_proj, up_proj, down_proj], *intermediate_size, hidden)?;
                let inner = part.tiles(*intermediate_size)?.len();
                self.reserve(Buffer::GateUp, 2 * inner);
                self.reserve(Buffer::Activated, inner);
            }
            MlpSpec::Plain { intermediate_size, up_proj, down_proj, .. } => {
                let inner = part.tiles(*intermediate_size)?.len();
                self.linear(part, up_proj, [inner, hidden]);
                self.linear(part, down_proj, [hidden, inner]);
                self.reserve(Buffer::Activated, inner);
            }
            MlpSpec::Experts(experts) => self.experts(part, experts, hidden)?,
        }
        Ok(())
    }

    fn experts(&mut self, part: &Part<'_>, spec: &ExpertsSpec, hidden: usize) -> Result<(), ModelError> {
        for GatedSpec { gate_proj, up_proj, down_proj } in &spec.experts {
            self.gated(part, [gate_proj, up_proj, down_proj], spec.intermediate_size, hidden)?;
        }
        let experts = spec.experts.len();
        // The router is computed in float32.
        self.bytes += experts * hidden * size_of::<f32>();
        self.reserve(Buffer::RouterLogits, experts);
        if let Some(shared) = &spec.shared {
            let GatedSpec { gate_proj, up_proj, down_proj } = &shared.projections;
            let width = shared.intermediate_size;
            self.gated(part, [gate_proj, up_proj, down_proj], width, hidden)?;
            self.reserve(Buffer::RoutedOut, hidden);
            if shared.gate.is_some() {
                self.bytes += hidden * size_of::<f32>();
                self.reserve(Buffer::RouterLogits, 1);
            } else {
                let inner = part.tiles(width)?.len();
                self.reserve(Buffer::GateUp, 2 * inner);
                self.reserve(Buffer::Activated, inner);
            }
        }
        Ok(())
    }

    fn gated(
        &mut self,
        part: &Part<'_>,
        [gate, up, down]: [&LinearSpec; 3],
        width: usize,
        hidden: usize,
    ) -> Result<(), ModelError> {
        let inner = part.tiles(width)?.len();
        self.linear(part, gate, [inner, hidden]);
        self.linear(part, up, [inner, hidden]);
        self.linear(part, down, [hidden, inner]);
        Ok(())
    }

    /// A projection; one of eight bits has a scale a row.
    fn linear(&mut self, part: &Part<'_>, linear: &LinearSpec, shape: [usize; 2]) {
        if !part.kept.quantizes && !part.source.is_fp8(&linear.weight) {
            return self.table(part, linear, shape);
        }
        let [rows, columns] = shape;
        let elements = rows.saturating_mul(columns).saturating_mul(part.kept.fp8_bytes);
        let scales = if part.kept.fp8_bytes == 1 { rows * size_of::<f32>() } else { 0 };
        let bytes = elements.saturating_add(scales);
        if part.kept.fp8_bytes == 1 {
            self.quantized_bytes = self.quantized_bytes.saturating_add(bytes);
        }
        let bias = if linear.bias.is_some() { rows * size_of::<f32>() } else { 0 };
        self.bytes = self.bytes.saturating_add(bytes + bias);
    }

    /// A matrix, in quantized blocks with a scale and an offset of 32 bits for each group where it is kept so.
    fn table(&mut self, part: &Part<'_>, linear: &LinearSpec, [rows, columns]: [usize; 2]) {
        let elements = rows.saturating_mul(columns);
        let quantized = part.source.meta(&linear.weight).and_then(|meta| meta.quantized);
        let bytes = match quantized.filter(|_| part.kept.quantized) {
            Some(quantized) => {
                let groups = elements / quantized.group_size.max(1);
                let bytes = elements.saturating_mul(quantized.bits as usize) / 8
                    + groups.saturating_mul(2 * size_of::<f32>());
                self.quantized_bytes = self.quantized_bytes.saturating_add(bytes);
                bytes
            }
            None => elements.saturating_mul(part.dtype.size_bytes()),
        };
        let bias = if linear.bias.is_some() { rows * size_of::<f32>() } else { 0 };
        self.bytes = self.bytes.saturating_add(bytes + bias);
    }

    fn reserve(&mut self, buffer: Buffer, width: usize) {
        if !self.buffers.contains(&(buffer, width)) {
            self.buffers.push((buffer, width));
        }
    }
}
