//! `/health`, `/ping` and `GET /` as text-generation-inference has them, and the three probes of Kubernetes:
//!
//! - `/startup`: the model is loaded and warm. Before that nobody listens.
//! - `/ready`: new requests are welcome. Not while the shards are being replaced, nor from the first stop signal on.
//! - `/live`: restarting this service would not help. What the launcher mends by itself never shows here.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::error_response::{probe_failed, unhealthy};
use super::state::AppState;

/// 200 when the shards can compute. After a failure a device check is not enough: one token has to be computed,
/// in turn with the running batch so that all ranks see the same order of calls. A server that is going down is not
/// healthy: upstream's takes no connections by then.
pub(super) async fn health(State(state): State<AppState>) -> Response {
    if state.infer().permits().is_closed() {
        return unhealthy();
    }
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

/// 200 as soon as anything is answered at all: the router listens when the shards are warm.
pub(super) async fn startup() -> StatusCode {
    StatusCode::OK
}

/// 200 while new requests are welcome. A full server is ready: it answers 429, and somebody else's answer would not be
/// quicker for being asked by a load balancer that has only this one.
pub(super) async fn ready(State(state): State<AppState>) -> Response {
    if state.infer().permits().is_closed() {
        return probe_failed("the server is shutting down".to_string(), "ready");
    }
    if state.health().retry_after().is_some() {
        return probe_failed("the shards are being replaced".to_string(), "ready");
    }
    if state.health().is_healthy() || state.infer().probe().await {
        StatusCode::OK.into_response()
    } else {
        probe_failed("the shards cannot compute".to_string(), "ready")
    }
}

/// 200 unless the shards have work and do not move.
pub(super) async fn live(State(state): State<AppState>) -> Response {
    match state.pulse().check(state.health().busy_since(), state.shards()).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(reason) => {
            tracing::error!("/live fails: {reason}");
            probe_failed(reason, "live")
        }
    }
}
