//! A tokenizer of bytes, for unit tests and for the tests of the program.

use serde_json::{Map, Value, json};

/// A byte-level BPE tokenizer without merges, as `tokenizer.json` has it: token id = byte, special tokens from 256 on.
pub(crate) fn byte_tokenizer(special: &[&str]) -> Value {
    let mut vocab = Map::new();
    let mut stand_in = 256u32;
    for byte in 0..=255u32 {
        // GPT-2's table: printable Latin-1 characters stand for themselves, other bytes for characters from 256 on.
        let printable =
            (0x21..=0x7e).contains(&byte) || (0xa1..=0xac).contains(&byte) || (0xae..=0xff).contains(&byte);
        let code = if printable { byte } else { stand_in };
        stand_in += u32::from(!printable);
        vocab.insert(char::from_u32(code).unwrap().to_string(), json!(byte));
    }
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(index, content)| {
            json!({"id": 256 + index, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}
