//! One request while it is served: its tokens, its blocks, its text.

use backend::sampling::{Sampled, SamplingParams};
use models::ModelInfo;

use super::block_pool::{BlockLease, BlockPool};
use super::detokenizer::{Detokenizer, generated_text};
use super::generation::{GeneratedText, Generation, Tokens};
use super::request::{NewRequest, Prompt};
use super::stopping::Stopping;
use super::vocabulary::Vocabulary;

/// What a step has computed for a sequence and nobody has been told yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Pending {
    /// A part of the prompt, and the prompt is not done.
    Chunk,
    /// The next token.
    Token(Sampled),
}

/// What a sequence is made with.
pub(super) struct SequenceContext<'a> {
    /// Tokenizes prompts that come as text.
    pub vocabulary: &'a Vocabulary,
    /// Gives blocks to requests that bring none.
    pub pool: &'a BlockPool,
    /// Its limits.
    pub model: &'a ModelInfo,
    /// Whether prompts may be asked for their log-probabilities.
    pub request_logprobs: bool,
}

/// A request in a batch. Blocks go back to the pool when it is dropped.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Its name.
    pub request_id: u64,
    /// Prompt and answer so far.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Tokens there were at the start: the prompt and, of a resumed request, the answer so far.
    pub known_len: usize,
    /// Tokens at the start of `ids` whose keys and values are cached and whose step was reported.
    pub computed_len: usize,
    /// Tokens the next step computes: 1 in decode, a part of the prompt or all of it in prefill.
    pub next_len: usize,
    /// Where keys and values are.
    pub blocks: BlockLease,
    /// Tokens that may be stored in `blocks`.
    pub num_slots: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// How many alternatives are reported with each token.
    pub top_n: u32,
    /// Log-probabilities of the prompt's tokens as far as known, when wanted.
    pub prompt_logprobs: Option<Vec<f32>>,
    /// The result of a step that ran ahead.
    pub pending: Option<Pending>,
    /// The last of `ids`, of which nobody has been told.
    unreported: Option<Sampled>,
    stopping: Stopping,
    detokenizer: Detokenizer,
    is_finished: bool,
}

impl Sequence {
    /// Checks a request and finds it a place in the cache.
    ///
    /// # Errors
    /// One line that names the request, what it has and what it would need.
    pub(super) fn new(request: NewRequest, context: &SequenceContext<'_>) -> Result<Self, String> {
        let id = request.id;
        Self::build(request, context).map_err(|problem| format!("request {id}: {problem}"))
    }

    fn build(mut request: NewRequest, context: &SequenceContext<'_>) -> Result<Self, String> {
        let mut ids = prompt_ids(&mut request, context)?;
        let prompt_len = ids.len();
        ids.append(&mut request.generated);
        let known_len = ids.len();
        check_ids(&ids, context)?;
        // The last token is never computed, so it needs no slot.
        let wanted_slots = prompt_len + (request.stopping.max_new_tokens as usize).max(1) - 1;
        let mut stopping = Stopping::new(std::mem::take(&mut request.stopping));
        let mut detokenizer = Detokenizer::new(prompt_len);
        replay(&ids, prompt_len, &mut stopping, &mut detokenizer, context.vocabulary)?;
        let (blocks, num_slots) = place(&mut request, known_len, wanted_slots, context)?;
        if request.cache_len >= known_len {
            return Err(format!(
                "cache_len is {}, expected less than the {known_len} tokens of the prompt",
                request.cache_len
            ));
        }
        let remaining = known_len - request.cache_len;
        let next_len = match request.chunk_len {
            Some(0) => return Err("chunk_len is 0, expected at least 1".to_string()),
            Some(chunk_len) => chunk_len.min(remaining),
            None => remaining,
        };
        // Nothing comes before the first token, and cached tokens are not computed again. They come with the first
        // generated token, which a resumed request has had.
        let prompt_logprobs =
            (request.prefill_logprobs && context.request_logprobs && known_len == prompt_len)
                .then(|| vec![f32::NAN; request.cache_len.max(1)]);
        Ok(Self {
            request_id: request.id,
            ids,
            prompt_len,
            known_len,
            computed_len: request.cache_len,
            next_len,
            blocks,
            num_slots,
            sampling: request.sampling,
            top_n: request.top_n,
            prompt_logprobs,
            pending: None,
            unreported: None,
            stopping,
            detokenizer,
            is_finished: false,
        })
    }

    /// Whether its text has ended.
    pub(super) fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// Whether the tokens of the next step have a place in the cache.
    pub(super) fn has_slots(&self) -> bool {
        self.computed_len + self.next_len <= self.num_slots
    }

    /// Takes what a step has computed into the sequence, as far as the next step needs it.
    pub(super) fn advance(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        self.computed_len += self.next_len;
        if let Pending::Token(sampled) = pending {
            self.ids.push(sampled.id);
            self.unreported = Some(sampled);
        }
    }

    /// Whether another token may follow, as far as that can be told without the text of the last one.
    pub(super) fn may_go_on(&self, vocabulary: &Vocabulary) -> bool {
        let ends = |token: &Sampled| self.stopping.ends_with(token.id, vocabulary.eos_token_ids());
        !self.is_finished && !self.unreported.as_ref().is_some_and(ends)
    }

