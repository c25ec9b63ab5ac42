//! `impl Backend for CpuBackend`: each operation checks its shapes and hands rows or tiles to the threads.

use std::ops::Range;

use super::kv_cache::plain_dtype;
use super::norm::RowNorm;
use super::packed_linear::Storage;
use super::quantized_linear::QuantizedLinear;
use super::rows::{SMALL, for_each_row, for_rows};
use super::threads::{SharedMut, part};
use super::{
    CpuBackend, CpuBuffer, CpuExperts, CpuKvCache, CpuRope, CpuVector, PackedLinear, heads, matmul, memory,
    norm, rope,
};
use crate::sampling::{Sampled, SamplingRow};
use crate::step_check::CacheUse;
use crate::{
    Activation, AttentionShape, Backend, BackendError, DType, DeviceInfo, HeadColumns, HostMatrix, KvDType,
    KvLayout, MemoryInfo, QuantizedMatrix, RopeFrequencies, Routing, SplitNorm, StepInput,
};

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Linear = PackedLinear;
    type Vector = CpuVector;
    type Experts = CpuExperts;
    type Rope = CpuRope;
    type KvCache = CpuKvCache;

    fn device(&self) -> DeviceInfo {
        DeviceInfo { device_type: "cpu", description: self.description.clone(), is_asynchronous: false }
    }

    fn memory(&self) -> Result<MemoryInfo, BackendError> {
        memory::machine_memory()
    }

    fn rank_and_world(&self) -> (usize, usize) {
        (self.communicator.rank(), self.communicator.world_size())
    }

    fn default_dtype(&self, stored: DType) -> DType {
        stored
    }

    fn max_step_tokens(&self) -> usize {
        // Enough for weights to be read once for much arithmetic, little enough for activations to stay in the cache.
        512
    }

    fn keeps_quantized(&self) -> bool {
        true
    }

    fn default_kv_dtype(&self, dtype: DType) -> DType {
        // float16 keeps three bits more than bfloat16, and keys and values are far from its limits.
        if dtype == DType::F32 { DType::F32 } else { DType::F16 }
    }

    fn check_kv_dtype(&self, dtype: KvDType) -> Result<(), BackendError> {
        plain_dtype(dtype).map(|_| ())
    }

    fn buffer(&self, max_rows: usize, width: usize, _dtype: DType) -> Result<CpuBuffer, BackendError> {
        CpuBuffer::new(max_rows, width)
    }

    fn linear(&self, parts: &[HostMatrix<'_>], dtype: DType) -> Result<PackedLinear, BackendError> {
        let tools = (&mut *self.threads.borrow_mut(), &mut *self.arena.borrow_mut());
        PackedLinear::pack(parts, dtype, self.kernels, tools)
    }

    fn quantized_linear(&self, parts: &[QuantizedMatrix]) -> Result<PackedLinear, BackendError> {
        let tools = (&mut *self.threads.borrow_mut(), &mut *self.arena.borrow_mut());
        Ok(PackedLinear(Storage::Quantized(QuantizedLinear::pack(parts, tools)?)))
    }

    fn experts(
        &self,
        projections: Vec<(PackedLinear, PackedLinear)>,
        activation: Activation,
    ) -> Result<CpuExperts, BackendError> {
        CpuExperts::new(projections, activation)
    }

    fn vector(&self, values: Vec<f32>) -> Result<CpuVector, BackendError> {
        Ok(CpuVector(values))
    }

    fn rope(&self, frequencies: RopeFrequencies) -> Result<CpuRope, BackendError> {
        let id = self.num_ropes.get();
        self.num_ropes.set(id + 1);
        Ok(CpuRope { id, frequencies })
    }

    fn kv_cache(&self, layout: KvLayout, num_blocks: usize) -> Result<CpuKvCache, BackendError> {
        CpuKvCache::new(layout, num_blocks)
    }

    fn linear_bytes(&self, weight: &PackedLinear) -> usize {
        weight.bytes()
    }

    fn begin_step(&mut self, step: &StepInput) -> Result<(), BackendError> {
        crate::step_check::check(step)?;
        self.threads.get_mut().pin_caller();
        self.step.clone_from(step);
        self.step_number += 1;
        Ok(())
    }

    fn embed(
        &mut self,
        table: &PackedLinear,
        first_id: usize,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        assert_eq!(out.width(), table.in_features(), "the embedding and the buffer differ in width");
        out.resize(self.step.num_tokens());
        let ids = &self.step.input_ids;
        for_each_row(
            self.threads.get_mut(),
            out,
            &|row, out| match (ids[row] as usize).checked_sub(first_id) {
                Some(id) if id < table.out_features() => table.read_row(id, out),
                _ => out.fill(0.0),
            },
        );
        Ok(())
    }

    fn add_positions(
        &mut self,
        table: &PackedLinear,
        offset: usize,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let positions = &self.step.position_ids;
        assert!(
            out.width() == table.in_features() && out.rows() == positions.len(),
            "positions of {} on {} rows of {}",
            table.in_features(),
            out.rows(),
            out.width()
        );
        let last = positions.iter().max().map_or(0, |&position| position as usize + offset);
        if last >= table.out_features() {
            return Err(BackendError::Device {
                operation: "adding positions".to_owned(),
                reason: format!("row {last} of a table of {}", table.out_features()),
            });
        }
        for_each_row(self.threads.get_mut(), out, &|row, out| {
            let mut values = vec![0.0; out.len()];
            table.read_row(positions[row] as usize + offset, &mut values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
        });
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &CpuBuffer,
        weight: &CpuVector,
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Rms { weight: &weight.0, eps }.apply(tools, x, out);
        Ok(())
    }

    fn rms_norm_in_place(
        &mut self,
        x: &mut CpuBuffer,
        weight: &CpuVector,
        eps: f32,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Rms { weight: &weight.0, eps }.apply_in_place(tools, x);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CpuBuffer,
        delta: &CpuBuffer,
        (weight, eps): (&CpuVector, f32),
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Rms { weight: &weight.0, eps }.add_and_apply(tools, residual, delta, out);
        Ok(())
    }

    fn layer_norm(
        &mut self,
        x: &CpuBuffer,
        (weight, bias): (&CpuVector, &CpuVector),
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Layer { weight: &weight.0, bias: &bias.0, eps }.apply(tools, x, out);
        Ok(())
    }

    fn layer_norm_in_place(
        &mut self,
        x: &mut CpuBuffer,
        (weight, bias): (&CpuVector, &CpuVector),
        eps: f32,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Layer { weight: &weight.0, bias: &bias.0, eps }.apply_in_place(tools, x);
        Ok(())
    }

    fn add_layer_norm(
        &mut self,
        residual: &mut CpuBuffer,
        delta: &CpuBuffer,
        (weight, bias, eps): (&CpuVector, &CpuVector, f32),
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        RowNorm::Layer { weight: &weight.0, bias: &bias.0, eps }.add_and_apply(tools, residual, delta, out);
        Ok(())
    }

    fn rms_norm_heads(
        &mut self,
        x: &mut CpuBuffer,
        columns: Range<usize>,
        weight: &CpuVector,
        eps: f32,
    ) -> Result<(), BackendError> {
        let (width, head_dim) = (x.width(), weight.0.len());
        assert!(
            columns.start <= columns.end && columns.end <= width && columns.len().is_multiple_of(head_dim),
            "heads of {head_dim} in the columns {columns:?} of {width}"
        );
        let kernel = self.kernels.rms_norm_in_place;
        for_each_row(self.threads.get_mut(), x, &|_, row| {
            for head in row[columns.clone()].chunks_exact_mut(head_dim) {
                // SAFETY: the processor has the instruction set.
                unsafe { kernel(head, &weight.0, eps) };
            }
        });
        Ok(())
    }

    fn layer_norm_heads(
        &mut self,
        x: &mut CpuBuffer,
        columns: Range<usize>,
        head_dim: usize,
        (weight, eps): (&CpuVector, f32),
    ) -> Result<(), BackendError> {
        norm::layer_norm_heads(self.threads.get_mut(), x, columns, head_dim, (&weight.0, eps));
        Ok(())
    }

    fn rms_norm_across_ranks(
        &mut self,
        x: &mut CpuBuffer,
        columns: Range<usize>,
        SplitNorm { weight, eps, total_width, copies }: SplitNorm<'_, CpuVector>,
        squares: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        norm::squares(self.threads.get_mut(), x, columns.clone(), copies, squares);
        self.all_reduce(squares)?;
        norm::scale_by_squares(self.threads.get_mut(), x, columns, (squares, total_width), (&weight.0, eps));
        Ok(())
    }

    fn add(&mut self, x: &mut CpuBuffer, y: &CpuBuffer) -> Result<(), BackendError> {
        let width = y.width();
        assert!(x.width() == width && x.rows() == y.rows(), "a sum of different shapes");
        let kernel = self.kernels.add;
        for_each_row(self.threads.get_mut(), x, &|row, x| {
            // SAFETY: the processor has the instruction set.
            unsafe { kernel(x, &y.as_slice()[row * width..(row + 1) * width]) };
        });
        Ok(())
    }

    fn clamp(&mut self, x: &mut CpuBuffer, limit: f32) -> Result<(), BackendError> {
        assert!(limit > 0.0, "a limit of {limit}");
        for_each_row(self.threads.get_mut(), x, &|_, row| {
            row.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
        });
        Ok(())
    }

    fn scale(&mut self, x: &mut CpuBuffer, factor: f32) -> Result<(), BackendError> {
        let kernel = self.kernels.scale;
        // SAFETY: the processor has the instruction set.
        for_each_row(self.threads.get_mut(), x, &|_, row| unsafe { kernel(row, factor) });
        Ok(())
    }

    fn soft_cap(&mut self, x: &mut CpuBuffer, cap: f32) -> Result<(), BackendError> {
        assert!(cap > 0.0, "a soft cap of {cap}");
        let kernel = self.kernels.soft_cap;
        // SAFETY: the processor has the instruction set.
        for_each_row(self.threads.get_mut(), x, &|_, row| unsafe { kernel(row, cap) });
        Ok(())
    }

    fn matmul(
        &mut self,
        x: &CpuBuffer,
        weight: &PackedLinear,
        bias: Option<&CpuVector>,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut(), &mut self.workspace);
        matmul::matmul(tools, x, weight, bias.map(|bias| bias.0.as_slice()), out)
    }

    fn rope_and_store_kv(
        &mut self,
        qkv: &mut CpuBuffer,
        rope: Option<&CpuRope>,
        shape: &AttentionShape,
        layer: usize,
        cache: &mut CpuKvCache,
    ) -> Result<(), BackendError> {
        self.check_attention(qkv, shape, layer, cache)?;
        if let Some(rope) = rope {
            if self.rope_tables.len() <= rope.id {
                self.rope_tables.resize_with(rope.id + 1, rope::RopeTable::default);
            }
            self.rope_tables[rope.id].prepare(&rope.frequencies, self.step_number, &self.step);
        }
        let table = rope.map(|rope| (&self.rope_tables[rope.id], &rope.frequencies));
        let (step, width, head_dim) = (&self.step, qkv.width(), shape.head_dim);
        let rows = SharedMut::new(qkv.as_mut_slice());
        let writer = cache.writer(layer);
        for_rows(self.threads.get_mut(), step.num_tokens(), width, &|tokens| {
            for token in tokens {
                // SAFETY: each token is one thread's.
                let row = unsafe { rows.slice(token * width..(token + 1) * width) };
                let (turning, values) = row.split_at_mut((shape.num_heads + shape.num_kv_heads) * head_dim);
                if let Some((table, frequencies)) = table {
                    turning
                        .chunks_exact_mut(head_dim)
                        .for_each(|head| table.rotate(frequencies, token, head));
                }
                let keys = &turning[shape.num_heads * head_dim..];
                for (kv_head, (key, value)) in keys.chunks(head_dim).zip(values.chunks(head_dim)).enumerate()
                {
                    // SAFETY: `check_attention` found the slots within the cache; a slot is one token's.
                    unsafe { writer.store(kv_head, step.slot_mapping[token] as usize, key, value) };
                }
            }
        });
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &CpuBuffer,
        shape: &AttentionShape,
        layer: usize,
        cache: &CpuKvCache,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        self.check_attention(qkv, shape, layer, cache)?;
        assert_eq!(out.width(), shape.num_heads * shape.head_dim, "the attention's result has another width");
        let tools = (self.kernels, self.threads.get_mut());
        self.attention_plan.run(tools, (&self.step, shape, layer), qkv, cache, out);
        Ok(())
    }

    fn gated_activation(
        &mut self,
        gate_up: &CpuBuffer,
        activation: Activation,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let width = out.width();
        assert_eq!(gate_up.width(), 2 * width, "gate and up side by side have twice the width of the result");
        out.resize(gate_up.rows());
        let kernel = self.kernels.gated;
        for_each_row(self.threads.get_mut(), out, &|row, out| {
            let inputs = &gate_up.as_slice()[2 * row * width..2 * (row + 1) * width];
            // SAFETY: the processor has the instruction set.
            unsafe { kernel(inputs, activation, out) };
        });
        Ok(())
    }

    fn mixture_of_experts(
        &mut self,
        x: &CpuBuffer,
        router_logits: &CpuBuffer,
        (routing, correction): (&Routing, Option<&CpuVector>),
        experts: &CpuExperts,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        let tools = (self.kernels, self.threads.get_mut());
        let routing = (routing, correction.map(|correction| correction.0.as_slice()));
        self.expert_plan.run(tools, (x, router_logits), routing, experts, out);
        Ok(())
    }

    fn matmul_heads(
        &mut self,
        x: (&CpuBuffer, HeadColumns),
        weights: &[PackedLinear],
        out: (&mut CpuBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        self.head_plan.matmul((self.kernels, self.threads.get_mut()), x, weights, out);
        Ok(())
    }

    fn copy_heads(
        &mut self,
        x: (&CpuBuffer, HeadColumns),
        num_heads: usize,
        out: (&mut CpuBuffer, HeadColumns),
    ) -> Result<(), BackendError> {
        heads::copy(x, num_heads, out);
        Ok(())
    }

    fn activate(&mut self, x: &mut CpuBuffer, activation: Activation) -> Result<(), BackendError> {
        let kernel = self.kernels.activate;
        // SAFETY: the processor has the instruction set.
        for_each_row(self.threads.get_mut(), x, &|_, row| unsafe { kernel(row, activation) });
        Ok(())
    }

    fn gather_rows(&mut self, x: &CpuBuffer, rows: &[u32], out: &mut CpuBuffer) -> Result<(), BackendError> {
        let width = x.width();
        assert_eq!(width, out.width(), "rows gathered into another width");
        out.resize(rows.len());
        for (to, &row) in out.as_mut_slice().chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&x.as_slice()[row as usize * width..(row as usize + 1) * width]);
        }
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut CpuBuffer) -> Result<(), BackendError> {
        self.communicator.all_reduce(x.as_mut_slice())
    }

    fn all_gather(
        &mut self,
        local: &CpuBuffer,
        widths: &[usize],
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        out.resize(local.rows());
        self.communicator.all_gather(local.as_slice(), local.rows(), widths, out.as_mut_slice())
    }

    fn sample(
        &mut self,
        logits: &mut CpuBuffer,
        rows: &[SamplingRow<'_>],
    ) -> Result<Vec<Sampled>, BackendError> {
        assert_eq!(logits.rows(), rows.len(), "each row of logits needs its parameters");
        let width = logits.width();
        let mut sampled = vec![Sampled::default(); rows.len()];
        let results = SharedMut::new(&mut sampled);
        let all_logits = SharedMut::new(logits.as_mut_slice());
        let samplers = SharedMut::new(&mut self.samplers);
        let threads = self.threads.get_mut();
        let count = if rows.len() * width < SMALL { 1 } else { threads.count().min(rows.len()) };
        let task = |index: usize| {
            for row in part(rows.len(), index, count) {
                // SAFETY: each row, and each thread's sampler, is one thread's.
                unsafe {
                    let logits = all_logits.slice(row * width..(row + 1) * width);
                    results.slice(row..row + 1)[0] =
                        samplers.slice(index..index + 1)[0].sample(logits, &rows[row]);
                }
            }
        };
        if count == 1 {
            task(0)
        } else {
            threads.run(&|index| {
                if index < count {
                    task(index)
                }
            })
        }
        Ok(sampled)
    }

    fn token_logprobs(&mut self, logits: &CpuBuffer, targets: &[u32]) -> Result<Vec<f32>, BackendError> {
        assert_eq!(logits.rows(), targets.len(), "each row of logits needs its target");
        let width = logits.width();
        let mut logprobs = vec![0.0f32; targets.len()];
        let results = SharedMut::new(&mut logprobs);
        let kernels = self.kernels;
        for_rows(self.threads.get_mut(), targets.len(), width, &|rows| {
            for row in rows {
                let logits = &logits.as_slice()[row * width..(row + 1) * width];
                // SAFETY: each row is one thread's; the processor has the instruction set.
                unsafe {
                    let highest = (kernels.maximum)(logits);
                    let total = (kernels.sum_exp)(logits, highest);
                    let own = logits[targets[row] as usize];
                    results.slice(row..row + 1)[0] = own - highest - total.ln() as f32;
                }
            }
        });
        Ok(logprobs)
    }

    fn read(&self, buffer: &CpuBuffer) -> Result<Vec<f32>, BackendError> {
        Ok(buffer.as_slice().to_vec())
    }
}

impl CpuBackend {
    /// That shapes, slots and tables of the step lie within the cache: the kernels rely on it.
    fn check_attention(
        &self,
        qkv: &CpuBuffer,
        shape: &AttentionShape,
        layer: usize,
        cache: &CpuKvCache,
    ) -> Result<(), BackendError> {
        let layout = cache.layout();
        assert!(
            layer < layout.num_layers
                && shape.num_kv_heads == layout.num_kv_heads
                && shape.head_dim == layout.head_dim,
            "layer {layer} with {shape:?} in a cache of {layout:?}"
        );
        assert!(shape.num_heads.is_multiple_of(shape.num_kv_heads) && shape.window != Some(0), "{shape:?}");
        assert!(
            qkv.width() == shape.qkv_width() && qkv.rows() == self.step.num_tokens(),
            "{} rows of {}",
            qkv.rows(),
            qkv.width()
        );
        let fits = (self.step_number, cache.num_blocks(), layout.block_size);
        if self.checked.get() != fits {
            CacheUse::of(&self.step).check(cache.num_blocks(), layout.block_size)?;
            self.checked.set(fits);
        }
        Ok(())
    }
}
