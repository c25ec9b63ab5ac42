//! What can stop a benchmark.

use std::path::PathBuf;

use proto::ClientError;

/// Why a run did not give its numbers. Every message is one line that names the way out.
#[derive(Debug, thiserror::Error)]
pub enum BenchmarkError {
    /// No usable tokenizer under the given name.
    #[error(
        "cannot load the tokenizer of `{name}`: {reason} (--tokenizer-name takes a model id, a directory with tokenizer.json, or a .gguf file)"
    )]
    Tokenizer {
        /// The value of `--tokenizer-name`.
        name: String,
        /// What the loader said.
        reason: String,
    },
    /// Nobody, or somebody else, listens on the socket.
    #[error("{source}; --master-shard-uds-path names the socket of rank 0 of a running shard")]
    Attach {
        /// What the client said.
        source: ClientError,
    },
    /// A shard that nobody had warmed up refused to be warmed up.
    #[error("warm-up failed: {source}")]
    Warmup {
        /// What the client said.
        source: ClientError,
    },
    /// A call failed in the middle of the run.
    #[error("{call} of batch size {batch_size} failed: {source}")]
    Call {
        /// `prefill` or `decode`.
        call: &'static str,
        /// Requests in the batch.
        batch_size: u32,
        /// What the client said.
        source: ClientError,
    },
    /// The requests of a batch cannot be held at the same time, or are too long for the model.
    #[error("{0}")]
    TooLarge(String),
    /// The shard generated another number of tokens than it was asked for, so its times mean nothing.
    #[error(
        "decode of batch size {batch_size} took {steps} steps, expected {expected}: the shard stopped {when}"
    )]
    WrongLength {
        /// Requests in the batch.
        batch_size: u32,
        /// Decode calls until no batch was left.
        steps: u32,
        /// `decode_length - 1`.
        expected: u32,
        /// `early` or `late`.
        when: &'static str,
    },
    /// The report could not be written.
    #[error("cannot write {}: {reason} (--output-json)", path.display())]
    Output {
        /// The value of `--output-json`.
        path: PathBuf,
        /// The system's own words.
        reason: String,
    },
    /// The terminal could not be switched to the interface and back, or not be read.
    #[error("cannot use the terminal: {0} (--no-tui does without)")]
    Terminal(std::io::Error),
    /// The system gave no thread or no runtime.
    #[error("cannot start: {0}")]
    Start(std::io::Error),
    /// A signal ended the run before its time.
    #[error("interrupted before all runs were done")]
    Interrupted,
    /// A defect of this program.
    #[error("the thread that drives the shards panicked; this is a bug")]
    Panicked,
}
