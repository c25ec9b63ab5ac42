//! A request as the engine takes it.

use backend::sampling::SamplingParams;

use super::stopping::StoppingParams;

/// A prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Text, to be tokenized here.
    Text {
        /// The text.
        text: String,
        /// Whether the tokenizer's own marks (such as a begin-of-text token) are added.
        add_special_tokens: bool,
    },
}

/// A request of a new batch.
#[derive(Debug, Clone, PartialEq)]
pub struct NewRequest {
    /// Its name; also decides which rank reports it.
    pub id: u64,
    /// What to continue.
    pub prompt: Prompt,
    /// The answer so far, of a request that was interrupted elsewhere; empty for a new one. It goes on behind them as if
    /// they had been generated here.
    pub generated: Vec<u32>,
    /// Only this many tokens at the end of the prompt are kept; 0: all.
    pub truncate: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When the text ends.
    pub stopping: StoppingParams,
    /// Whether the caller wants the log-probabilities of the prompt.
    pub prefill_logprobs: bool,
    /// How many alternatives are reported with each token.
    pub top_n: u32,
    /// Blocks chosen by the caller; empty: the engine takes some of its own.
    pub blocks: Vec<u32>,
    /// Slots of the tokens in those blocks, one a token of prompt and answer; empty: all slots of the blocks.
    pub slots: Vec<u32>,
    /// Tokens of the prompt that the caller's blocks hold already.
    pub cache_len: usize,
    /// Compute only so many tokens of prompt and answer so far in the first step; `None`: all.
    pub chunk_len: Option<usize>,
}

/// Requests that start together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NewBatch {
    /// Its name.
    pub id: u64,
    /// At least one.
    pub requests: Vec<NewRequest>,
}
