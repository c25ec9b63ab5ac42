//! From what a client typed to a [`ValidRequest`], or the rule it broke.

mod error;
mod parameters;

use proto::v3::StoppingCriteriaParameters;

pub use error::ValidationError;

use crate::scheduler::ValidRequest;
use crate::tokenization::Tokenization;
use crate::types::GenerateRequest;

/// TGI checks long requests against this many tokens of answer, see [`Validation::validate`].
const LONG_GENERATION_CHUNK: u32 = 1024;

/// The limits of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidationLimits {
    /// Largest `best_of`.
    pub max_best_of: usize,
    /// Most stop texts.
    pub max_stop_sequences: usize,
    /// Most alternatives for a token.
    pub max_top_n_tokens: u32,
    /// Most prompt tokens.
    pub max_input_tokens: usize,
    /// Most tokens of prompt and answer.
    pub max_total_tokens: usize,
}

/// Checks and tokenizes. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Validation {
    limits: ValidationLimits,
    tokenization: Tokenization,
}

impl Validation {
    /// A validation by these limits.
    pub fn new(limits: ValidationLimits, tokenization: Tokenization) -> Self {
        Self { limits, tokenization }
    }

    /// The tokenizer threads.
    pub fn tokenization(&self) -> &Tokenization {
        &self.tokenization
    }

    /// How many sequences to generate.
    ///
    /// # Errors
    /// `best_of` is zero or above its limit.
    pub fn best_of(&self, request: &GenerateRequest) -> Result<usize, ValidationError> {
        parameters::check_best_of(request.parameters.best_of, &self.limits)
    }

    /// Checks every rule in TGI's order and tokenizes the prompt.
    ///
    /// **Long generations.** TGI schedules at most 1024 tokens at a time and queues the rest again. Seen from
    /// outside: a request is accepted as long as `input + min(max_new_tokens, 1024)` fits, and one that reaches the end
    /// of the context ends with `length`. We keep that contract and schedule the whole answer at once, cut to what
    /// the context has room for. That avoids TGI's defects (the last piece generating past what was asked for,
    /// grammars and penalties that forget the earlier pieces) at the price of reserving blocks for the whole
    /// answer when the request starts.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub async fn validate(
        &self,
        request: GenerateRequest,
        add_special_tokens: bool,
    ) -> Result<ValidRequest, ValidationError> {
        let limits = &self.limits;
        let valid = parameters::check(&request, limits, rand::random())?;
        let decoder_input_details = request.parameters.decoder_input_details;
        let (inputs, input_ids) =
            self.tokenization.encode(request.inputs, add_special_tokens, valid.truncate).await?;
        let max_new_tokens = room_for_answer(input_ids.len(), valid.max_new_tokens, limits)?;
        let truncate = valid.truncate.unwrap_or(limits.max_input_tokens);
        Ok(ValidRequest {
            inputs,
            input_ids,
            truncate: u32::try_from(truncate).unwrap_or(u32::MAX),
            add_special_tokens,
            prefill_logprobs: decoder_input_details,
            top_n_tokens: valid.top_n_tokens,
            parameters: valid.chooser,
            stopping_parameters: StoppingCriteriaParameters {
                max_new_tokens,
                stop_sequences: valid.stop,
                ignore_eos_token: false,
            },
        })
    }
}

/// How many tokens to generate at most after a prompt of `input_length` tokens.
fn room_for_answer(
    input_length: usize,
    max_new_tokens: Option<u32>,
    limits: &ValidationLimits,
) -> Result<u32, ValidationError> {
    let max_total_tokens = limits.max_total_tokens;
    let room = u32::try_from(max_total_tokens.saturating_sub(input_length)).unwrap_or(u32::MAX);
    let requested = max_new_tokens.unwrap_or(room);
    let checked = requested.min(LONG_GENERATION_CHUNK);
    if input_length + checked as usize > max_total_tokens {
        return Err(ValidationError::MaxTotalTokens {
            max: max_total_tokens,
            inputs: input_length,
            new: checked,
        });
    }
    if input_length > limits.max_input_tokens {
        return Err(ValidationError::InputLength { max: limits.max_input_tokens, given: input_length });
    }
    // A tokenizer may turn a non-empty text into nothing; a shard cannot.
    if input_length == 0 {
        return Err(ValidationError::EmptyInput);
    }
    Ok(requested.min(room))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenization::testing::word_tokenizer;

    const LIMITS: ValidationLimits = ValidationLimits {
        max_best_of: 2,
        max_stop_sequences: 4,
        max_top_n_tokens: 5,
        max_input_tokens: 10,
        max_total_tokens: 20,
    };

    fn request(words: usize, parameters: &str) -> GenerateRequest {
        let inputs = vec!["a"; words].join(" ");
        serde_json::from_str(&format!(r#"{{"inputs":"{inputs}","parameters":{parameters}}}"#)).unwrap()
    }

    #[test]
    fn lengths_have_their_texts() {
        let error = |input, new| room_for_answer(input, new, &LIMITS).unwrap_err().to_string();
        assert_eq!(
            error(8, Some(13)),
            "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 8 `inputs` tokens and 13 `max_new_tokens`"
        );
        assert_eq!(error(11, Some(1)), "`inputs` must have less than 10 tokens. Given: 11");
        assert_eq!(error(11, None), "`inputs` must have less than 10 tokens. Given: 11");
        assert_eq!(error(0, None), "`inputs` cannot be empty");
    }

    #[test]
    fn long_answers_are_cut_to_the_context_when_their_first_1024_tokens_fit() {
        let limits = ValidationLimits { max_total_tokens: 2000, ..LIMITS };
        assert_eq!(room_for_answer(10, Some(5000), &limits), Ok(1990));
        assert_eq!(room_for_answer(10, Some(1500), &limits), Ok(1500));
        assert_eq!(room_for_answer(10, None, &limits), Ok(1990));
        let tight = ValidationLimits { max_total_tokens: 1033, ..LIMITS };
        assert!(matches!(
            room_for_answer(10, Some(5000), &tight),
            Err(ValidationError::MaxTotalTokens { new: 1024, .. })
        ));
    }

    #[tokio::test]
    async fn a_valid_request_is_tokenized_and_truncated_at_its_start() {
        let tokenization = Tokenization::start(word_tokenizer().into(), 1).unwrap();
        let validation = Validation::new(LIMITS, tokenization);
        let mut long = request(30, r#"{"truncate":3,"max_new_tokens":4,"decoder_input_details":true}"#);
        long.inputs.push_str(" b");
        let valid = validation.validate(long, true).await.unwrap();
        assert_eq!(valid.input_ids, [1, 1, 2]);
        assert_eq!((valid.truncate, valid.stopping_parameters.max_new_tokens), (3, 4));
        assert!(valid.prefill_logprobs);
        let valid = validation.validate(request(3, "{}"), true).await.unwrap();
        assert_eq!((valid.truncate, valid.stopping_parameters.max_new_tokens), (10, 17));
    }
}
