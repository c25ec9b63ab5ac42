//! From a completions request to one generate request a prompt.

use super::chat::openai_sampling;
use super::{Infer, InferError};
use crate::types::{CompletionRequest, GenerateParameters, GenerateRequest};
use crate::validation::ValidationError;

impl Infer {
    /// One generate request for each prompt, in their order.
    ///
    /// # Errors
    /// Too many prompts, or a parameter that cannot be honoured.
    pub fn prepare_completions(
        &self,
        request: CompletionRequest,
        max_client_batch_size: usize,
    ) -> Result<Vec<GenerateRequest>, InferError> {
        completion_requests(request, max_client_batch_size).map_err(|error| self.count(error))
    }
}

/// One generate request for each prompt, in their order, with OpenAI's parameters as ours.
///
/// # Errors
/// More prompts than `max_client_batch_size`, or a parameter that cannot be honoured.
pub fn completion_requests(
    request: CompletionRequest,
    max_client_batch_size: usize,
) -> Result<Vec<GenerateRequest>, InferError> {
    check(&request, max_client_batch_size)?;
    let (do_sample, temperature) = openai_sampling(request.temperature);
    let parameters = GenerateParameters {
        do_sample,
        temperature,
        repetition_penalty: request.repetition_penalty,
        frequency_penalty: request.frequency_penalty,
        top_p: request.top_p,
        max_new_tokens: request.max_tokens,
        stop: request.stop.map(Vec::from).unwrap_or_default(),
        details: true,
        seed: request.seed,
        ..Default::default()
    };
    let with = |inputs| GenerateRequest { inputs, parameters: parameters.clone() };
    Ok(request.prompt.0.into_iter().map(with).collect())
}

fn check(request: &CompletionRequest, max_client_batch_size: usize) -> Result<(), InferError> {
    if request.suffix.is_some() {
        return Err(InferError::Suffix);
    }
    if request.prompt.0.len() > max_client_batch_size {
        return Err(InferError::BatchSize { max: max_client_batch_size });
    }
    let refused = [
        ("n", request.n.is_some_and(|n| n != 1), "one answer a prompt; send the prompt again for another"),
        ("best_of", request.best_of.is_some_and(|n| n != 1), "use `/generate` with `best_of`"),
        ("echo", request.echo == Some(true), "use `/generate` with `return_full_text`"),
        ("logprobs", request.logprobs.is_some_and(|n| n > 0), "use `/generate` with `details`"),
    ];
    match refused.into_iter().find(|(_, is_refused, _)| *is_refused) {
        Some((parameter, _, reason)) => Err(ValidationError::Unsupported { parameter, reason }.into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        let request: CompletionRequest = serde_json::from_str(json).unwrap();
        check(&request, 2).map_or_else(|error| error.to_string(), |()| "accepted".to_string())
    }

    #[test]
    fn limits_and_what_cannot_be_honoured() {
        assert_eq!(error(r#"{"prompt":"a","n":1,"echo":false,"logprobs":null}"#), "accepted");
        assert_eq!(error(r#"{"prompt":["a","b"]}"#), "accepted");
        assert!(error(r#"{"prompt":["a","b","c"]}"#).ends_with("maximum allowed batch size of 2"));
        assert!(error(r#"{"prompt":"a","suffix":"s"}"#).starts_with("Suffix is not supported"));
        assert!(error(r#"{"prompt":"a","echo":true}"#).contains("`echo` is not supported"));
        assert!(serde_json::from_str::<CompletionRequest>(r#"{"prompt":[]}"#).is_err());
    }
}
