//! The program as users start it, against a shard without a model.

#![allow(clippy::unwrap_used, reason = "a test program: what is not as expected fails the test")]

mod command_line;
mod fake_shard;
mod terminal;

/// One token a word.
const TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "dolor": 1}, "unk_token": "<unk>"}
}"#;
