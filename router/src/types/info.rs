//! `/info` and `/v1/models`.

use serde::Serialize;

/// Answer of `/info`.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// The served model.
    pub model_id: String,
    /// Its commit on the Hub.
    pub model_sha: Option<String>,
    /// Its kind on the Hub; unknown to us.
    pub model_pipeline_tag: Option<String>,
    /// Requests at once.
    pub max_concurrent_requests: usize,
    /// Largest `best_of`.
    pub max_best_of: usize,
    /// Most stop texts.
    pub max_stop_sequences: usize,
    /// Most prompt tokens.
    pub max_input_tokens: usize,
    /// Most tokens of prompt and answer.
    pub max_total_tokens: usize,
    /// Tokenizer threads.
    pub validation_workers: usize,
    /// Most prompts of one completions request.
    pub max_client_batch_size: usize,
    /// `text-generation-router`: clients look for this name.
    pub router: &'static str,
    /// Our version.
    pub version: &'static str,
    /// Our commit, if the build knows it.
    pub sha: Option<&'static str>,
    /// The image's label, if the build knows it.
    pub docker_label: Option<&'static str>,
}

/// Answer of `/v1/models`.
#[derive(Clone, Debug, Serialize)]
pub struct ModelsInfo {
    /// `list`.
    pub object: &'static str,
    /// Always one.
    pub data: [ModelInfo; 1],
}

/// The served model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    /// Its id.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// 0.
    pub created: u64,
    /// Its id again.
    pub owned_by: String,
}
