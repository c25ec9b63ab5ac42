//! The only place where an error becomes a status and a JSON body.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::infer::InferError;
use crate::types::ErrorResponse;

/// When it is worth coming back to an address whose server is going down.
const REPLACED_WITHIN: Duration = Duration::from_secs(1);

impl IntoResponse for InferError {
    fn into_response(self) -> Response {
        let (status, _) = classify(&self);
        let mut response = (status, Json(error_body(&self))).into_response();
        let retry_after = match self {
            InferError::Overloaded { retry_after } | InferError::Recovering { retry_after } => retry_after,
            // Somebody else answers on this address by then, or nobody.
            InferError::Stopping => REPLACED_WITHIN,
            _ => return response,
        };
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry_after.as_secs()));
        response
    }
}

/// TGI's error shape.
pub(super) fn error_body(error: &InferError) -> ErrorResponse {
    ErrorResponse { error: error.to_string(), error_type: classify(error).1 }
}

/// What `/health` answers when the shards cannot compute.
pub(super) fn unhealthy() -> Response {
    probe_failed("unhealthy".to_string(), "healthcheck")
}

/// What a probe answers that is of ours; `kind` is the probe's name.
pub(super) fn probe_failed(error: String, kind: &'static str) -> Response {
    let body = ErrorResponse { error, error_type: kind };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// An error in a stream of an OpenAI route. The code is 422 whatever went wrong, as TGI's.
#[derive(Serialize)]
pub(super) struct OpenAiError {
    error: OpenAiErrorBody,
}

#[derive(Serialize)]
struct OpenAiErrorBody {
    message: String,
    http_status_code: u16,
}

impl From<&InferError> for OpenAiError {
    fn from(error: &InferError) -> Self {
        let http_status_code = StatusCode::UNPROCESSABLE_ENTITY.as_u16();
        Self { error: OpenAiErrorBody { message: error.to_string(), http_status_code } }
    }
}

fn classify(error: &InferError) -> (StatusCode, &'static str) {
    match error {
        InferError::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
        InferError::Recovering { .. } => (StatusCode::SERVICE_UNAVAILABLE, "recovering"),
        InferError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        InferError::Validation(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
        InferError::Generation(_) => (StatusCode::FAILED_DEPENDENCY, "generation"),
        InferError::Incomplete => (StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation"),
        InferError::IncompleteStream => (StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation_stream"),
        InferError::Template(_) => (StatusCode::UNPROCESSABLE_ENTITY, "template_error"),
        InferError::Tool(_) => (StatusCode::UNPROCESSABLE_ENTITY, "tool_error"),
        InferError::Suffix => (StatusCode::UNPROCESSABLE_ENTITY, "suffix not supported"),
        InferError::BatchSize { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "batch size exceeded"),
    }
}
