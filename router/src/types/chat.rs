//! `/v1/chat/completions`.

use serde::{Deserialize, Serialize};

use super::Token;

/// Body of `/v1/chat/completions` and `/chat_tokenize`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ChatRequest {
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Echoed in the answer.
    #[serde(default)]
    pub model: Option<String>,
    /// Most tokens to generate.
    #[serde(default, alias = "max_completion_tokens")]
    pub max_tokens: Option<u32>,
    /// 0: the most probable token, always.
    #[serde(default)]
    pub temperature: Option<f32>,
    /// Below 1.
    #[serde(default)]
    pub top_p: Option<f32>,
    /// Becomes a repetition penalty of 2 more.
    #[serde(default)]
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    #[serde(default)]
    pub frequency_penalty: Option<f32>,
    /// Same seed, same sample.
    #[serde(default)]
    pub seed: Option<u64>,
    /// End when one of these was generated.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Answer with log-probabilities too.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// Alternatives of each token.
    #[serde(default)]
    pub top_logprobs: Option<u32>,
    /// Answer with events.
    #[serde(default)]
    pub stream: bool,
    /// What else to send in a stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Number of answers.
    #[serde(default)]
    pub n: Option<u32>,
    /// Token biases, kept as sent: TGI takes a list, OpenAI a map.
    #[serde(default)]
    pub logit_bias: Option<serde_json::Value>,
    /// Functions the model may call, kept as sent.
    #[serde(default)]
    pub tools: Option<Vec<serde_json::Value>>,
    /// Which of them, kept as sent.
    #[serde(default)]
    pub tool_choice: Option<serde_json::Value>,
    /// How they are explained to the model.
    #[serde(default)]
    pub tool_prompt: Option<String>,
    /// A constraint on the output, kept as sent.
    #[serde(default)]
    pub response_format: Option<serde_json::Value>,
}

/// What else a stream contains.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StreamOptions {
    /// One more chunk with the token counts.
    pub include_usage: bool,
}

/// Stop texts: a list, or (as OpenAI's clients send it) a single string.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "`stop` must be a string or a list of strings")]
pub enum Stop {
    /// One text.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl From<Stop> for Vec<String> {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::One(text) => vec![text],
            Stop::Many(texts) => texts,
        }
    }
}

/// One message of a conversation. `content` may be missing only beside `tool_calls`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "RawMessage")]
pub struct ChatMessage {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: Content,
    /// Calls the model made, kept as sent; empty for ordinary messages.
    pub tool_calls: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawMessage {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Option<Vec<serde_json::Value>>,
}

impl TryFrom<RawMessage> for ChatMessage {
    type Error = String;

    fn try_from(raw: RawMessage) -> Result<Self, String> {
        let tool_calls = raw.tool_calls.unwrap_or_default();
        let content = match raw.content {
            Some(content) => content,
            None if !tool_calls.is_empty() => Content::Text(String::new()),
            None => return Err(format!("a message of role `{}` needs `content`", raw.role)),
        };
        Ok(Self { role: raw.role, content, tool_calls })
    }
}

/// A text, or parts.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "`content` must be a string or a list of `text` and `image_url` parts")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Text and images in order.
    Parts(Vec<ContentPart>),
}

/// One part of a message.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentPart {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// An image.
    ImageUrl {
        /// Where it is.
        image_url: ImageUrl,
    },
}

/// Where an image is: `http(s)` or `data:`.
#[derive(Clone, Debug, Deserialize)]
pub struct ImageUrl {
    /// The URL.
    pub url: String,
}

/// Token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
}

impl Usage {
    /// Counts and their sum.
    pub fn new(prompt_tokens: u32, completion_tokens: u32) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// Answer of `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub struct ChatCompletion {
    /// `chat.completion`.
    pub object: &'static str,
    /// Empty, as TGI's.
    pub id: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The requested model, or the served one.
    pub model: String,
    /// Version and build.
    pub system_fingerprint: String,
    /// Always one.
    pub choices: [ChatChoice; 1],
    /// Token counts.
    pub usage: Usage,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct ChatChoice {
    /// 0.
    pub index: u32,
    /// What the model says.
    pub message: OutputMessage,
    /// Only if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended, in OpenAI's spelling.
    pub finish_reason: &'static str,
}

/// What the model says.
#[derive(Debug, Serialize)]
pub struct OutputMessage {
    /// `assistant`.
    pub role: &'static str,
    /// The text.
    pub content: String,
}

/// Log-probabilities of an answer's tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatLogprobs {
    /// One a token.
    pub content: Vec<ChatLogprob>,
}

/// One token's log-probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatLogprob {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Alternatives.
    pub top_logprobs: Vec<ChatTopLogprob>,
}

/// An alternative.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatTopLogprob {
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
}

impl ChatLogprob {
    /// From a token and its alternatives.
    pub fn new(token: &Token, top_tokens: &[Token]) -> Self {
        let alternatives = top_tokens
            .iter()
            .map(|top| ChatTopLogprob { token: top.text.clone(), logprob: top.logprob })
            .collect();
        Self { token: token.text.clone(), logprob: token.logprob, top_logprobs: alternatives }
    }
}

/// One event of a chat stream. Borrows what is the same in all of them.
#[derive(Debug, Serialize)]
pub struct ChatChunk<'a> {
    /// `chat.completion.chunk`.
    pub object: &'static str,
    /// Empty, as TGI's.
    pub id: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The requested model, or the served one.
    pub model: &'a str,
    /// Version and build.
    pub system_fingerprint: &'a str,
    /// One, or none in the chunk with the token counts.
    pub choices: &'a [ChatChunkChoice],
    /// Token counts, in a last chunk of their own.
    pub usage: Option<Usage>,
}

/// What a chunk adds.
#[derive(Debug, Serialize)]
pub struct ChatChunkChoice {
    /// 0.
    pub index: u32,
    /// What it adds.
    pub delta: ChatDelta,
    /// Only if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// In the chunk of the last token.
    pub finish_reason: Option<&'static str>,
}

/// What a chunk adds.
#[derive(Debug, Serialize)]
pub struct ChatDelta {
    /// `assistant`, in every chunk.
    pub role: &'static str,
    /// Text; empty for special tokens.
    pub content: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ChatRequest, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn reads_what_the_clients_send() {
        let request = parse(
            r#"{"model":"tgi","messages":[{"role":"user","name":null,"tool_calls":null,"content":"hi"}],
                "stop":"END","max_completion_tokens":5,"tools":null,"tool_choice":null,"stream_options":null}"#,
        )
        .unwrap();
        assert_eq!(request.max_tokens, Some(5));
        assert_eq!(Vec::from(request.stop.unwrap()), ["END"]);
        let parts = parse(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},
                {"type":"image_url","image_url":{"url":"http://x/y.png"}}]}],"stop":["a","b"]}"#,
        )
        .unwrap();
        assert!(matches!(&parts.messages[0].content, Content::Parts(parts) if parts.len() == 2));
    }

    #[test]
    fn content_may_be_missing_only_beside_tool_calls() {
        assert!(parse(r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{}]}]}"#).is_ok());
        let error = parse(r#"{"messages":[{"role":"user"}]}"#).unwrap_err().to_string();
        assert!(error.contains("a message of role `user` needs `content`"), "{error}");
        assert!(parse(r#"{"messages":[],"max_tokens":1,"max_completion_tokens":2}"#).is_err());
    }
}