    /// Makes the text of the token that [`Sequence::advance`] took, and finds out whether it is the last. `is_reported`: whether
    /// this rank reports it.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub(super) fn report(
        &mut self,
        vocabulary: &Vocabulary,
        is_reported: bool,
    ) -> Result<Option<Generation>, String> {
        let Some(sampled) = self.unreported.take() else { return Ok(None) };
        // Text costs time: where nobody is told and nothing depends on it, it is not made.
        let text = if is_reported || self.stopping.needs_text() {
            self.detokenizer.next_text(&self.ids, vocabulary)?
        } else {
            String::new()
        };
        let finish_reason = self.stopping.push(sampled.id, &text, vocabulary.eos_token_ids());
        self.is_finished = finish_reason.is_some();
        let prompt_logprobs = self.prompt_logprobs.take();
        if !is_reported {
            return Ok(None);
        }
        let generated_text = match finish_reason {
            Some(finish_reason) => Some(GeneratedText {
                text: generated_text(&self.ids, self.prompt_len, vocabulary)?,
                generated_tokens: self.stopping.generated(),
                finish_reason,
                seed: (!self.sampling.is_greedy()).then_some(self.sampling.seed),
            }),
            None => None,
        };
        let prompt_tokens = prompt_logprobs
            .map(|logprobs| Tokens::prompt(&self.ids[..self.prompt_len], logprobs, vocabulary))
            .transpose()?;
        let top_tokens =
            if self.top_n > 0 { vec![Tokens::alternatives(&sampled.top, vocabulary)?] } else { Vec::new() };
        Ok(Some(Generation {
            request_id: self.request_id,
            prompt_tokens,
            tokens: Tokens {
                ids: vec![sampled.id],
                logprobs: vec![sampled.logprob],
                texts: vec![text],
                is_special: vec![vocabulary.is_special(sampled.id)],
            },
            generated_text,
            top_tokens,
        }))
    }
}

fn prompt_ids(request: &mut NewRequest, context: &SequenceContext<'_>) -> Result<Vec<u32>, String> {
    let mut ids = match std::mem::replace(&mut request.prompt, Prompt::Ids(Vec::new())) {
        Prompt::Ids(ids) => ids,
        Prompt::Text { text, add_special_tokens } => context.vocabulary.encode(&text, add_special_tokens)?,
    };
    if request.truncate > 0 && ids.len() > request.truncate {
        ids.drain(..ids.len() - request.truncate);
    }
    if ids.is_empty() {
        return Err("the prompt has no tokens, expected at least 1".to_string());
    }
    let total = ids.len() + request.stopping.max_new_tokens as usize;
    let max_positions = context.model.max_position_embeddings;
    if total > max_positions {
        return Err(format!(
            "{} prompt tokens and {} new ones make {total}, expected at most the model's {max_positions} positions; \
             lower max_new_tokens or --max-total-tokens",
            ids.len(),
            request.stopping.max_new_tokens
        ));
    }
    Ok(ids)
}

fn check_ids(ids: &[u32], context: &SequenceContext<'_>) -> Result<(), String> {
    let vocab_size = context.model.vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            Err(format!("the prompt has token id {id}, expected ids below the vocabulary's {vocab_size}"))
        }
        None => Ok(()),
    }
}

/// Brings a resumed request to where it was: what its answer so far, behind `prompt_len`, has left in the detokenizer
/// and in the stop conditions depends on every token of it.
fn replay(
    ids: &[u32],
    prompt_len: usize,
    stopping: &mut Stopping,
    detokenizer: &mut Detokenizer,
    vocabulary: &Vocabulary,
) -> Result<(), String> {
    for end in prompt_len + 1..=ids.len() {
        let text = detokenizer.next_text(&ids[..end], vocabulary)?;
        if let Some(reason) = stopping.push(ids[end - 1], &text, vocabulary.eos_token_ids()) {
            return Err(format!(
                "generated_ids end the text with the {}. of their {} tokens ({reason:?}), expected an answer that goes on",
                end - prompt_len,
                ids.len() - prompt_len,
            ));
        }
    }
    Ok(())
}

/// The blocks of a request of `known_len` tokens and how many tokens may be stored in them.
fn place(
    request: &mut NewRequest,
    known_len: usize,
    wanted_slots: usize,
    context: &SequenceContext<'_>,
) -> Result<(BlockLease, usize), String> {
    let block_size = context.model.block_size;
    if request.blocks.is_empty() {
        if request.cache_len > 0 {
            return Err(format!("cache_len is {} but no blocks are given, expected 0", request.cache_len));
        }
        let count = wanted_slots.div_ceil(block_size);
        let lease = context.pool.allocate(count).ok_or_else(|| {
            let free = context.pool.num_blocks().saturating_sub(1 + context.pool.num_used());
            format!("needs {count} KV blocks, {free} are free; run fewer or shorter requests at once")
        })?;
        return Ok((lease, wanted_slots));
    }
    let capacity = request.blocks.len() * block_size;
    let num_slots = if request.slots.is_empty() { capacity } else { request.slots.len() };
    if num_slots > capacity || num_slots < known_len {
        return Err(format!(
            "{num_slots} slots in {} blocks for a prompt of {known_len} tokens, expected {known_len} to {capacity}",
            request.blocks.len()
        ));
    }
    for (index, &slot) in request.slots.iter().enumerate() {
        let expected = request.blocks[index / block_size] as usize * block_size + index % block_size;
        if slot as usize != expected {
            return Err(format!(
                "slot {index} is {slot}, expected {expected}: the slots of the blocks in order, {block_size} a block"
            ));
        }
    }
    let lease = context.pool.adopt(std::mem::take(&mut request.blocks)).map_err(|block| {
        format!("block {block} is not one of the cache's {} blocks", context.pool.num_blocks())
    })?;
    Ok((lease, num_slots))
}
