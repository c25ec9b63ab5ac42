//! `/v1/completions`.

use serde::{Deserialize, Serialize};

use super::{Stop, Usage};

/// Body of `/v1/completions`.
#[derive(Clone, Debug, Deserialize)]
pub struct CompletionRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Accepted; the answer names the served model.
    #[serde(default)]
    pub model: Option<String>,
    /// Most tokens to generate.
    #[serde(default)]
    pub max_tokens: Option<u32>,
    /// 0: the most probable token, always.
    #[serde(default)]
    pub temperature: Option<f32>,
    /// Below 1.
    #[serde(default)]
    pub top_p: Option<f32>,
    /// -2 to 2.
    #[serde(default)]
    pub frequency_penalty: Option<f32>,
    /// Positive.
    #[serde(default)]
    pub repetition_penalty: Option<f32>,
    /// Same seed, same sample.
    #[serde(default)]
    pub seed: Option<u64>,
    /// End when one of these was generated.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Answer with events.
    #[serde(default)]
    pub stream: bool,
    /// Not supported.
    #[serde(default)]
    pub suffix: Option<String>,
    /// Number of answers for each prompt.
    #[serde(default)]
    pub n: Option<u32>,
    /// Put the prompt in front.
    #[serde(default)]
    pub echo: Option<bool>,
    /// Log-probabilities.
    #[serde(default)]
    pub logprobs: Option<u32>,
    /// Generate so many, answer with the best.
    #[serde(default)]
    pub best_of: Option<u32>,
}

/// One or several prompts.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "RawPrompt")]
pub struct Prompt(pub Vec<String>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "`prompt` must be a string or a list of strings")]
enum RawPrompt {
    One(String),
    Many(Vec<String>),
}

impl TryFrom<RawPrompt> for Prompt {
    type Error = &'static str;

    fn try_from(raw: RawPrompt) -> Result<Self, Self::Error> {
        match raw {
            RawPrompt::One(text) => Ok(Prompt(vec![text])),
            RawPrompt::Many(texts) if texts.is_empty() => Err("`prompt` must not be an empty list"),
            RawPrompt::Many(texts) => Ok(Prompt(texts)),
        }
    }
}

/// Answer of `/v1/completions`.
#[derive(Debug, Serialize)]
pub struct Completion {
    /// `text_completion`.
    pub object: &'static str,
    /// Empty, as TGI's.
    pub id: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// Version and build.
    pub system_fingerprint: String,
    /// One a prompt; use `index`.
    pub choices: Vec<CompletionChoice>,
    /// Token counts over all prompts.
    pub usage: Usage,
}

/// One prompt's answer, or a piece of it.
#[derive(Debug, Serialize)]
pub struct CompletionChoice {
    /// Which prompt.
    pub index: u32,
    /// The text.
    pub text: String,
    /// Always `null`.
    pub logprobs: Option<Vec<f32>>,
    /// Why it ended; empty in a stream until then.
    pub finish_reason: &'static str,
}

/// One event of a completions stream.
#[derive(Debug, Serialize)]
pub struct CompletionChunk<'a> {
    /// `text_completion`.
    pub object: &'static str,
    /// Empty, as TGI's.
    pub id: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The choice.
    pub choices: [CompletionChoice; 1],
    /// The served model.
    pub model: &'a str,
    /// Version and build.
    pub system_fingerprint: &'a str,
}

/// The last event of one prompt.
#[derive(Debug, Serialize)]
pub struct CompletionChunkEnd<'a> {
    /// The rest of the event.
    #[serde(flatten)]
    pub chunk: CompletionChunk<'a>,
    /// Token counts of this prompt.
    pub usage: Usage,
}
