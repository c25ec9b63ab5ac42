//! `/generate`, `/generate_stream` and `/`.

use serde::{Deserialize, Serialize};

use crate::scheduler;

/// Body of `/generate` and `/generate_stream`.
#[derive(Clone, Debug, Deserialize)]
pub struct GenerateRequest {
    /// The prompt.
    pub inputs: String,
    /// How to continue it. When the whole object is missing, sampling is on; when it is there, off by default.
    #[serde(default = "GenerateParameters::when_absent")]
    pub parameters: GenerateParameters,
}

/// Body of `/`: streams on request.
#[derive(Clone, Debug, Deserialize)]
pub struct CompatGenerateRequest {
    /// The prompt.
    pub inputs: String,
    /// As for [`GenerateRequest`].
    #[serde(default = "GenerateParameters::when_absent")]
    pub parameters: GenerateParameters,
    /// Answer with events instead of one document.
    #[serde(default)]
    pub stream: bool,
}

/// Generation parameters, as typed by the client. Fields that are no `Option` refuse `null`, as TGI's do.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct GenerateParameters {
    /// Generate so many and answer with the most probable.
    #[serde(default)]
    pub best_of: Option<usize>,
    /// Divides the logits; must be positive.
    #[serde(default)]
    pub temperature: Option<f32>,
    /// Divides the logits of tokens seen before; must be positive.
    #[serde(default)]
    pub repetition_penalty: Option<f32>,
    /// -2 to 2.
    #[serde(default)]
    pub frequency_penalty: Option<f32>,
    /// Choose among the so many most probable tokens.
    #[serde(default)]
    pub top_k: Option<i32>,
    /// Choose among the most probable tokens with this much mass, below 1.
    #[serde(default)]
    pub top_p: Option<f32>,
    /// Choose among the most typical tokens with this much mass, below 1.
    #[serde(default)]
    pub typical_p: Option<f32>,
    /// Sample instead of taking the most probable token.
    #[serde(default)]
    pub do_sample: bool,
    /// Default: what the context has room for.
    #[serde(default)]
    pub max_new_tokens: Option<u32>,
    /// Put the prompt in front of the generated text.
    #[serde(default)]
    pub return_full_text: Option<bool>,
    /// End when one of these was generated.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Keep only so many tokens of the prompt, those at its end.
    #[serde(default)]
    pub truncate: Option<usize>,
    /// Mark the text as generated.
    #[serde(default)]
    pub watermark: bool,
    /// Answer with tokens and reasons too.
    #[serde(default)]
    pub details: bool,
    /// Answer with the prompt's tokens too.
    #[serde(default)]
    pub decoder_input_details: bool,
    /// Same seed, same sample. Default: random.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Report so many alternatives for each token.
    #[serde(default)]
    pub top_n_tokens: Option<u32>,
    /// A constraint on the output, kept as sent.
    #[serde(default)]
    pub grammar: Option<serde_json::Value>,
    /// Which adapter to use.
    #[serde(default)]
    pub adapter_id: Option<String>,
}

impl GenerateParameters {
    fn when_absent() -> Self {
        Self { do_sample: true, ..Self::default() }
    }
}

/// Answer of `/generate`.
#[derive(Debug, Serialize)]
pub struct GenerateResponse {
    /// The text.
    pub generated_text: String,
    /// Only if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

/// Tokens and reasons.
#[derive(Debug, Serialize)]
pub struct Details {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How many tokens.
    pub generated_tokens: u32,
    /// Only when sampled.
    pub seed: Option<u64>,
    /// The prompt's tokens, if asked for.
    pub prefill: Vec<PrefillToken>,
    /// The generated tokens.
    pub tokens: Vec<Token>,
    /// The less probable ones of `best_of`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_of_sequences: Option<Vec<BestOfSequence>>,
    /// Alternatives of each token.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Vec<Token>>,
}

/// One of the sequences `best_of` did not choose.
#[derive(Debug, Serialize)]
pub struct BestOfSequence {
    /// The text.
    pub generated_text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How many tokens.
    pub generated_tokens: u32,
    /// Its seed.
    pub seed: Option<u64>,
    /// The prompt's tokens, if asked for.
    pub prefill: Vec<PrefillToken>,
    /// The generated tokens.
    pub tokens: Vec<Token>,
    /// Alternatives of each token.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Vec<Token>>,
}

/// A prompt token. JSON has no NaN: the first one's log-probability is `null`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefillToken {
    /// Number in the vocabulary.
    pub id: u32,
    /// Text.
    pub text: String,
    /// Log-probability.
    pub logprob: f32,
}

