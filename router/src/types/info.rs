//! `/info` and `/v1/models`.

use serde::{Deserialize, Serialize};

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
    /// Where the time of the start went; TGI's answer has no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup: Option<Startup>,
}

/// Where the time went between the launcher's start and the first connection, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Startup {
    /// Wall time.
    pub total_ms: f64,
    /// One after another, without gaps: their sum is the total.
    pub phases: Vec<Phase>,
    /// What each rank did between the start of its process and its handshake; a closer look at `shards`.
    pub ranks: Vec<RankPhases>,
    /// Those of `phases` that are the router's.
    pub router: Vec<Phase>,
    /// What the router did meanwhile, each from its start on.
    pub router_preparation: Vec<Phase>,
}

/// A name and a time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub phase: String,
    /// How long that took.
    pub ms: f64,
}

/// The phases of one rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RankPhases {
    /// Which.
    pub rank: usize,
    /// Without gaps.
    pub phases: Vec<Phase>,
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
