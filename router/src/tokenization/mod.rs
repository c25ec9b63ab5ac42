//! Tokenizer threads behind a handle.
//!
//! Tokenizing a long prompt takes milliseconds of pure computation: on an async thread it would delay every running
//! stream. Jobs go round-robin to as many threads as `--validation-workers` says.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use hub::{Tokenizer, catch_panic};
use tokio::sync::oneshot;

use crate::types::SimpleToken;
use crate::validation::ValidationError;

/// A job and where its answer goes.
enum Job {
    Encode {
        text: String,
        add_special_tokens: bool,
        truncate: Option<usize>,
        answer: oneshot::Sender<Result<(String, Vec<u32>), ValidationError>>,
    },
    Tokenize {
        text: String,
        add_special_tokens: bool,
        answer: oneshot::Sender<Result<Vec<SimpleToken>, ValidationError>>,
    },
}

/// A handle to the threads. Cloning is cheap; the threads end when the last handle is gone.
#[derive(Clone, Debug)]
pub struct Tokenization {
    workers: Arc<[Sender<Job>]>,
    next: Arc<AtomicUsize>,
}

impl Tokenization {
    /// Starts `num_workers` threads, at least one.
    ///
    /// # Errors
    /// The operating system refuses a thread.
    pub fn start(tokenizer: Arc<Tokenizer>, num_workers: usize) -> io::Result<Self> {
        let start_one = |index: usize| {
            let tokenizer = Arc::clone(&tokenizer);
            let (sender, jobs) = channel();
            std::thread::Builder::new()
                .name(format!("tokenizer-{index}"))
                .spawn(move || work(&tokenizer, &jobs))?;
            Ok(sender)
        };
        let workers = (0..num_workers.max(1)).map(start_one).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { workers: workers.into(), next: Arc::default() })
    }

    /// Token ids of `text`, the last `truncate` of them. Hands the text back.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub async fn encode(
        &self,
        text: String,
        add_special_tokens: bool,
        truncate: Option<usize>,
    ) -> Result<(String, Vec<u32>), ValidationError> {
        let (answer, receiver) = oneshot::channel();
        self.send(Job::Encode { text, add_special_tokens, truncate, answer });
        receiver.await.map_err(|_| gone())?
    }

    /// Tokens of `text` and the bytes they come from.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub async fn tokenize(
        &self,
        text: String,
        add_special_tokens: bool,
    ) -> Result<Vec<SimpleToken>, ValidationError> {
        let (answer, receiver) = oneshot::channel();
        self.send(Job::Tokenize { text, add_special_tokens, answer });
        receiver.await.map_err(|_| gone())?
    }

    /// A job that cannot be delivered drops its answer channel, which its caller sees.
    fn send(&self, job: Job) {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len();
        let _ = self.workers[index].send(job);
    }
}

fn gone() -> ValidationError {
    ValidationError::Tokenizer("the tokenizer thread has ended".to_string())
}

fn work(tokenizer: &Tokenizer, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Encode { text, add_special_tokens, truncate, answer } => {
                // A client that left while its prompt was waiting here costs no tokenizing.
                if !answer.is_closed() {
                    let result = encode(tokenizer, text, add_special_tokens, truncate);
                    let _ = answer.send(result);
                }
            }
            Job::Tokenize { text, add_special_tokens, answer } => {
                if !answer.is_closed() {
                    let _ = answer.send(tokenize(tokenizer, &text, add_special_tokens));
                }
            }
        }
    }
}

/// A damaged tokenizer makes the library panic on some texts: that is the request's misfortune, not the thread's.
fn guarded<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, ValidationError> {
    let call = || call().map_err(|error| error.to_string());
    catch_panic(call).flatten().map_err(ValidationError::Tokenizer)
}

fn encode(
    tokenizer: &Tokenizer,
    text: String,
    add_special_tokens: bool,
    truncate: Option<usize>,
) -> Result<(String, Vec<u32>), ValidationError> {
    // The fast variant tracks no offsets, which nobody needs here.
    let encoding = guarded(|| tokenizer.encode_fast(text.as_str(), add_special_tokens))?;
    let ids = encoding.get_ids();
    let first_kept = truncate.map_or(0, |truncate| ids.len().saturating_sub(truncate));
    let ids = ids[first_kept..].to_vec();
    Ok((text, ids))
}

fn tokenize(
    tokenizer: &Tokenizer,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<SimpleToken>, ValidationError> {
    let encoding = guarded(|| tokenizer.encode(text, add_special_tokens))?;
    let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
    Ok(tokens
        .map(|(&id, &(start, stop))| {
            // A token may end within a character; its slice is then not text of its own.
            let text = text.get(start..stop).unwrap_or_default().to_string();
            SimpleToken { id, text, start, stop }
        })
        .collect())
}

#[cfg(test)]
pub(crate) mod testing {
    //! A tokenizer without files.

    use hub::Tokenizer;

    /// Words are tokens: `a` 1, `b` 2, anything else 0.
    pub(crate) fn word_tokenizer() -> Tokenizer {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"[UNK]":0,"a":1,"b":2},"unk_token":"[UNK]"}}"#;
        hub::tokenizer_from_json(json.as_bytes()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::word_tokenizer;
    use super::*;

    #[tokio::test]
    async fn keeps_the_end_of_the_prompt() {
        let tokenization = Tokenization::start(word_tokenizer().into(), 2).unwrap();
        for _ in 0..3 {
            let (text, ids) = tokenization.encode("a b ä".to_string(), true, Some(2)).await.unwrap();
            assert_eq!((text.as_str(), ids.as_slice()), ("a b ä", [2, 0].as_slice()));
        }
    }

    #[tokio::test]
    async fn a_tokenizer_that_panics_costs_one_request() {
        // The library cuts text into chunks of no length.
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"FixedLength","length":0},"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        let tokenizer = hub::tokenizer_from_json(json.as_bytes()).unwrap();
        let tokenization = Tokenization::start(tokenizer.into(), 1).unwrap();
        for _ in 0..2 {
            let error = tokenization.encode("ab".to_string(), true, None).await.unwrap_err().to_string();
            assert!(error.contains("chunk size must be non-zero"), "{error}");
            assert!(tokenization.tokenize("ab".to_string(), true).await.is_err());
            assert!(tokenization.encode(String::new(), false, None).await.is_ok());
        }
    }

    #[tokio::test]
    async fn offsets_are_bytes() {
        let tokenization = Tokenization::start(word_tokenizer().into(), 1).unwrap();
        let tokens = tokenization.tokenize("ä b".to_string(), true).await.unwrap();
        assert_eq!(tokens[0], SimpleToken { id: 0, text: "ä".to_string(), start: 0, stop: 2 });
        assert_eq!(tokens[1], SimpleToken { id: 2, text: "b".to_string(), start: 3, stop: 4 });
    }
}
