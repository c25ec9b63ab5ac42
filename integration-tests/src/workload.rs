//! Streams whose answers are known from an undisturbed run, to be asked for while processes die.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::golden::{FLOAT32, Token};
use crate::http;

/// What a stream said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its tokens, in order.
    pub tokens: Vec<Token>,
    /// The whole text, as the last event has it.
    pub text: String,
    /// Why it ended and how many tokens that were, as the last event has it.
    pub end: Value,
    /// The longest time between two tokens.
    pub longest_gap: Duration,
}

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AskError {
    /// The connection broke: what a client sees when the router itself dies.
    #[error("the connection broke: {0}")]
    Connection(String),
    /// The server answered, and it was no answer.
    #[error("{0}")]
    Refused(String),
}

/// Opens one stream and reads it to its end; `on_token` is told after each token.
///
/// # Errors
/// See [`AskError`].
pub fn ask(port: u16, body: &Value, mut on_token: impl FnMut()) -> Result<Answer, AskError> {
    let broken = |error: anyhow::Error| AskError::Connection(format!("{error:#}"));
    let stream = http::stream(port, "/generate_stream", body).map_err(|error| {
        let text = format!("{error:#}");
        if text.starts_with("expected an event stream") {
            AskError::Refused(text)
        } else {
            AskError::Connection(text)
        }
    })?;
    let mut tokens = Vec::new();
    let (mut last, mut longest_gap) = (Instant::now(), Duration::ZERO);
    for event in stream {
        let event = event.map_err(broken)?;
        let event: Value = serde_json::from_str(&event).map_err(|error| broken(error.into()))?;
        let token = serde_json::from_value(event["token"].clone());
        tokens.push(token.map_err(|_| AskError::Refused(event.to_string()))?);
        if tokens.len() > 1 {
            longest_gap = longest_gap.max(last.elapsed());
        }
        last = Instant::now();
        on_token();
        if let Some(text) = event["generated_text"].as_str() {
            let end = json!([event["details"]["finish_reason"], event["details"]["generated_tokens"]]);
            return Ok(Answer { tokens, text: text.to_string(), end, longest_gap });
        }
    }
    Err(AskError::Connection(format!("the stream ended after {} tokens", tokens.len())))
}

impl Answer {
    /// Compares with the undisturbed answer: every token's id, text and log-probability, the whole text and the end.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, undisturbed: &Answer) -> Result<()> {
        for (step, (ours, expected)) in self.tokens.iter().zip(&undisturbed.tokens).enumerate() {
            ensure!(
                ours.id == expected.id && ours.text == expected.text,
                "token {step} is {} {:?} (log-probability {}), expected {} {:?} ({})",
                ours.id,
                ours.text,
                ours.logprob,
                expected.id,
                expected.text,
                expected.logprob
            );
            let error = (ours.logprob - expected.logprob).abs();
            ensure!(error <= FLOAT32.logprob, "log-probability {step} is off by {error}");
        }
        let (ours, expected) = (self.tokens.len(), undisturbed.tokens.len());
        ensure!(ours == expected, "{ours} tokens, expected {expected}");
        ensure!(self.text == undisturbed.text, "text {:?}, expected {:?}", self.text, undisturbed.text);
        ensure!(self.end == undisturbed.end, "end {}, expected {}", self.end, undisturbed.end);
        Ok(())
    }
}

/// `count` requests of every kind whose state must survive: greedy and sampled, penalties, stop sequences, prompts and
/// answers with characters of several tokens, long and short.
pub fn requests(count: usize, longest: usize) -> Vec<Value> {
    let prompts =
        ["The capital of France is", "\u{e9}t\u{e9} \u{1f980} ", "a", "One, two, three, four, five,"];
    (0..count)
        .map(|number| {
            let mut parameters = json!({
                "details": true,
                "max_new_tokens": longest / 2 + number * 37 % longest.div_ceil(2),
                "do_sample": number % 4 != 0,
            });
            match number % 4 {
                0 => parameters["repetition_penalty"] = json!(1.1),
                1 => (parameters["seed"], parameters["top_p"]) = (json!(number), json!(0.95)),
                2 => {
                    parameters["seed"] = json!(number);
                    parameters["repetition_penalty"] = json!(1.3);
                    parameters["frequency_penalty"] = json!(0.2);
                    parameters["top_n_tokens"] = json!(3);
                }
                _ => {
                    (parameters["seed"], parameters["stop"]) = (json!(number), json!(["zz", "\u{e9}", "q%"]))
                }
            }
            json!({"inputs": prompts[number / 4 % prompts.len()], "parameters": parameters})
        })
        .collect()
}

/// Requests with their undisturbed answers.
#[derive(Debug)]
pub struct Known {
    /// Requests whose answer is the same alone and in company.
    pub requests: Vec<Value>,
    /// Their answers.
    pub answers: Vec<Answer>,
    /// How many requests were left out: a random number or two logits so near to a tie that the last bits of the
    /// arithmetic, which depend on the company, decide.
    pub near_ties: usize,
}

/// Asks for everything alone, then in batches of several sizes, and keeps what is always answered alike.
///
/// # Errors
/// When there is no answer.
pub fn undisturbed(port: u16, requests: Vec<Value>) -> Result<Known> {
    let alone: Vec<Answer> = requests
        .iter()
        .map(|request| ask(port, request, || ()).with_context(|| request.to_string()))
        .collect::<Result<_>>()?;
    let mut is_stable = vec![true; requests.len()];
    for at_once in [requests.len().div_ceil(2), requests.len()] {
        for first in (0..requests.len()).step_by(at_once) {
            let group = first..requests.len().min(first + at_once);
            let answers: Vec<_> = std::thread::scope(|scope| {
                let ask = |request| scope.spawn(move || ask(port, request, || ()));
                let threads: Vec<_> = requests[group.clone()].iter().map(ask).collect();
                threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
            });
            for (number, answer) in group.zip(answers) {
                let answer = answer.ok().context("a client panicked")??;
                is_stable[number] &= answer.check(&alone[number]).is_ok();
            }
        }
    }
    let near_ties = is_stable.iter().filter(|is_stable| !**is_stable).count();
    let known = requests.into_iter().zip(alone).zip(is_stable).filter(|(_, is_stable)| *is_stable);
    let (requests, answers) = known.map(|(known, _)| known).unzip();
    Ok(Known { requests, answers, near_ties })
}
