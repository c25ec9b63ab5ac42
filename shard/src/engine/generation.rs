//! What one step gives each request.

use std::time::Duration;

use super::stopping::FinishReason;
use super::vocabulary::Vocabulary;

/// Tokens with their log-probabilities and texts, all of one length except as noted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Natural logarithms.
    pub logprobs: Vec<f32>,
    /// The text each token adds, or of each token alone where there is no order (alternatives, prompts).
    pub texts: Vec<String>,
    /// Whether each is a special token; empty for prompts.
    pub is_special: Vec<bool>,
}

impl Tokens {
    /// Alternatives for one place: each token's text is its own.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub fn alternatives(tokens: &[(u32, f32)], vocabulary: &Vocabulary) -> Result<Self, String> {
        let mut answer = Self::default();
        for &(id, logprob) in tokens {
            answer.ids.push(id);
            answer.logprobs.push(logprob);
            answer.texts.push(vocabulary.decode(&[id], false)?);
            answer.is_special.push(vocabulary.is_special(id));
        }
        Ok(answer)
    }

    /// A prompt's tokens with how likely they were.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub fn prompt(ids: &[u32], logprobs: Vec<f32>, vocabulary: &Vocabulary) -> Result<Self, String> {
        let texts = ids.iter().map(|&id| vocabulary.decode(&[id], false)).collect::<Result<_, _>>()?;
        Ok(Self { ids: ids.to_vec(), logprobs, texts, is_special: Vec::new() })
    }
}

/// A finished text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedText {
    /// All generated tokens but special ones.
    pub text: String,
    /// Number of generated tokens.
    pub generated_tokens: u32,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// What its random numbers came from; `None` for greedy requests.
    pub seed: Option<u64>,
}

/// One step's result for one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Whose.
    pub request_id: u64,
    /// With the first token, when the request wants its prompt back.
    pub prompt_tokens: Option<Tokens>,
    /// The new token.
    pub tokens: Tokens,
    /// With the last token.
    pub generated_text: Option<GeneratedText>,
    /// The best alternatives, one entry a new token, when the request wants them.
    pub top_tokens: Vec<Tokens>,
}

/// What others know of a batch that the engine keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CachedBatch {
    /// Its name.
    pub id: u64,
    /// Its requests, finished ones included until it is filtered.
    pub request_ids: Vec<u64>,
    /// Tokens that its blocks hold.
    pub max_tokens: usize,
    /// Tokens its next forward pass computes.
    pub current_tokens: usize,
}

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTimings {
    /// From the call's arrival to the last sampled token, or to when the tokens of a pass that ran ahead were there.
    pub forward: Duration,
    /// Token and text work after that.
    pub decode: Duration,
    /// The whole call.
    pub total: Duration,
    /// Joining batches, when there were several.
    pub concat: Option<Duration>,
}

/// The answer to one prefill or decode.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReply {
    /// One entry a request of this rank that got a token.
    pub generations: Vec<Generation>,
    /// What is left to decode; `None` when every request has ended.
    pub batch: Option<CachedBatch>,
    /// Where the time went.
    pub timings: StepTimings,
}
