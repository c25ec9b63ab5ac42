//! A whole generation: all tokens of one request, collected.

use proto::v3::GeneratedText;

use super::{GenerateStream, InferError};
use crate::metrics::RequestTimes;
use crate::scheduler::{Event, GeneratedToken};
use crate::types::{FinishReason, PrefillToken, Token};

/// A finished sequence.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Prompt tokens.
    pub input_length: u32,
    /// The prompt's tokens, if they were asked for and the shards report them.
    pub prefill: Vec<PrefillToken>,
    /// The generated tokens.
    pub tokens: Vec<Token>,
    /// Their alternatives; empty unless asked for.
    pub top_tokens: Vec<Vec<Token>>,
    /// Text, count, reason and seed.
    pub generated_text: GeneratedText,
    /// Where the time went.
    pub times: RequestTimes,
}

impl Generated {
    /// Why it ended.
    pub fn finish_reason(&self) -> FinishReason {
        self.generated_text.finish_reason().into()
    }

    /// What `best_of` compares.
    pub fn mean_logprob(&self) -> f32 {
        let sum: f32 = self.tokens.iter().map(|token| token.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }

    fn push(&mut self, generated: GeneratedToken) {
        self.tokens.push(generated.token.into());
        if !generated.top_tokens.is_empty() {
            self.top_tokens.push(generated.top_tokens.into_iter().map(Token::from).collect());
        }
    }
}

/// Waits for the last token.
pub(super) async fn collect(mut stream: GenerateStream) -> Result<Generated, InferError> {
    let mut generated = Generated {
        input_length: stream.input_length(),
        prefill: Vec::new(),
        tokens: Vec::new(),
        top_tokens: Vec::new(),
        generated_text: GeneratedText::default(),
        times: RequestTimes::default(),
    };
    while let Some(event) = stream.next().await {
        match event {
            Ok(Event::Prefill(tokens)) => {
                generated.prefill = tokens.into_iter().map(PrefillToken::from).collect();
            }
            Ok(Event::Token(token)) => generated.push(token),
            Ok(Event::Last(token, end)) => {
                generated.push(token);
                generated.times = stream.times(&end);
                generated.generated_text = end.generated_text;
                return Ok(generated);
            }
            Err(InferError::IncompleteStream) => break,
            Err(error) => return Err(error),
        }
    }
    Err(InferError::Incomplete)
}
