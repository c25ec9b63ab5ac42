//! The tokenizer in a GGUF file's metadata, byte pairs or SentencePiece, and its chat template.

use std::sync::LazyLock;

use super::{loading, tokenizer};
use crate::message::check_line;
use crate::scratch::Scratch;

static MODEL: LazyLock<Scratch> = LazyLock::new(|| Scratch::with(&[]));

/// Builds the tokenizer and uses it.
pub fn run(input: &[u8]) {
    MODEL.write("m.gguf", input);
    let Some(files) = loading::locate(&MODEL.file("m.gguf")) else { return };
    if let Err(error) = files.tokenizer_config() {
        check_line(&error);
    }
    tokenizer::use_tokenizer_of(&files);
}
