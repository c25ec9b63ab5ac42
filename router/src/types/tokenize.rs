//! `/tokenize` and `/chat_tokenize`.

use serde::Serialize;

/// A prompt token and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SimpleToken {
    /// Number in the vocabulary.
    pub id: u32,
    /// The slice `start..stop` of the input.
    pub text: String,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub stop: usize,
}

/// Answer of `/chat_tokenize`.
#[derive(Debug, Serialize)]
pub struct ChatTokenizeResponse {
    /// The tokens.
    pub tokenize_response: Vec<SimpleToken>,
    /// What the chat template made of the messages.
    pub templated_text: String,
}
