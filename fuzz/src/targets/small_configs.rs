//! `generation_config.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.json`: the input is each.

use std::sync::LazyLock;

use super::loading;
use crate::message::check_line;
use crate::scratch::Scratch;

static MODEL: LazyLock<Scratch> = LazyLock::new(|| {
    Scratch::with(&[("config.json", loading::CONFIG.as_bytes()), ("model.safetensors", b"")])
});

const FILES: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json"];

/// Reads the files.
pub fn run(input: &[u8]) {
    FILES.iter().for_each(|name| MODEL.write(name, input));
    let Some(files) = loading::locate(MODEL.path()) else { return };
    let _ = files.generation_config().inspect_err(|error| check_line(error));
    let _ = files.tokenizer_config().inspect_err(|error| check_line(error));
}
