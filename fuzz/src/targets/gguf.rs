//! A GGUF file: header, metadata as a configuration, and tensors loaded as the model that the metadata describes.

use std::sync::LazyLock;

use super::loading;
use crate::message::{check_line, check_model_error};
use crate::scratch::Scratch;

static MODEL: LazyLock<Scratch> = LazyLock::new(|| Scratch::with(&[]));

/// Loads the file.
pub fn run(input: &[u8]) {
    MODEL.write("m.gguf", input);
    let Some(files) = loading::locate(&MODEL.file("m.gguf")) else { return };
    if let Err(error) = files.generation_config() {
        check_line(&error);
    }
    match files.config() {
        Err(error) => check_line(&error),
        Ok(config) => match models::decoder_spec(&config) {
            Err(error) => check_model_error(&error),
            Ok(_) => loading::load(&files),
        },
    }
}
