//! One request on its way through the scheduler, and what it gets back.

use std::time::Instant;

use proto::v3::{GeneratedText, NextTokenChooserParameters, StoppingCriteriaParameters};
use tokio::sync::mpsc::UnboundedSender;

use super::SchedulerError;
use super::block_allocator::BlockAllocation;
use super::trace::RequestTrace;

/// A request that broke no rule, tokenized.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValidRequest {
    /// The prompt, for shards that tokenize by themselves.
    pub inputs: String,
    /// The prompt as token ids, truncated already. Never empty.
    pub input_ids: Vec<u32>,
    /// Most prompt tokens to keep, for shards that tokenize by themselves.
    pub truncate: u32,
    /// Whether the tokenizer adds its special tokens.
    pub add_special_tokens: bool,
    /// Whether the prompt's log-probabilities are wanted.
    pub prefill_logprobs: bool,
    /// How many alternatives to report for each token.
    pub top_n_tokens: u32,
    /// How tokens are chosen.
    pub parameters: NextTokenChooserParameters,
    /// When to stop. `max_new_tokens` fits into the context.
    pub stopping_parameters: StoppingCriteriaParameters,
}

impl ValidRequest {
    /// Prompt tokens.
    pub fn input_length(&self) -> u32 {
        u32::try_from(self.input_ids.len()).unwrap_or(u32::MAX)
    }
}

/// A queued or running request.
///
/// Dropping it frees its blocks and closes its channel, in this order of events: finished, failed, abandoned.
#[derive(Debug)]
pub struct Entry {
    /// What to compute.
    pub request: ValidRequest,
    /// Where the tokens go. Closed when the client has left.
    pub events: UnboundedSender<Result<Event, SchedulerError>>,
    /// When it was queued.
    pub queued: Instant,
    /// When it left the queue.
    pub started: Option<Instant>,
    /// Its KV blocks while it runs; none for shards that allocate by themselves.
    pub allocation: Option<BlockAllocation>,
    /// The tokens that it has been told: where it goes on when the shards are lost.
    pub generated: Vec<u32>,
    /// How often in a row an engine failed while it computed this, without a token in between.
    pub losses: u32,
    /// Its spans.
    pub trace: RequestTrace,
}

impl Entry {
    /// A request that arrives now.
    pub fn new(request: ValidRequest, events: UnboundedSender<Result<Event, SchedulerError>>) -> Self {
        let (queued, started, allocation) = (Instant::now(), None, None);
        let (generated, losses, trace) = (Vec::new(), 0, RequestTrace::begin());
        Self { request, events, queued, started, allocation, generated, losses, trace }
    }

    /// Tokens to compute before its next one can be chosen: prompt and answer so far.
    pub fn prefill_length(&self) -> u32 {
        let generated = u32::try_from(self.generated.len()).unwrap_or(u32::MAX);
        self.request.input_length().saturating_add(generated)
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }
}

/// A generated token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Token {
    /// Its number in the vocabulary.
    pub id: u32,
    /// The text it adds.
    pub text: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Whether it is one of the tokenizer's special tokens.
    pub special: bool,
}

/// A prompt token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptToken {
    /// Its number in the vocabulary.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Its log-probability; NaN for the first one.
    pub logprob: f32,
}

/// A token and its best alternatives, most probable first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GeneratedToken {
    /// The chosen token.
    pub token: Token,
    /// Empty unless asked for.
    pub top_tokens: Vec<Token>,
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Text, count, reason and seed.
    pub generated_text: GeneratedText,
    /// When the request was queued.
    pub queued: Instant,
    /// When it left the queue.
    pub started: Instant,
}

/// What a request receives, in order: at most one `Prefill`, any number of `Token`, one `Last`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt's tokens, if they were asked for and the shards report them.
    Prefill(Vec<PromptToken>),
    /// A token that is not the last one.
    Token(GeneratedToken),
    /// The last token.
    Last(GeneratedToken, End),
}
