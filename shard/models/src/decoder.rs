//! The executor: runs any [`DecoderSpec`](crate::spec::DecoderSpec) on any backend.

use backend::sampling::{Sampled, SamplingRow};
use backend::{AttentionShape, Backend, BackendError, KvLayout, MemoryInfo, StepInput, StepPart};

use crate::layers::{
    Attention, Embedding, InputOutput, LatentAttention, Linear, LmHead, Mlp, Norm, Residual, Scratch, Stream,
};
use crate::{CausalLm, ModelError, ModelInfo};

/// A loaded model on one rank. Made by [`load`](crate::load).
pub struct Decoder<B: Backend> {
    pub(crate) backend: B,
    pub(crate) info: ModelInfo,
    pub(crate) kv_layout: KvLayout,
    pub(crate) embedding: Embedding<B>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: Norm<B>,
    pub(crate) lm_head: LmHead<B>,
    pub(crate) scratch: Scratch<B>,
    /// `[max_step_tokens]`: keeps the hidden states of the last step.
    pub(crate) stream: Stream<B>,
    /// `[max_rows_sampled]`: the rows of it whose logits are being computed.
    pub(crate) head_stream: Stream<B>,
    pub(crate) max_rows_sampled: usize,
    pub(crate) cache: Option<B::KvCache>,
    /// Of the last step.
    pub(crate) logits_rows: Vec<u32>,
    /// Of the last step; 0 before the first and after a failed one.
    pub(crate) num_tokens: usize,
}

/// One layer.
pub(crate) struct Layer<B: Backend> {
    pub(crate) residual: Residual<B>,
    pub(crate) mixer: Mixer<B>,
    pub(crate) mlp: Mlp<B>,
}

/// What mixes tokens.
pub(crate) enum Mixer<B: Backend> {
    /// Softmax attention over the paged KV cache.
    Attention(Attention<B>),
    /// The same over latent vectors.
    LatentAttention(LatentAttention<B>),
}

impl<B: Backend> Mixer<B> {
    /// `out = mixer(x)`, this rank's part of the sum.
    fn forward(
        &self,
        backend: &mut B,
        io: InputOutput<'_, B>,
        scratch: &mut Scratch<B>,
        cache: &mut B::KvCache,
    ) -> Result<(), ModelError> {
        match self {
            Mixer::Attention(attention) => attention.forward(backend, io, scratch, cache),
            Mixer::LatentAttention(attention) => attention.forward(backend, io, scratch, cache),
        }
    }

    /// What alone reads its input; none: there are several.
    fn first(&self) -> Option<&Linear<B>> {
        match self {
            Mixer::Attention(attention) => Some(attention.first()),
            Mixer::LatentAttention(_) => None,
        }
    }

