//! `/tokenize` and `/chat_tokenize`.

use axum::Json;
use axum::extract::State;

use super::state::AppState;
use crate::infer::InferError;
use crate::types::{ChatRequest, ChatTokenizeResponse, GenerateRequest, SimpleToken};

/// Tokens of a prompt, special ones added.
pub(super) async fn tokenize(
    State(state): State<AppState>,
    Json(request): Json<GenerateRequest>,
) -> Result<Json<Vec<SimpleToken>>, InferError> {
    let tokenization = state.infer().validation().tokenization();
    Ok(Json(tokenization.tokenize(request.inputs, true).await?))
}

/// Tokens of a conversation, no special ones added: the template wrote them.
pub(super) async fn chat_tokenize(
    State(state): State<AppState>,
    Json(request): Json<ChatRequest>,
) -> Result<Json<ChatTokenizeResponse>, InferError> {
    state.metrics().request_arrived();
    let templated_text = state.infer().prepare_chat(&request)?.inputs;
    let tokenization = state.infer().validation().tokenization();
    let tokenize_response = tokenization.tokenize(templated_text.clone(), false).await?;
    Ok(Json(ChatTokenizeResponse { tokenize_response, templated_text }))
}
