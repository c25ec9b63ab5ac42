//! `/health`, `/ping` and `GET /`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::error_response::unhealthy;
use super::state::AppState;

/// 200 when the shards can compute. After a failure a device check is not enough: one token has to be computed,
/// in turn with the running batch so that all ranks see the same order of calls.
pub(super) async fn health(State(state): State<AppState>) -> Response {
    let is_healthy = if state.health().is_healthy() {
        let answer = state.shards().health().await;
        if let Err(error) = &answer {
            tracing::error!("the health check failed: {error}");
        }
        answer.is_ok()
    } else {
        state.infer().probe().await
    };
    state.health().set(is_healthy);
    if is_healthy { StatusCode::OK.into_response() } else { unhealthy() }
}