impl From<scheduler::PromptToken> for PrefillToken {
    fn from(token: scheduler::PromptToken) -> Self {
        Self { id: token.id, text: token.text, logprob: token.logprob }
    }
}

/// A generated token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Token {
    /// Number in the vocabulary.
    pub id: u32,
    /// The text it adds, special tokens included.
    pub text: String,
    /// Log-probability.
    pub logprob: f32,
    /// Whether it is a special token, which `generated_text` leaves out.
    pub special: bool,
}

impl From<scheduler::Token> for Token {
    fn from(token: scheduler::Token) -> Self {
        Self { id: token.id, text: token.text, logprob: token.logprob, special: token.special }
    }
}

/// Why a generation ended, in the native spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// As many tokens as allowed.
    Length,
    /// The model said so.
    EosToken,
    /// A stop text appeared.
    StopSequence,
}

impl FinishReason {
    /// `length`, `eos_token`, `stop_sequence`.
    pub fn native(self) -> &'static str {
        match self {
            FinishReason::Length => "length",
            FinishReason::EosToken => "eos_token",
            FinishReason::StopSequence => "stop_sequence",
        }
    }

    /// As [`Self::native`], but `stop` when the model said so.
    pub fn openai(self) -> &'static str {
        if self == FinishReason::EosToken { "stop" } else { self.native() }
    }
}

impl From<proto::v3::FinishReason> for FinishReason {
    fn from(reason: proto::v3::FinishReason) -> Self {
        match reason {
            proto::v3::FinishReason::Length => FinishReason::Length,
            proto::v3::FinishReason::EosToken => FinishReason::EosToken,
            proto::v3::FinishReason::StopSequence => FinishReason::StopSequence,
        }
    }
}

/// One event of a native stream.
#[derive(Debug, Serialize)]
pub struct StreamResponse {
    /// Counts from 1.
    pub index: u32,
    /// The token.
    pub token: Token,
    /// Its alternatives.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Token>,
    /// The whole text, in the last event.
    pub generated_text: Option<String>,
    /// In the last event, if asked for.
    pub details: Option<StreamDetails>,
}

/// How a stream ended.
#[derive(Debug, Serialize)]
pub struct StreamDetails {
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How many tokens.
    pub generated_tokens: u32,
    /// Only when sampled.
    pub seed: Option<u64>,
    /// Prompt tokens.
    pub input_length: u32,
}

/// Every error of a handler.
#[derive(Debug, Serialize)]
pub struct ErrorResponse {
    /// What went wrong.
    pub error: String,
    /// Which kind of error it is; clients decide by it.
    pub error_type: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_is_on_only_when_parameters_are_absent() {
        let absent: GenerateRequest = serde_json::from_str(r#"{"inputs":"a"}"#).unwrap();
        assert!(absent.parameters.do_sample);
        let empty: GenerateRequest = serde_json::from_str(r#"{"inputs":"a","parameters":{}}"#).unwrap();
        assert!(!empty.parameters.do_sample);
    }

    #[test]
    fn null_is_fine_for_optional_fields_only() {
        let parse = |parameters: &str| {
            serde_json::from_str::<GenerateRequest>(&format!(r#"{{"inputs":"a","parameters":{parameters}}}"#))
        };
        assert!(parse(r#"{"temperature":null,"seed":null,"grammar":null,"unknown":1}"#).is_ok());
        assert!(parse(r#"{"stop":null}"#).is_err());
        assert!(parse(r#"{"do_sample":null}"#).is_err());
        assert!(parse(r#"{"seed":18446744073709551615}"#).is_ok());
    }

    #[test]
    fn the_last_event_has_every_field_and_a_token_event_nulls() {
        let token = Token { id: 7, text: " a".to_string(), logprob: -0.5, special: false };
        let event =
            StreamResponse { index: 1, token, top_tokens: Vec::new(), generated_text: None, details: None };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"index":1,"token":{"id":7,"text":" a","logprob":-0.5,"special":false},"generated_text":null,"details":null}"#
        );
        let prefill = PrefillToken { id: 1, text: "a".to_string(), logprob: f32::NAN };
        assert_eq!(serde_json::to_string(&prefill).unwrap(), r#"{"id":1,"text":"a","logprob":null}"#);
    }
}