    /// This rank's heads, from which the KV cache is laid out.
    pub(crate) fn shape(&self) -> &AttentionShape {
        match self {
            Mixer::Attention(attention) => attention.shape(),
            Mixer::LatentAttention(attention) => attention.shape(),
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// The backend: what it can do and what it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What it runs on, to be asked for more than computing.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The step with as many sequences as the device wants, where each has one token.
    fn padded(&self, step: &StepInput) -> Option<StepInput> {
        let num_seqs = step.num_seqs();
        if step.num_tokens() != num_seqs {
            return None;
        }
        let wanted = self.backend.padded_batch(num_seqs);
        (wanted > num_seqs && wanted <= self.info.max_step_tokens).then(|| step.with_idle_sequences(wanted))
    }

    fn check_step(&self, step: &StepInput) -> Result<(), ModelError> {
        let (tokens, max) = (step.num_tokens(), self.info.max_step_tokens);
        if tokens == 0 || tokens > max {
            return Err(misuse(format!("a step of {tokens} tokens, expected 1 to {max}")));
        }
        let vocab_size = self.info.vocab_size;
        if let Some(id) = step.input_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(misuse(format!("token id {id}, expected less than the vocabulary's {vocab_size}")));
        }
        self.check_rows(&step.logits_rows, tokens)
    }

    fn check_rows(&self, rows: &[u32], tokens: usize) -> Result<(), ModelError> {
        match rows.iter().find(|&&row| row as usize >= tokens) {
            Some(row) => Err(misuse(format!("logits of token {row} of a step of {tokens}"))),
            None => Ok(()),
        }
    }

    fn run_layers(&mut self) -> Result<(), ModelError> {
        let Some(cache) = &mut self.cache else {
            return Err(misuse("a step before the KV cache was allocated".to_owned()));
        };
        let (stream, scratch) = (&mut self.stream, &mut self.scratch);
        let (embedding, layers) = (&self.embedding, &self.layers);
        self.backend.run(StepPart::Layers, |backend| {
            Self::run_layers_on(backend, (embedding, layers), stream, scratch, cache)
        })
    }

    fn run_layers_on(
        backend: &mut B,
        (embedding, layers): (&Embedding<B>, &[Layer<B>]),
        stream: &mut Stream<B>,
        scratch: &mut Scratch<B>,
        cache: &mut B::KvCache,
    ) -> Result<(), ModelError> {
        embedding.embed(backend, stream, scratch)?;
        for Layer { residual, mixer, mlp } in layers {
            match residual {
                Residual::Sequential { mixer: mixer_branch, mlp: mlp_branch } => {
                    let io = stream.input_of(backend, mixer_branch, mixer.first())?;
                    mixer.forward(backend, io, scratch, cache)?;
                    stream.finish(backend, mixer_branch)?;
                    let io = stream.input_of(backend, mlp_branch, mlp.first())?;
                    mlp.forward(backend, io, scratch)?;
                    stream.finish(backend, mlp_branch)?;
                }
                Residual::PostNorm { mixer: mixer_norm, mlp: mlp_norm } => {
                    let io = stream.input(backend, None)?;
                    mixer.forward(backend, io, scratch, cache)?;
                    stream.finish_with_norm(backend, Some(mixer_norm))?;
                    let io = stream.input(backend, None)?;
                    mlp.forward(backend, io, scratch)?;
                    stream.finish_with_norm(backend, mlp_norm.as_ref())?;
                }
                Residual::Parallel { norm, mlp_norm } => {
                    let io = stream.input(backend, Some(norm))?;
                    mixer.forward(backend, io, scratch, cache)?;
                    let io = stream.input_beside(backend, mlp_norm.as_ref())?;
                    mlp.forward(backend, io, scratch)?;
                    stream.finish_beside(backend)?;
                }
            }
        }
        Ok(())
    }

    /// Logits of some tokens of the last step, at most `max_rows_sampled`.
    fn logits(&mut self, rows: &[u32]) -> Result<(), ModelError> {
        let (head_stream, stream, norm) = (&mut self.head_stream, &self.stream, &self.norm);
        let (lm_head, embedding) = (&mut self.lm_head, &self.embedding);
        self.backend.run(StepPart::Logits, |backend| {
            head_stream.gather(backend, stream, rows)?;
            let (normed, _) = head_stream.input(backend, Some(norm))?;
            lm_head.forward(backend, embedding, normed)?;
            Ok(())
        })
    }

    /// The logits of some tokens of the last step, `[rows.len() * vocab_size]`, on the host: for tests and tools.
    ///
    /// # Errors
    /// A row is not of the last step, or the device or a peer failed.
    pub fn read_logits(&mut self, rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.check_rows(rows, self.num_tokens)?;
        let mut all = Vec::with_capacity(rows.len() * self.info.vocab_size);
        for rows in rows.chunks(self.max_rows_sampled) {
            self.logits(rows)?;
            all.extend(self.backend.read(&self.lm_head.logits)?);
        }
        Ok(all)
    }
}

impl<B: Backend> CausalLm for Decoder<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo, ModelError> {
        Ok(self.backend.memory()?)
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), ModelError> {
        // The old one goes first: both together might not fit.
        self.cache = None;
        self.cache = Some(self.backend.kv_cache(self.kv_layout, num_blocks)?);
        Ok(())
    }

    fn forward(&mut self, step: &StepInput) -> Result<(), ModelError> {
        self.num_tokens = 0;
        self.check_step(step)?;
        let padded = self.padded(step);
        self.backend.begin_step(padded.as_ref().unwrap_or(step))?;
        self.run_layers()?;
        self.num_tokens = step.num_tokens();
        self.logits_rows.clone_from(&step.logits_rows);
        Ok(())
    }

    fn sample(&mut self, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>, ModelError> {
        let wanted = std::mem::take(&mut self.logits_rows);
        if rows.len() != wanted.len() || self.num_tokens == 0 {
            return Err(misuse(format!(
                "{} rows to sample, expected the step's {}",
                rows.len(),
                wanted.len()
            )));
        }
        let mut sampled = Vec::with_capacity(rows.len());
        for (tokens, rows) in wanted.chunks(self.max_rows_sampled).zip(rows.chunks(self.max_rows_sampled)) {
            self.logits(tokens)?;
            sampled.extend(self.backend.sample(&mut self.lm_head.logits, rows)?);
        }
        self.logits_rows = wanted;
        Ok(sampled)
    }

    fn token_logprobs(&mut self, rows: &[u32], targets: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.check_rows(rows, self.num_tokens)?;
        let vocab_size = self.info.vocab_size;
        if rows.len() != targets.len() || targets.iter().any(|&id| id as usize >= vocab_size) {
            return Err(misuse(format!("{} targets for {} rows", targets.len(), rows.len())));
        }
        let mut logprobs = Vec::with_capacity(rows.len());
        for (rows, targets) in rows.chunks(self.max_rows_sampled).zip(targets.chunks(self.max_rows_sampled)) {
            self.logits(rows)?;
            logprobs.extend(self.backend.token_logprobs(&self.lm_head.logits, targets)?);
        }
        Ok(logprobs)
    }
}

/// The engine asked for something that cannot be.
fn misuse(what: String) -> ModelError {
    ModelError::Backend(BackendError::Device { operation: "forward".to_owned(), reason: what })
}
