//! What can be wrong with a request.

/// A broken rule. The texts are TGI's, which clients show and tests compare.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// Out of range for `best_of`.
    #[error("`best_of` must be > 0 and <= {max}. Given: {given}")]
    BestOf {
        /// The limit.
        max: usize,
        /// The value.
        given: usize,
    },
    /// The limit is 1.
    #[error("`best_of` != 1 is not allowed for this endpoint")]
    BestOfDisabled,
    /// All sequences would be the same.
    #[error("you must use sampling when `best_of` is > 1")]
    BestOfSampling,
    /// All sequences would be the same.
    #[error("`seed` must not be set when `best_of` > 1")]
    BestOfSeed,
    /// Only one sequence can be streamed.
    #[error("`best_of` != 1 is not supported when streaming tokens")]
    BestOfStream,
    /// The prompt's tokens come with the whole answer only.
    #[error("`decoder_input_details` == true is not supported when streaming tokens")]
    PrefillDetailsStream,
    /// Out of range for `temperature`.
    #[error("`temperature` must be strictly positive")]
    Temperature,
    /// Out of range for `repetition_penalty`.
    #[error("`repetition_penalty` must be strictly positive")]
    RepetitionPenalty,
    /// Out of range for `frequency_penalty`.
    #[error("`frequency_penalty` must be >= -2.0 and <= 2.0")]
    FrequencyPenalty,
    /// Out of range for `top_p`.
    #[error("`top_p` must be > 0.0 and < 1.0")]
    TopP,
    /// Out of range for `typical_p`.
    #[error("`typical_p` must be > 0.0 and < 1.0")]
    TypicalP,
    /// Out of range for `top_k`.
    #[error("`top_k` must be strictly positive")]
    TopK,
    /// Zero for `max_new_tokens`.
    #[error("`max_new_tokens` must be strictly positive")]
    NegativeMaxNewTokens,
    /// Too many stop texts.
    #[error("`stop` supports up to {max} stop sequences. Given: {given}")]
    StopSequence {
        /// The limit.
        max: usize,
        /// The count.
        given: usize,
    },
    /// Out of range for `top_n_tokens`.
    #[error("`top_n_tokens` must be >= 0 and <= {max}. Given: {given}")]
    TopNTokens {
        /// The limit.
        max: u32,
        /// The value.
        given: u32,
    },
    /// No prompt.
    #[error("`inputs` cannot be empty")]
    EmptyInput,
    /// Out of range for `truncate`.
    #[error("`truncate` must be strictly positive and less than {max}. Given: {given}")]
    Truncate {
        /// The limit.
        max: usize,
        /// The value.
        given: usize,
    },
    /// Prompt and answer do not fit.
    #[error(
        "`inputs` tokens + `max_new_tokens` must be <= {max}. Given: {inputs} `inputs` tokens and {new} `max_new_tokens`"
    )]
    MaxTotalTokens {
        /// The limit.
        max: usize,
        /// Prompt tokens.
        inputs: usize,
        /// Tokens to generate.
        new: u32,
    },
    /// The prompt does not fit.
    #[error("`inputs` must have less than {max} tokens. Given: {given}")]
    InputLength {
        /// The limit.
        max: usize,
        /// Prompt tokens.
        given: usize,
    },
    /// The tokenizer refused the prompt.
    #[error("tokenizer error {0}")]
    Tokenizer(String),
    /// A constraint on the output was asked for.
    #[error("grammar is not supported")]
    Grammar,
    /// A parameter this build cannot honour, and why.
    #[error("`{parameter}` is not supported: {reason}")]
    Unsupported {
        /// Its name in the request.
        parameter: &'static str,
        /// One clause: what to do instead.
        reason: &'static str,
    },
}
