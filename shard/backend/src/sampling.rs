//! From logits to token ids: the types of [`crate::Backend::sample`].
//!
//! Order of the steps, as TGI has it: repetition penalty, frequency penalty, temperature, top-k, top-p, typical-p,
//! choose. Log-probabilities are of the distribution after all of them. Random numbers come from a counter-based
//! generator keyed by (seed, position): the same token whatever the batch, the rank or a restart.

/// How one request chooses its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 1: off.
    pub temperature: f32,
    /// 0: off. Ties with the k-th are kept.
    pub top_k: u32,
    /// 1: off. The smallest set of tokens with at least this mass.
    pub top_p: f32,
    /// 1: off.
    pub typical_p: f32,
    /// Sample rather than take the maximum. Also true whenever one of the four above is on, see [`Self::is_greedy`].
    pub do_sample: bool,
    /// Key of the random numbers.
    pub seed: u64,
    /// 1: off. Logits of ids seen in prompt or answer are divided by it when positive, multiplied when negative.
    pub repetition_penalty: f32,
    /// 0: off. Logits lose it times the id's share of the sequence (count / length).
    pub frequency_penalty: f32,
}

impl SamplingParams {
    /// TGI's rule: anything that shapes the distribution makes the request a sampled one.
    pub fn is_greedy(&self) -> bool {
        !(self.do_sample
            || self.temperature != 1.0
            || self.top_k != 0
            || self.top_p < 1.0
            || self.typical_p < 1.0)
    }
}

/// One row of logits to choose from.
#[derive(Debug, Clone, Copy)]
pub struct SamplingRow<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Prompt and answer so far, for the penalties; its length is the position of the token to choose and the counter
    /// of its random numbers.
    pub history: &'a [u32],
    /// How many of the best tokens to report; those that tie with the last one are reported too.
    pub top_n: u32,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Its natural-log probability.
    pub logprob: f32,
    /// The best tokens, best first, when asked for.
    pub top: Vec<(u32, f32)>,
}
