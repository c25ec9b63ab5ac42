//! Running a part of a step, recording it, and replaying what was recorded: launch by launch or, where the layers are of the
//! usual kind and the sequences few, with all layers in one launch.

use super::elementwise::activation_number;
use super::graph::{Graph, GraphKey, Plan};
use super::launch::Mode;
use super::merged::MergedSteps;
use super::program::{CachePlanes, Heads, Notes, Operation, Product, Program};
use super::{CudaBackend, CudaBuffer, CudaKvCache, CudaLinear, CudaRope, CudaVector};
use crate::{Activation, AttentionShape, BackendError, DType, KvDType, StepPart};

impl CudaBackend {
    /// `Backend::run`.
    pub(super) fn run_or_replay<E: From<BackendError>>(
        &mut self,
        part: StepPart,
        operations: &mut impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.has_stale_graphs.take() {
            self.graphs.clear();
            if let Some(merged) = &mut self.merged {
                merged.clear();
            }
        }
        let facts = self.step.facts();
        let is_recorded = part == StepPart::Layers
            && facts.is_decode
            && self.records_graphs()
            && self.options.graph_batches.contains(&facts.num_seqs);
        if !is_recorded {
            return operations(self);
        }
        let key = GraphKey { part, rows: facts.num_seqs, is_merged: false };
        match self.graphs.plan(key) {
            Plan::Eager => operations(self),
            Plan::Record => {
                // A recording takes longer than the step: the device works meanwhile.
                let program = self.run_noting(operations)?;
                let graph = self.capture(Mode::Launch, operations, |_| Ok(()))?;
                self.graphs.insert(key, graph);
                program.map_or(Ok(()), |program| self.record_merged(key, &program, operations))
            }
            Plan::Replay => {
                let merged = GraphKey { is_merged: true, ..key };
                let is_merged = MergedSteps::takes(&facts) && self.graphs.has(merged);
                self.graphs.launch(if is_merged { merged } else { key }, self.queue.stream())?;
                self.queue.mode = Mode::Dry;
                let result = operations(self);
                self.queue.mode = Mode::Launch;
                result
            }
        }
    }

    /// Whether decode steps of a few sequences can be one launch on this device.
    pub fn merges_steps(&self) -> bool {
        self.merged.is_some() && self.records_graphs()
    }

    /// Whether the layers of decode steps of `num_seqs` sequences have been recorded as one launch.
    pub fn has_merged_step(&self, num_seqs: usize) -> bool {
        self.graphs.has(GraphKey { part: StepPart::Layers, rows: num_seqs, is_merged: true })
    }

