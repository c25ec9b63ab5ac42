//! The JSON of a request to the router, read as each kind of request there is, validated, and handed to the shard's side.

use std::sync::{Arc, LazyLock};

use proto::v3;
use router::infer::{chat_parameters, completion_requests};
use router::scheduler::ValidRequest;
use router::tokenization::Tokenization;
use router::types::{ChatRequest, CompatGenerateRequest, CompletionRequest, GenerateRequest};
use router::validation::{Validation, ValidationLimits};
use tokio::runtime::{Builder, Runtime};

use crate::message::check_line;

const LIMITS: ValidationLimits = ValidationLimits {
    max_best_of: 2,
    max_stop_sequences: 4,
    max_top_n_tokens: 5,
    max_input_tokens: 1024,
    max_total_tokens: 2048,
};

/// A byte of text is a token.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}"#;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("an event loop"));

static VALIDATION: LazyLock<Validation> = LazyLock::new(|| {
    let tokenizer = hub::tokenizer_from_json(TOKENIZER.as_bytes()).expect("a tokenizer");
    Validation::new(LIMITS, Tokenization::start(Arc::new(tokenizer), 1).expect("a thread"))
});

/// Reads and validates the request.
pub fn run(input: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<GenerateRequest>(input) {
        validate(request);
    }
    if let Ok(CompatGenerateRequest { inputs, parameters, .. }) = serde_json::from_slice(input) {
        validate(GenerateRequest { inputs, parameters });
    }
    if let Ok(request) = serde_json::from_slice::<ChatRequest>(input) {
        match chat_parameters(&request) {
            Ok(parameters) => validate(GenerateRequest { inputs: "a b".to_owned(), parameters }),
            Err(error) => check_line(&error),
        }
    }
    if let Ok(request) = serde_json::from_slice::<CompletionRequest>(input) {
        match completion_requests(request, 4) {
            Ok(requests) => requests.into_iter().for_each(validate),
            Err(error) => check_line(&error),
        }
    }
}

fn validate(request: GenerateRequest) {
    let _ = VALIDATION.best_of(&request).inspect_err(|error| check_line(error));
    match RUNTIME.block_on(VALIDATION.validate(request, true)) {
        Ok(valid) => check_with_shard(valid),
        Err(error) => check_line(&error),
    }
}

/// What the router lets through, the shard must take: its refusal would fail the whole batch.
fn check_with_shard(valid: ValidRequest) {
    assert!(
        (1..=LIMITS.max_input_tokens).contains(&valid.input_ids.len()),
        "{} tokens",
        valid.input_ids.len()
    );
    let request = v3::Request {
        inputs: valid.inputs,
        input_ids: valid.input_ids,
        truncate: valid.truncate,
        top_n_tokens: valid.top_n_tokens,
        prefill_logprobs: valid.prefill_logprobs,
        parameters: Some(valid.parameters),
        stopping_parameters: Some(valid.stopping_parameters),
        ..v3::Request::default()
    };
    let batch = v3::Batch { requests: vec![request], ..v3::Batch::default() };
    if let Err(refusal) = shard::server::new_batch(batch) {
        panic!("the shard refuses what the router has validated: {refusal}");
    }
}
