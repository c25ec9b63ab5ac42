//! `/metrics`.

use axum::extract::State;

use super::state::AppState;

/// The Prometheus text; a `String` is `text/plain; charset=utf-8`.
pub(super) async fn metrics(State(state): State<AppState>) -> String {
    state.metrics().set_requests_in_flight(state.infer().permits().num_taken());
    state.metrics().render()
}