    /// Runs them, and says whether they are layers for one launch.
    fn run_noting<E: From<BackendError>>(
        &mut self,
        operations: &mut impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<Option<Program>, E> {
        let rows = self.step.facts().num_seqs;
        self.queue.count_anew();
        self.notes = self.merged.is_some().then(Notes::default);
        let result = operations(self);
        let notes = self.notes.take();
        result?;
        let program = notes.and_then(|notes| notes.program(self.queue.launched()));
        let is_taken =
            |program: &Program| self.merged.as_ref().is_some_and(|merged| merged.accepts(program, rows));
        Ok(program.filter(is_taken))
    }

    /// Records the operations as `mode` has them, and what `then` launches after them.
    fn capture<E: From<BackendError>>(
        &mut self,
        mode: Mode,
        operations: &mut impl FnMut(&mut Self) -> Result<(), E>,
        then: impl FnOnce(&mut Self) -> Result<(), BackendError>,
    ) -> Result<Graph, E> {
        Graph::begin(self.queue.stream())?;
        self.queue.count_anew();
        self.queue.mode = mode;
        let result = operations(self);
        self.queue.mode = Mode::Launch;
        let result = result.and_then(|()| Ok(then(self)?));
        // The stream must not stay in recording, whatever happened.
        let graph = Graph::end(self.queue.stream());
        result?;
        Ok(graph?)
    }

    /// Records what comes before the layers, and the layers as one launch.
    fn record_merged<E: From<BackendError>>(
        &mut self,
        key: GraphKey,
        program: &Program,
        operations: &mut impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(merged) = &mut self.merged else { return Ok(()) };
        merged.upload(&self.context, &self.queue, program)?;
        let graph = self.capture(Mode::First(program.prefix), operations, |backend| {
            let Some(merged) = &backend.merged else { return Ok(()) };
            merged.launch(&backend.queue, &backend.step, program)
        })?;
        self.graphs.insert(GraphKey { is_merged: true, ..key }, graph);
        Ok(())
    }

    /// Notes an operation that has launched what came after the first `begin` launches.
    fn note(&mut self, begin: usize, operation: impl FnOnce() -> Option<Operation>) {
        let launched = self.queue.launched();
        if let Some(notes) = &mut self.notes {
            notes.add((begin, launched), operation());
        }
    }

    pub(super) fn note_norm(
        &mut self,
        begin: usize,
        (residual, delta): (&CudaBuffer, Option<&CudaBuffer>),
        (weight, eps): (&CudaVector, f32),
        out: &CudaBuffer,
    ) {
        self.note(begin, || {
            (residual.dtype() == DType::F32).then(|| Operation::Norm {
                residual: residual.ptr(),
                delta: delta.map(CudaBuffer::ptr),
                weight: weight.ptr(),
                eps,
                out: out.ptr(),
            })
        });
    }

    pub(super) fn note_product(
        &mut self,
        begin: usize,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) {
        self.note(begin, || product(x, (weight, bias), out).map(Operation::Product));
    }

    pub(super) fn note_gated(
        &mut self,
        begin: usize,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        activation: Activation,
        out: &CudaBuffer,
    ) {
        let activation = activation_number(activation);
        self.note(begin, || {
            product(x, (weight, bias), out).map(|product| Operation::Gated { product, activation })
        });
    }

    pub(super) fn note_rope(
        &mut self,
        begin: usize,
        qkv: &CudaBuffer,
        rope: Option<&CudaRope>,
        (layer, cache): (usize, &CudaKvCache),
    ) {
        self.note(begin, || {
            let rope = rope?.plain()?;
            Some(Operation::Rope { qkv: qkv.ptr(), rope, cache: planes(layer, cache) })
        });
    }

    pub(super) fn note_attention(
        &mut self,
        begin: usize,
        (qkv, shape): (&CudaBuffer, &AttentionShape),
        (layer, cache): (usize, &CudaKvCache),
        out: &CudaBuffer,
    ) {
        let &AttentionShape { num_heads, num_kv_heads, head_dim, scale, .. } = shape;
        let is_plain = shape.window.is_none() && shape.soft_cap.is_none() && shape.alibi.is_none();
        let has_one_type = cache.layout().dtype == KvDType::Plain(qkv.dtype());
        let heads = Heads { num_heads, num_kv_heads, head_dim, block_size: cache.layout().block_size };
        self.note(begin, || {
            (is_plain && has_one_type).then(|| Operation::Attention {
                qkv: qkv.ptr(),
                heads,
                scale,
                cache: planes(layer, cache),
                out: out.ptr(),
            })
        });
    }
}

fn planes(layer: usize, cache: &CudaKvCache) -> CachePlanes {
    CachePlanes { keys: cache.keys(layer), values: cache.values(layer) }
}

/// A product, if it is one of plain weights of 16 bits.
fn product(
    x: &CudaBuffer,
    (weight, bias): (&CudaLinear, Option<&CudaVector>),
    out: &CudaBuffer,
) -> Option<Product> {
    let is_plain = weight.scales().is_none()
        && bias.is_none()
        && weight.row_stride == weight.in_features
        && x.dtype() == weight.dtype
        && out.dtype() == weight.dtype
        && x.rounded().is_none();
    is_plain.then(|| Product {
        x: x.ptr(),
        weight: weight.ptr(),
        out: out.ptr(),
        dtype: weight.dtype,
        inputs: weight.in_features,
        outputs: weight.out_features,
    })
}
