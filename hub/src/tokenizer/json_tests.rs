//! Equal to the library, token by token.

use serde_json::{Value, json};

use super::*;

fn added(id: u32, content: &str, normalized: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": normalized, "special": !normalized})
}

fn tokenizer(merges: &Value) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", false), added(9, "<end>", false), added(10, "AB ", true)],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                  "byte_fallback": false, "ignore_merges": false,
                  "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5, "bc": 6, "\"": 7, "<0xC3>": 8},
                  "merges": merges}
    })
}

fn ours(text: &str) -> Option<Tokenizer> {
    parse::<Merges>(text.as_bytes())
}

const PROMPTS: [&str; 8] = [
    "abc ABab <end>x",
    "",
    "cab",
    "aabbcc abcabcab",
    "\u{e9}\u{e9}a\u{e9}",
    "\"a\" \"bc\u{e8}",
    "ab xab AB",
    "x\u{e9}yabz",
];

/// Tokens, texts and offsets of all prompts.
#[track_caller]
fn assert_like_the_library(text: &str) {
    let (ours, theirs) = (ours(text).unwrap(), tokenizers::Tokenizer::from_bytes(text).unwrap());
    for prompt in PROMPTS {
        let (mine, expected) = (ours.encode(prompt, true).unwrap(), theirs.encode(prompt, true).unwrap());
        assert_eq!(mine.get_ids(), expected.get_ids(), "{prompt}");
        assert_eq!(mine.get_tokens(), expected.get_tokens(), "{prompt}");
        assert_eq!(mine.get_offsets(), expected.get_offsets(), "{prompt}");
        for skip in [false, true] {
            let (mine, expected) =
                (ours.decode(mine.get_ids(), skip), theirs.decode(expected.get_ids(), skip));
            assert_eq!(mine.unwrap(), expected.unwrap(), "{prompt}");
        }
    }
    assert_eq!(ours.get_vocab(true), theirs.get_vocab(true));
    assert_eq!(ours.get_vocab_size(true), theirs.get_vocab_size(true));
}

#[test]
fn it_does_what_the_librarys_does() {
    for merges in
        [json!(["b c", "a b", "ab c", "a bc"]), json!([["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]])]
    {
        let mut file = tokenizer(&merges);
        assert_like_the_library(&file.to_string());
        for key in ["fuse_unk", "byte_fallback", "ignore_merges"] {
            file["model"][key] = json!(file["model"][key] != json!(true));
            assert_like_the_library(&file.to_string());
        }
        file["model"]["unk_token"] = Value::Null;
        assert_like_the_library(&file.to_string());
        file["model"]["vocab"]["<0xA9>"] = json!(11);
        assert_like_the_library(&file.to_string());
    }
}

/// Words of all lengths over three letters, with merges in a random order.
#[test]
fn many_words_are_cut_as_the_library_cuts_them() {
    let mut vocab: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
    let mut merges = Vec::new();
    let mut state = 7_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    while vocab.len() < 60 {
        let pair = [vocab[random(vocab.len())].clone(), vocab[random(vocab.len())].clone()];
        let merged = pair.concat();
        if !vocab.contains(&merged) {
            vocab.push(merged);
        }
        merges.push(pair);
    }
    let by_text: serde_json::Map<_, _> = vocab.iter().cloned().zip((0..).map(|id| json!(id))).collect();
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": by_text, "merges": merges}});
    let text = file.to_string();
    let (ours, theirs) = (ours(&text).unwrap(), tokenizers::Tokenizer::from_bytes(&text).unwrap());
    for length in 0..200 {
        let word: String = (0..length).map(|_| ['a', 'b', 'c'][random(3)]).collect();
        let ids = theirs.encode(word.as_str(), true).unwrap().get_ids().to_vec();
        assert_eq!(ours.encode(word.as_str(), true).unwrap().get_ids(), ids, "{word}");
    }
}

#[test]
fn without_merges_it_decodes_as_before() {
    let text = tokenizer(&json!(["a b", "ab c"])).to_string();
    let (ours, theirs) =
        (parse::<NoMerges>(text.as_bytes()).unwrap(), tokenizers::Tokenizer::from_bytes(&text).unwrap());
    let ids = [5, 4, 9, 0, 3, 99, 10];
    for skip in [false, true] {
        assert_eq!(ours.decode(&ids, skip).unwrap(), theirs.decode(&ids, skip).unwrap());
    }
    assert_eq!((ours.token_to_id("<end>"), ours.get_model().largest_id()), (Some(9), Some(8)));
}

#[test]
fn what_is_unusual_is_left_to_the_library() {
    for merges in [json!(["a b c"]), json!(["a x"]), json!(["ab a"]), json!([["a"]])] {
        assert!(ours(&tokenizer(&merges).to_string()).is_none(), "{merges}");
        assert!(tokenizer_from_json(tokenizer(&merges).to_string().as_bytes()).is_err(), "{merges}");
    }
    for (key, value) in [
        ("dropout", json!(0.5)),
        ("continuing_subword_prefix", json!("##")),
        ("end_of_word_suffix", json!("</w>")),
        ("unk_token", json!("?")),
    ] {
        let mut file = tokenizer(&json!([]));
        file["model"][key] = value;
        assert!(ours(&file.to_string()).is_none(), "{key}");
        assert!(tokenizer_from_json(file.to_string().as_bytes()).is_ok(), "{key}");
    }
    let mut other = tokenizer(&json!([]));
    other["model"] = json!({"type": "WordLevel", "vocab": {"a": 0, "c": 4}, "unk_token": "a"});
    assert!(ours(&other.to_string()).is_none());
    let read = tokenizer_from_json(other.to_string().as_bytes()).unwrap();
    assert_eq!(read.get_model().largest_id(), Some(4));
    // The library numbers added tokens itself: after the vocabulary's two.
    assert_eq!(read.encode("c <end> b", true).unwrap().get_ids(), [4, 3, 0]);
    assert!(ours("{").is_none() && tokenizer_from_json(b"{").is_err());
}
