//! `/generate`, `/generate_stream` and `POST /`.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

use super::error_response::error_body;
use super::sse::{self, EventWriter};
use super::{AppState, headers};
use crate::infer::{Generated, InferError, SpecialTokens};
use crate::scheduler::{Event, GeneratedToken};
use crate::types::{
    BestOfSequence, CompatGenerateRequest, Details, FinishReason, GenerateRequest, GenerateResponse,
    StreamDetails, StreamResponse, Token,
};

/// Generates, and answers when everything is there.
#[tracing::instrument(skip_all, fields(
    parameters = ?request.parameters,
    total_time, validation_time, queue_time, inference_time, time_per_token, seed
))]
pub(super) async fn generate(
    State(state): State<AppState>,
    Json(request): Json<GenerateRequest>,
) -> Result<(HeaderMap, Json<GenerateResponse>), InferError> {
    let (headers, response) = answer(&state, request).await?;
    Ok((headers, Json(response)))
}

/// Generates, and answers token by token.
#[tracing::instrument(skip_all, fields(
    parameters = ?request.parameters,
    total_time, validation_time, queue_time, inference_time, time_per_token, seed
))]
pub(super) async fn generate_stream(
    State(state): State<AppState>,
    Json(request): Json<GenerateRequest>,
) -> Response {
    stream(&state, request).await
}

/// Either of the two, as the request says; a whole answer comes as a list of one.
#[tracing::instrument(skip_all)]
pub(super) async fn compat_generate(
    State(state): State<AppState>,
    Json(compat): Json<CompatGenerateRequest>,
) -> Result<Response, InferError> {
    let mut request = GenerateRequest { inputs: compat.inputs, parameters: compat.parameters };
    // TGI's default here is true for text-generation models and for all whose kind it does not know.
    request.parameters.return_full_text.get_or_insert(true);
    if compat.stream {
        return Ok(generate_stream(State(state), Json(request)).await);
    }
    let (headers, Json(response)) = generate(State(state), Json(request)).await?;
    Ok((headers, Json([response])).into_response())
}

async fn answer(
    state: &AppState,
    request: GenerateRequest,
) -> Result<(HeaderMap, GenerateResponse), InferError> {
    state.metrics().request_arrived();
    let characters = request.inputs.chars().count();
    let parameters = &request.parameters;
    let prompt = prompt_to_prepend(&request);
    let wants_details = parameters.details || parameters.decoder_input_details;
    let mut sequences = state.infer().generate_best_of(request, SpecialTokens::Add).await?;
    if let Some(prompt) = &prompt {
        for sequence in &mut sequences {
            sequence.generated_text.text.insert_str(0, prompt);
        }
    }
    let others = sequences.split_off(1);
    // `generate_best_of` answers with one sequence at least.
    let best = sequences.pop().ok_or(InferError::Incomplete)?;
    let headers = headers::answered_in_time(&state.settings().compute_type, characters, &best);
    Ok((headers, generate_response(best, others, wants_details)))
}

fn generate_response(best: Generated, others: Vec<Generated>, wants_details: bool) -> GenerateResponse {
    let finish_reason = best.finish_reason();
    let generated_text = best.generated_text;
    let details = wants_details.then(|| Details {
        finish_reason,
        generated_tokens: generated_text.generated_tokens,
        seed: generated_text.seed,
        prefill: best.prefill,
        tokens: best.tokens,
        best_of_sequences: (!others.is_empty()).then(|| others.into_iter().map(best_of_sequence).collect()),
        top_tokens: best.top_tokens,
    });
    GenerateResponse { generated_text: generated_text.text, details }
}

fn best_of_sequence(generated: Generated) -> BestOfSequence {
    BestOfSequence {
        finish_reason: generated.finish_reason(),
        generated_tokens: generated.generated_text.generated_tokens,
        seed: generated.generated_text.seed,
        generated_text: generated.generated_text.text,
        prefill: generated.prefill,
        tokens: generated.tokens,
        top_tokens: generated.top_tokens,
    }
}

fn prompt_to_prepend(request: &GenerateRequest) -> Option<String> {
    request.parameters.return_full_text.unwrap_or(false).then(|| request.inputs.clone())
}

async fn stream(state: &AppState, request: GenerateRequest) -> Response {
    state.metrics().request_arrived();
    let headers = headers::streaming(&state.settings().compute_type, request.inputs.chars().count());
    let prompt = prompt_to_prepend(&request);
    let wants_details = request.parameters.details;
    let stream = state.infer().generate_stream(request, SpecialTokens::Add).await;
    let input_length = stream.as_ref().map_or(0, |stream| stream.input_length());
    let writer = NativeEvents { num_sent: 0, wants_details, input_length, prompt };
    sse::respond(headers, stream.map(|stream| vec![stream]), writer)
}

/// TGI's own stream: numbered tokens, the text with the last one, no end mark.
struct NativeEvents {
    num_sent: u32,
    wants_details: bool,
    input_length: u32,
    prompt: Option<String>,
}

impl NativeEvents {
    fn response(&mut self, generated: GeneratedToken) -> StreamResponse {
        self.num_sent += 1;
        StreamResponse {
            index: self.num_sent,
            token: generated.token.into(),
            top_tokens: generated.top_tokens.into_iter().map(Token::from).collect(),
            generated_text: None,
            details: None,
        }
    }
}

impl EventWriter for NativeEvents {
    fn write(&mut self, _index: usize, event: Result<Event, InferError>, out: &mut Vec<u8>) {
        match event {
            // Streams refuse `decoder_input_details`; a shard that reports the prompt anyway is not quoted.
            Ok(Event::Prefill(_)) => {}
            Ok(Event::Token(token)) => sse::write_event(out, &self.response(token)),
            Ok(Event::Last(token, end)) => {
                let finish_reason = FinishReason::from(end.generated_text.finish_reason());
                let text = end.generated_text;
                let mut response = self.response(token);
                response.details = self.wants_details.then_some(StreamDetails {
                    finish_reason,
                    generated_tokens: text.generated_tokens,
                    seed: text.seed,
                    input_length: self.input_length,
                });
                let prompt = self.prompt.take().unwrap_or_default();
                response.generated_text = Some(prompt + &text.text);
                sse::write_event(out, &response);
            }
            Err(error) => sse::write_event(out, &error_body(&error)),
        }
    }

    fn finish(&mut self, _out: &mut Vec<u8>) {}
}
