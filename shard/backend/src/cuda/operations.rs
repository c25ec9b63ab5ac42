//! `impl Backend`: every operation goes to its noun.

use std::ops::Range;

use super::driver::DevicePtr;
use super::elementwise;
use super::shared_split;
use super::{CudaBackend, CudaBuffer, CudaExperts, CudaKvCache, CudaLinear, CudaRope, CudaVector};
use crate::sampling::{Sampled, SamplingRow};
use crate::{
    Activation, AttentionShape, Backend, BackendError, DType, DeviceInfo, Fp8Matrix, HeadColumns, HostMatrix,
    KvDType, KvLayout, MemoryInfo, QuantizedMatrix, RopeFrequencies, Routing, SplitNorm, StepInput, StepPart,
};

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Linear = CudaLinear;
    type Vector = CudaVector;
    type Experts = CudaExperts;
    type Rope = CudaRope;
    type KvCache = CudaKvCache;

    fn device(&self) -> DeviceInfo {
        DeviceInfo { device_type: "cuda", description: self.description.clone(), is_asynchronous: true }
    }

    fn memory(&self) -> Result<MemoryInfo, BackendError> {
        self.context.make_current()?;
        let (available_bytes, total_bytes) = self.context.memory()?;
        Ok(MemoryInfo { total_bytes, available_bytes })
    }

    fn rank_and_world(&self) -> (usize, usize) {
        (self.communicator.rank(), self.communicator.world_size())
    }

    fn default_dtype(&self, stored: DType) -> DType {
        // Tensor cores want 16 bits; float16 keeps more of a float32 weight than bfloat16.
        if stored == DType::F32 { DType::F16 } else { stored }
    }

    fn default_kv_dtype(&self, dtype: DType) -> DType {
        dtype
    }

    fn check_kv_dtype(&self, _dtype: KvDType) -> Result<(), BackendError> {
        Ok(())
    }

    fn keeps_quantized(&self) -> bool {
        false
    }

    fn padded_batch(&self, num_seqs: usize) -> usize {
        let sizes = self.options.graph_batches.iter().copied();
        if !self.records_graphs() {
            return num_seqs;
        }
        sizes.filter(|&size| size >= num_seqs && size <= self.step.max_seqs()).min().unwrap_or(num_seqs)
    }

    fn max_step_tokens(&self) -> usize {
        self.options.max_step_tokens
    }

    fn buffer(&self, max_rows: usize, width: usize, dtype: DType) -> Result<CudaBuffer, BackendError> {
        self.context.make_current()?;
        CudaBuffer::new(&self.context, max_rows, width, dtype)
    }

    fn linear(&self, parts: &[HostMatrix<'_>], dtype: DType) -> Result<CudaLinear, BackendError> {
        let linear = self.with_uploader(|uploader| CudaLinear::new(&self.context, uploader, parts, dtype))?;
        if self.matmuls.library.prepare(&self.context, &linear)? {
            self.has_stale_graphs.set(true);
        }
        Ok(linear)
    }

    fn experts(
        &self,
        projections: Vec<(CudaLinear, CudaLinear)>,
        activation: Activation,
    ) -> Result<CudaExperts, BackendError> {
        self.context.make_current()?;
        let projections = self.plain_projections(projections)?;
        let experts = self
            .with_uploader(|uploader| CudaExperts::new(&self.context, uploader, projections, activation))?;
        self.has_stale_graphs.set(true);
        self.experts.prepare(&self.context, &experts, self.options.max_step_tokens)?;
        Ok(experts)
    }

    fn quantized_linear(&self, parts: &[QuantizedMatrix]) -> Result<CudaLinear, BackendError> {
        let bits = parts.first().map_or(0, |part| part.bits);
        Err(BackendError::Device {
            operation: format!("packing a weight of {bits} bits"),
            reason: "the CUDA backend runs plain weights, expected it dequantized".to_owned(),
        })
    }

    fn keeps_fp8(&self) -> bool {
        true
    }

    fn fp8_dtype(&self, dtype: DType) -> DType {
        self.default_dtype(dtype)
    }

    fn fp8_linear(&self, parts: &[Fp8Matrix<'_>], dtype: DType) -> Result<CudaLinear, BackendError> {
        if dtype == DType::F32 || !parts.iter().all(Fp8Matrix::has_row_scales) {
            super::fp8_linear::say_once(dtype);
            let dequantized: Vec<HostMatrix<'_>> = parts.iter().map(Fp8Matrix::dequantized).collect();
            return self.linear(&dequantized, dtype);
        }
        self.check_fp8()?;
        self.with_uploader(|uploader| CudaLinear::from_fp8(&self.context, uploader, parts, dtype))
    }

    fn quantized_to_fp8(&self, parts: &[HostMatrix<'_>], dtype: DType) -> Result<CudaLinear, BackendError> {
        if dtype == DType::F32 {
            return Err(BackendError::Device {
                operation: "quantizing a weight to fp8".to_owned(),
                reason:
                    "its activations are float32, expected float16 or bfloat16: leave out --dtype float32"
                        .to_owned(),
            });
        }
        self.check_fp8()?;
        let quantizer = &self.matmuls.fp8.rounding;
        self.with_uploader(|uploader| quantizer.quantized(&self.context, uploader, parts, dtype))
    }

    fn vector(&self, values: Vec<f32>) -> Result<CudaVector, BackendError> {
        self.with_uploader(|uploader| CudaVector::new(&self.context, uploader, &values))
    }

    fn rope(&self, frequencies: RopeFrequencies) -> Result<CudaRope, BackendError> {
        self.with_uploader(|uploader| CudaRope::new(&self.context, uploader, frequencies))
    }

    fn kv_cache(&self, layout: KvLayout, num_blocks: usize) -> Result<CudaKvCache, BackendError> {
        self.context.make_current()?;
        self.has_stale_graphs.set(true);
        CudaKvCache::new(&self.context, layout, num_blocks)
    }

    fn linear_bytes(&self, weight: &CudaLinear) -> usize {
        weight.bytes()
    }

    fn begin_step(&mut self, step: &StepInput) -> Result<(), BackendError> {
        self.context.make_current()?;
        self.finish_uploads()?;
        self.ranks.finish_joining()?;
        // Afterwards nothing reads the pinned arrays any more.
        self.queue.begin_step()?;
        self.step.upload(self.queue.stream(), step)?;
        let facts = self.step.facts();
        self.queue.set_shared_percent(shared_split::percent(facts.num_tokens, facts.is_decode));
        Ok(())
    }

    fn run<E: From<BackendError>>(
        &mut self,
        part: StepPart,
        mut operations: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.run_or_replay(part, &mut operations)
    }

    fn embed(
        &mut self,
        table: &CudaLinear,
        first_id: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.embeddings.embed(&self.queue, &self.step, table, first_id, out)
    }

    fn add_positions(
        &mut self,
        table: &CudaLinear,
        offset: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.embeddings.add_positions(&self.queue, &self.step, table, offset, out)
    }

    fn rms_norm(
        &mut self,
        x: &CudaBuffer,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.next_weight.take();
        let begin = self.queue.launched();
        self.norms.rms(&self.queue, x, (weight, eps), out)?;
        self.note_norm(begin, (x, None), (weight, eps), out);
        Ok(())
    }

    fn rms_norm_in_place(
        &mut self,
        x: &mut CudaBuffer,
        weight: &CudaVector,
        eps: f32,
    ) -> Result<(), BackendError> {
        self.norms.rms_in_place(&self.queue, x, (weight, eps))
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        norm: (&CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let next = self.next_weight.take();
        let begin = self.queue.launched();
        if next.is_some_and(|next| self.matmuls.rounds(delta.rows(), &next, delta.dtype()))
            && self.norms.add_rms_rounded(&self.queue, (residual, delta), norm, out)?
        {
            return Ok(());
        }
        self.norms.add_rms(&self.queue, (residual, delta), norm, out)?;
        self.note_norm(begin, (residual, Some(delta)), norm, out);
        Ok(())
    }

    fn layer_norm(
        &mut self,
        x: &CudaBuffer,
        (weight, bias): (&CudaVector, &CudaVector),
        eps: f32,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.next_weight.take();
        self.norms.layer(&self.queue, x, (weight, bias, eps), out)
    }

    fn layer_norm_in_place(
        &mut self,
        x: &mut CudaBuffer,
        (weight, bias): (&CudaVector, &CudaVector),
        eps: f32,
    ) -> Result<(), BackendError> {
        self.norms.layer_in_place(&self.queue, x, (weight, bias, eps))
    }

    fn add_layer_norm(
        &mut self,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        norm: (&CudaVector, &CudaVector, f32),
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.next_weight.take();
        self.norms.add_layer(&self.queue, (residual, delta), norm, out)
    }

    fn rms_norm_heads(
        &mut self,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        weight: &CudaVector,
        eps: f32,
    ) -> Result<(), BackendError> {
        self.norms.rms_heads(&self.queue, x, columns, (weight, eps))
    }

    fn layer_norm_heads(
        &mut self,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        head_dim: usize,
        norm: (&CudaVector, f32),
    ) -> Result<(), BackendError> {
        self.norms.layer_heads(&self.queue, x, columns, head_dim, norm)
    }

    fn rms_norm_across_ranks(
        &mut self,
        x: &mut CudaBuffer,
        columns: Range<usize>,
        norm: SplitNorm<'_, CudaVector>,
        squares: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.norms.squares(&self.queue, x, columns.clone(), norm.copies, squares)?;
        self.all_reduce(squares)?;
        self.norms.scale_by_squares(&self.queue, x, columns, norm, squares)
    }

    fn add(&mut self, x: &mut CudaBuffer, y: &CudaBuffer) -> Result<(), BackendError> {
        self.elementwise.add(&self.queue, x, y)
    }

    fn clamp(&mut self, x: &mut CudaBuffer, limit: f32) -> Result<(), BackendError> {
        self.elementwise.clamp(&self.queue, x, limit)
    }

    fn scale(&mut self, x: &mut CudaBuffer, factor: f32) -> Result<(), BackendError> {
        self.elementwise.scale(&self.queue, x, factor)
    }

    fn soft_cap(&mut self, x: &mut CudaBuffer, cap: f32) -> Result<(), BackendError> {
        self.elementwise.soft_cap(&self.queue, x, cap)
    }

    fn matmul(
        &mut self,
        x: &CudaBuffer,
        weight: &CudaLinear,
        bias: Option<&CudaVector>,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let begin = self.queue.launched();
        self.matmuls.matmul(&self.queue, &self.workspace, x, (weight, bias), out)?;
        self.note_product(begin, x, (weight, bias), out);
        Ok(())
    }

    fn gated_matmul(
        &mut self,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        activation: Activation,
        (gate_up, out): (&mut CudaBuffer, &mut CudaBuffer),
    ) -> Result<(), BackendError> {
        let next = self.next_weight.take();
        let begin = self.queue.launched();
        if self.matmuls.gated((&self.queue, &self.workspace), x, (weight, bias), activation, out)? {
            self.note_gated(begin, x, (weight, bias), activation, out);
            return Ok(());
        }
        self.matmul(x, weight, bias, gate_up)?;
        if next.is_some_and(|next| self.matmuls.rounds(x.rows(), &next, gate_up.dtype())) {
            let activation = elementwise::activation_number(activation);
            return self.matmuls.fp8.rounding.gate(&self.queue, gate_up, activation, out);
        }
        self.gated_activation(gate_up, activation, out)
    }

    fn add_matmul(
        &mut self,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &mut CudaBuffer,
    ) -> Result<bool, BackendError> {
        self.matmuls.add(&self.queue, x, (weight, bias), out)
    }

    fn rope_and_store_kv(
        &mut self,
        qkv: &mut CudaBuffer,
        rope: Option<&CudaRope>,
        shape: &AttentionShape,
        layer: usize,
        cache: &mut CudaKvCache,
    ) -> Result<(), BackendError> {
        let begin = self.queue.launched();
        self.ropes.rotate_and_store(&self.queue, &self.step, (qkv, rope, shape), (layer, cache))?;
        self.note_rope(begin, qkv, rope, (layer, cache));
        Ok(())
    }

    fn comes_next(&self, weight: &CudaLinear) {
        self.next_weight.set(Some(weight.into()));
    }

    fn attention(
        &mut self,
        qkv: &CudaBuffer,
        shape: &AttentionShape,
        layer: usize,
        cache: &CudaKvCache,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let (queue, step, workspace) = (&self.queue, &self.step, &self.workspace);
        let begin = queue.launched();
        self.attentions.attend((queue, step, workspace), (qkv, shape), (layer, cache), out)?;
        self.note_attention(begin, (qkv, shape), (layer, cache), out);
        Ok(())
    }

    fn gated_activation(
        &mut self,
        gate_up: &CudaBuffer,
        activation: Activation,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.elementwise.gated(&self.queue, gate_up, activation, out)
    }

    fn mixture_of_experts(
        &mut self,
        x: &CudaBuffer,
        router_logits: &CudaBuffer,
        routing: (&Routing, Option<&CudaVector>),
        experts: &CudaExperts,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.experts.mix(&self.queue, (x, router_logits), routing, experts, out)
    }

    fn matmul_heads(
        &mut self,
        x: (&CudaBuffer, HeadColumns),
        weights: &[CudaLinear],
        out: (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        self.heads.matmul(&self.queue, x, weights, out)
    }

    fn copy_heads(
        &mut self,
        x: (&CudaBuffer, HeadColumns),
        num_heads: usize,
        out: (&mut CudaBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        self.heads.copy(&self.queue, x, num_heads, out)
    }

    fn activate(&mut self, x: &mut CudaBuffer, activation: Activation) -> Result<(), BackendError> {
        self.elementwise.activate(&self.queue, x, activation)
    }

    fn gather_rows(
        &mut self,
        x: &CudaBuffer,
        rows: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        self.embeddings.gather_rows(&self.queue, x, rows, out)
    }

    fn all_reduce(&mut self, x: &mut CudaBuffer) -> Result<(), BackendError> {
        if self.ranks.all_reduce(&self.queue, x)? {
            return Ok(());
        }
        self.host = self.read(x)?;
        self.communicator.all_reduce(&mut self.host)?;
        let values = std::mem::take(&mut self.host);
        self.write(x, &values)
    }

    fn all_gather(
        &mut self,
        local: &CudaBuffer,
        widths: &[usize],
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        out.resize(local.rows());
        if self.ranks.all_gather(&self.queue, local, widths, out)? {
            return Ok(());
        }
        let values = self.read(local)?;
        let mut all = vec![0.0; out.rows() * out.width()];
        self.communicator.all_gather(&values, local.rows(), widths, &mut all)?;
        self.write(out, &all)
    }

    fn sample(
        &mut self,
        logits: &mut CudaBuffer,
        rows: &[SamplingRow<'_>],
    ) -> Result<Vec<Sampled>, BackendError> {
        self.samplers.sample((&self.queue, &self.workspace), logits, rows)
    }

    fn token_logprobs(&mut self, logits: &CudaBuffer, targets: &[u32]) -> Result<Vec<f32>, BackendError> {
        self.samplers.token_logprobs((&self.queue, &self.workspace), logits, targets)
    }

    fn read(&self, buffer: &CudaBuffer) -> Result<Vec<f32>, BackendError> {
        self.context.make_current()?;
        let mut bytes = vec![0; buffer.used_bytes()];
        self.queue.stream().download(&mut bytes, buffer.ptr())?;
        self.queue.wait()?;
        let elements = bytes.len() / buffer.dtype().size_bytes();
        let matrix = HostMatrix {
            dtype: buffer.dtype(),
            rows: 1,
            cols: elements,
            row_stride: elements,
            bytes: bytes.into(),
        };
        let mut values = vec![0.0; elements];
        matrix.read_row(0, &mut values);
        Ok(values)
    }
}

impl CudaBackend {
    /// Refuses weights of eight bits where results must not depend on the number of rows.
    fn check_fp8(&self) -> Result<(), BackendError> {
        if !self.options.is_deterministic {
            return Ok(());
        }
        Err(BackendError::Device {
            operation: "--deterministic".to_owned(),
            reason: "the weights are of eight bits (fp8), whose products depend on what is computed beside them: leave out \
                     --deterministic, or serve weights of 16 bits without --quantize fp8"
                .to_owned(),
        })
    }

    /// Projections of experts, whose kernels take plain weights: those of eight bits are dequantized.
    fn plain_projections(
        &self,
        projections: Vec<(CudaLinear, CudaLinear)>,
    ) -> Result<Vec<(CudaLinear, CudaLinear)>, BackendError> {
        let plain = |weight: CudaLinear| {
            if weight.scales().is_none() {
                return Ok(weight);
            }
            super::fp8_linear::say_once(weight.dtype);
            let rounding = &self.matmuls.fp8.rounding;
            self.with_uploader(|uploader| rounding.dequantized(&self.context, uploader, &weight))
        };
        projections.into_iter().map(|(gate_up, down)| Ok((plain(gate_up)?, plain(down)?))).collect()
    }

    /// Puts values into the rows a buffer has.
    fn write(&self, buffer: &CudaBuffer, values: &[f32]) -> Result<(), BackendError> {
        let mut bytes = vec![0; buffer.used_bytes()];
        super::upload::write_row(values, buffer.dtype(), &mut bytes);
        let to: DevicePtr = buffer.ptr();
        self.queue.stream().upload(to, &bytes)?;
        // `bytes` is gone after this.
        self.queue.wait()
    }
}
