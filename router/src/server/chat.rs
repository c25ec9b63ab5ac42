//! `/v1/chat/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::error_response::OpenAiError;
use super::sse::{self, EventWriter};
use super::{AppState, headers, unix_seconds};
use crate::infer::{Generated, InferError, SpecialTokens};
use crate::scheduler::{Event, GeneratedToken};
use crate::types::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprob, ChatLogprobs,
    ChatRequest, FinishReason, OutputMessage, Token, Usage,
};

/// What clients send as `model` when they mean "whatever is served".
const ANY_MODEL: &str = "tgi";

/// Continues a conversation. What is wrong with the messages is a status; what goes wrong in a stream is an event.
#[tracing::instrument(
    skip_all,
    fields(total_time, validation_time, queue_time, inference_time, time_per_token, seed)
)]
pub(super) async fn chat_completions(
    State(state): State<AppState>,
    Json(request): Json<ChatRequest>,
) -> Result<Response, InferError> {
    // Twice, as TGI: once here, once as a generation.
    state.metrics().request_arrived();
    let generate = state.infer().prepare_chat(&request)?;
    state.metrics().request_arrived();
    let compute_type = &state.settings().compute_type;
    let characters = generate.inputs.chars().count();
    let model = match request.model {
        Some(model) if model != ANY_MODEL => model,
        _ => state.info().model_id.clone(),
    };
    let wants_logprobs = request.logprobs.unwrap_or(false);
    if !request.stream {
        let generated = state.infer().generate(generate, SpecialTokens::LeaveOut).await?;
        let headers = headers::answered_in_time(compute_type, characters, &generated);
        let completion = completion(generated, model, state.system_fingerprint(), wants_logprobs);
        return Ok((headers, Json(completion)).into_response());
    }
    let stream = state.infer().generate_stream(generate, SpecialTokens::LeaveOut).await;
    let writer = ChatEvents {
        created: unix_seconds(),
        model,
        system_fingerprint: state.system_fingerprint(),
        wants_logprobs,
        wants_usage: request.stream_options.is_some_and(|options| options.include_usage),
        input_length: stream.as_ref().map_or(0, |stream| stream.input_length()),
    };
    let headers = headers::streaming(compute_type, characters);
    Ok(sse::respond(headers, stream.map(|stream| vec![stream]), writer))
}

fn completion(
    generated: Generated,
    model: String,
    system_fingerprint: String,
    wants_logprobs: bool,
) -> ChatCompletion {
    let logprobs = wants_logprobs.then(|| ChatLogprobs {
        content: (generated.tokens.iter().enumerate())
            .map(|(index, token)| {
                let top_tokens = generated.top_tokens.get(index).map_or(&[][..], Vec::as_slice);
                ChatLogprob::new(token, top_tokens)
            })
            .collect(),
    });
    let finish_reason = generated.finish_reason().openai();
    let usage = Usage::new(generated.input_length, generated.generated_text.generated_tokens);
    let message = OutputMessage { role: "assistant", content: generated.generated_text.text };
    ChatCompletion {
        object: "chat.completion",
        id: "",
        created: unix_seconds(),
        model,
        system_fingerprint,
        choices: [ChatChoice { index: 0, message, logprobs, finish_reason }],
        usage,
    }
}

/// OpenAI's chat stream.
struct ChatEvents {
    created: u64,
    model: String,
    system_fingerprint: String,
    wants_logprobs: bool,
    wants_usage: bool,
    input_length: u32,
}

impl ChatEvents {
    fn write_chunk(&self, out: &mut Vec<u8>, choices: &[ChatChunkChoice], usage: Option<Usage>) {
        let chunk = ChatChunk {
            object: "chat.completion.chunk",
            id: "",
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.system_fingerprint,
            choices,
            usage,
        };
        sse::write_event(out, &chunk);
    }

    fn choice(&self, generated: GeneratedToken, finish_reason: Option<&'static str>) -> ChatChunkChoice {
        let token = Token::from(generated.token);
        let logprobs = self.wants_logprobs.then(|| {
            let top_tokens: Vec<Token> = generated.top_tokens.into_iter().map(Token::from).collect();
            ChatLogprobs { content: vec![ChatLogprob::new(&token, &top_tokens)] }
        });
        let content = if token.special { String::new() } else { token.text };
        ChatChunkChoice { index: 0, delta: ChatDelta { role: "assistant", content }, logprobs, finish_reason }
    }
}

impl EventWriter for ChatEvents {
    fn write(&mut self, _index: usize, event: Result<Event, InferError>, out: &mut Vec<u8>) {
        match event {
            Ok(Event::Prefill(_)) => {}
            Ok(Event::Token(token)) => self.write_chunk(out, &[self.choice(token, None)], None),
            Ok(Event::Last(token, end)) => {
                let finish_reason = FinishReason::from(end.generated_text.finish_reason()).openai();
                self.write_chunk(out, &[self.choice(token, Some(finish_reason))], None);
                if self.wants_usage {
                    let usage = Usage::new(self.input_length, end.generated_text.generated_tokens);
                    self.write_chunk(out, &[], Some(usage));
                }
            }
            Err(error) => sse::write_event(out, &OpenAiError::from(&error)),
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        sse::write_done(out);
    }
}
