//! `/v1/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;

use super::error_response::OpenAiError;
use super::sse::{self, EventWriter};
use super::{AppState, headers, unix_seconds};
use crate::infer::{Generated, InferError, SpecialTokens};
use crate::scheduler::Event;
use crate::types::{
    Completion, CompletionChoice, CompletionChunk, CompletionChunkEnd, CompletionRequest, FinishReason,
    GenerateRequest, Usage,
};

/// Continues one or several prompts, all at once.
#[tracing::instrument(
    skip_all,
    fields(total_time, validation_time, queue_time, inference_time, time_per_token, seed)
)]
pub(super) async fn completions(
    State(state): State<AppState>,
    Json(request): Json<CompletionRequest>,
) -> Result<Response, InferError> {
    state.metrics().request_arrived();
    let wants_stream = request.stream;
    let max_client_batch_size = state.settings().max_client_batch_size;
    let requests = state.infer().prepare_completions(request, max_client_batch_size)?;
    requests.iter().for_each(|_| state.metrics().request_arrived());
    let characters = requests.iter().map(|request| request.inputs.chars().count()).sum();
    if wants_stream {
        Ok(stream(&state, requests, characters).await)
    } else {
        answer(&state, requests, characters).await
    }
}

async fn answer(
    state: &AppState,
    requests: Vec<GenerateRequest>,
    characters: usize,
) -> Result<Response, InferError> {
    let calls = requests.into_iter().map(|request| state.infer().generate(request, SpecialTokens::Add));
    let generated = try_join_all(calls).await?;
    let borrowed: Vec<&Generated> = generated.iter().collect();
    let headers = headers::answered(&state.settings().compute_type, characters, &borrowed);
    let prompt_tokens = generated.iter().map(|generated| generated.input_length).sum();
    let completion_tokens = generated.iter().map(|generated| generated.generated_text.generated_tokens).sum();
    let choice = |(index, generated): (u32, Generated)| CompletionChoice {
        index,
        finish_reason: generated.finish_reason().openai(),
        text: generated.generated_text.text,
        logprobs: None,
    };
    let completion = Completion {
        object: "text_completion",
        id: "",
        created: unix_seconds(),
        model: state.info().model_id.clone(),
        system_fingerprint: state.system_fingerprint(),
        choices: (0..).zip(generated).map(choice).collect(),
        usage: Usage::new(prompt_tokens, completion_tokens),
    };
    Ok((headers, Json(completion)).into_response())
}

async fn stream(state: &AppState, requests: Vec<GenerateRequest>, characters: usize) -> Response {
    let calls =
        requests.into_iter().map(|request| state.infer().generate_stream(request, SpecialTokens::Add));
    let streams = try_join_all(calls).await;
    let writer = CompletionEvents {
        created: unix_seconds(),
        model: state.info().model_id.clone(),
        system_fingerprint: state.system_fingerprint(),
        input_lengths: streams
            .as_ref()
            .map(|streams| streams.iter().map(|stream| stream.input_length()).collect())
            .unwrap_or_default(),
    };
    sse::respond(headers::streaming(&state.settings().compute_type, characters), streams, writer)
}

/// OpenAI's completions stream, several prompts interleaved by `index`.
struct CompletionEvents {
    created: u64,
    model: String,
    system_fingerprint: String,
    input_lengths: Vec<u32>,
}

impl CompletionEvents {
    fn chunk(&self, index: usize, text: String, finish_reason: &'static str) -> CompletionChunk<'_> {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        CompletionChunk {
            object: "text_completion",
            id: "",
            created: self.created,
            choices: [CompletionChoice { index, text, logprobs: None, finish_reason }],
            model: &self.model,
            system_fingerprint: &self.system_fingerprint,
        }
    }
}

impl EventWriter for CompletionEvents {
    fn write(&mut self, index: usize, event: Result<Event, InferError>, out: &mut Vec<u8>) {
        match event {
            Ok(Event::Prefill(_)) => {}
            Ok(Event::Token(token)) => sse::write_event(out, &self.chunk(index, token.token.text, "")),
            Ok(Event::Last(token, end)) => {
                // The native spelling: that is TGI's, here only.
                let finish_reason = FinishReason::from(end.generated_text.finish_reason()).native();
                let input_length = self.input_lengths.get(index).copied().unwrap_or(0);
                let usage = Usage::new(input_length, end.generated_text.generated_tokens);
                let chunk = self.chunk(index, token.token.text, finish_reason);
                sse::write_event(out, &CompletionChunkEnd { chunk, usage });
            }
            Err(error) => sse::write_event(out, &OpenAiError::from(&error)),
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        sse::write_done(out);
    }
}
