//! Quartet: what a model is, on disk or on the Hub.
//!
//! Two questions: which files make up a model ([`locate`], [`fetch`]), and what do they say ([`ModelFiles`]'s
//! methods). A checkpoint in Hugging Face's layout and a single GGUF file give the same answers: the latter's
//! metadata is translated into the spelling of the former.

mod args;
mod bounded;
mod config;
mod download;
mod error;
mod generation_config;
pub mod gguf;
mod gguf_config;
mod gguf_tokenizer;
mod links;
mod model_files;
mod panic_guard;
mod rope_override;
mod snapshot;
mod tokenizer;
mod tokenizer_files;
mod weight_choice;

pub use args::{DownloadOptions, HubArgs, HubOptions, ProgressOutput, Secret};
pub use config::ModelConfig;
pub use download::fetch;
pub use error::HubError;
pub use generation_config::GenerationConfig;
pub use model_files::{GgufFile, ModelFiles, WeightFiles, tokenizer_from_file};
pub use panic_guard::catch_panic;
pub use rope_override::{RopeKind, RopeOverride, stretched};
pub use snapshot::{ModelRef, locate};
pub use tokenizer::{TokenModel, Tokenizer, tokenizer_from_json};
pub use tokenizer_files::TokenizerConfig;
