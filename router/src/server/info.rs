//! `/info` and `/v1/models`.

use axum::Json;
use axum::extract::State;

use super::state::AppState;
use crate::types::{Info, ModelInfo, ModelsInfo};

/// What is served, and its limits.
pub(super) async fn info(State(state): State<AppState>) -> Json<Info> {
    Json(Info { startup: state.startup().cloned(), ..state.info().clone() })
}

/// The served model in OpenAI's shape.
pub(super) async fn models(State(state): State<AppState>) -> Json<ModelsInfo> {
    let id = state.info().model_id.clone();
    let model = ModelInfo { owned_by: id.clone(), id, object: "model", created: 0 };
    Json(ModelsInfo { object: "list", data: [model] })
}
