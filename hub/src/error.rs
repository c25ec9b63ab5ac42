//! Why a model cannot be found, fetched or understood.

use std::io;
use std::path::{Path, PathBuf};

/// Every message says what was found, what was expected, and what changes it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The model id is no Hub id and no existing path.
    #[error(
        "model id {model_id:?} is neither an existing path nor a Hub id such as \"organisation/name\"; \
         change --model-id"
    )]
    InvalidModelId {
        /// What was asked for.
        model_id: String,
    },

    /// A file of the model is not on this disk.
    #[error("{missing} of model {model_id:?} is not in {}; {remedy}", looked_in.display())]
    Missing {
        /// What was asked for.
        model_id: String,
        /// The file, such as `config.json`.
        missing: String,
        /// The directory that was searched.
        looked_in: PathBuf,
        /// What changes it.
        remedy: String,
    },

    /// The weights exist, but in a format that is not read.
    #[error(
        "model {model_id:?} has its weights as {found} only; expected *.safetensors, \
         pytorch_model*.bin or one .gguf file; {remedy}"
    )]
    UnsupportedWeights {
        /// What was asked for.
        model_id: String,
        /// The format found, with an example.
        found: String,
        /// What changes it.
        remedy: String,
    },

    /// More than one GGUF file, and nothing says which.
    #[error("model {model_id:?} has {} GGUF files ({}); choose one with --model-id {choice}", names.len(), names.join(", "))]
    AmbiguousGguf {
        /// What was asked for.
        model_id: String,
        /// The files found.
        names: Vec<String>,
        /// A model id that names the first of them.
        choice: String,
    },

    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, such as `read`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },

    /// A model must be downloaded, and the cache cannot be written.
    #[error(
        "model {model_id:?} is not complete in {} and cannot be downloaded into it: {source}; download it where it can be \
         written (`launcher download`), or change --huggingface-hub-cache",
        path.display()
    )]
    ReadOnlyCache {
        /// What was asked for.
        model_id: String,
        /// The repository's folder in the cache.
        path: PathBuf,
        /// Why it cannot be written.
        source: io::Error,
    },

    /// The disk of the cache is too small, or became full.
    #[error(
        "no space for {model_id:?} in {}: {} more are needed, {reason}; free space there, or change --huggingface-hub-cache",
        path.display(),
        indicatif::HumanBytes(*needed)
    )]
    NoSpace {
        /// What was asked for.
        model_id: String,
        /// The repository's folder in the cache.
        path: PathBuf,
        /// Bytes that have not been written yet.
        needed: u64,
        /// What is free, or what the system says.
        reason: String,
    },

    /// A JSON file is damaged, or a value in it has the wrong type.
    #[error("{origin}: {problem}")]
    Format {
        /// The file, or the key in it.
        origin: String,
        /// What was found and what was expected.
        problem: String,
    },

    /// A GGUF file is damaged.
    #[error("{origin}: not a usable GGUF file: {problem}")]
    Gguf {
        /// The file.
        origin: String,
        /// What was found and what was expected.
        problem: String,
    },

    /// A GGUF file is sound but of a kind that is not supported.
    #[error("{origin}: {found} is not supported; supported are {supported}")]
    UnsupportedGguf {
        /// The file.
        origin: String,
        /// Such as `architecture "bloom"`.
        found: String,
        /// What would work.
        supported: String,
    },

    /// The tokenizer's files are damaged.
    #[error("{origin}: cannot build the tokenizer: {problem}")]
    Tokenizer {
        /// The file.
        origin: String,
        /// What the tokenizers library, or our check, says.
        problem: String,
    },

    /// The Hub answered with an error, or not at all.
    #[error("cannot {action} from {endpoint}: {problem}; {remedy}")]
    Hub {
        /// What was tried, such as `list the files of "organisation/name"`.
        action: String,
        /// The Hub's address.
        endpoint: String,
        /// What went wrong.
        problem: String,
        /// What changes it.
        remedy: String,
    },
}

impl HubError {
    /// An I/O error together with what was tried on which path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
        let path = path.to_owned();
        move |source| HubError::Io { action, path, source }
    }

    /// A damaged file or a value of the wrong type.
    pub(crate) fn format(origin: impl Into<String>, problem: impl Into<String>) -> HubError {
        HubError::Format { origin: origin.into(), problem: problem.into() }
    }
}
