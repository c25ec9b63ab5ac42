//! Tokenizers built from GGUF metadata written in memory.

use super::*;
use crate::gguf::writer::{GgufWriter, mutations};

/// All bytes as the byte-level alphabet writes them, a few merges, and two added tokens.
fn file(pre: &str) -> GgufWriter {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    let mut tokens: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    tokens.extend(["he", "ll", "llo", "hello", "Ġhello", "12", "123", "<s>", "</s>", "<tool>"]);
    let mut kinds = vec![1; tokens.len()];
    let added = tokens.len() - 3;
    kinds[added] = 3;
    kinds[added + 1] = 3;
    kinds[added + 2] = 4;
    let mut writer = GgufWriter::default();
    writer
        .text("general.architecture", "llama")
        .number("llama.context_length", 77)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", &tokens)
        .texts("tokenizer.ggml.merges", &["h e", "l l", "ll o", "he llo", "Ġ hello", "1 2", "12 3"])
        .set("tokenizer.ggml.token_type", Value::Array(Array::Signed(kinds)))
        .number("tokenizer.ggml.bos_token_id", added as u64)
        .number("tokenizer.ggml.eos_token_id", added as u64 + 1)
        .text("tokenizer.chat_template", "{{ messages }}");
    writer
}

fn build(writer: &GgufWriter) -> Result<Tokenizer, String> {
    let gguf = Gguf::parse(&writer.bytes()).unwrap();
    tokenizer(&gguf, "m.gguf").map_err(|error| error.to_string())
}

fn tokens(pre: &str, text: &str) -> Vec<String> {
    build(&file(pre)).unwrap().encode(text, true).unwrap().get_tokens().to_vec()
}

#[test]
fn merges_apply_and_text_survives_the_round_trip() {
    assert_eq!(tokens("gpt-2", "hello hello"), ["hello", "Ġhello"]);
    let tokenizer = build(&file("smollm")).unwrap();
    for text in ["hello  wörld\n\t123", "日本語 🦀", " leading and trailing "] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
    }
}

#[test]
fn each_family_cuts_digits_its_own_way() {
    assert_eq!(tokens("gpt-2", "123"), ["123"]);
    assert_eq!(tokens("smollm", "123"), ["1", "2", "3"]);
    assert_eq!(tokens("qwen2", "123"), ["1", "2", "3"]);
    assert_eq!(tokens("llama-bpe", "1231"), ["<s>", "123", "1"]);
}

#[test]
fn qwen_composes_characters_first() {
    let tokenizer = build(&file("qwen2")).unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert_eq!(ids("e\u{301}"), ids("\u{e9}"));
}

#[test]
fn added_tokens_are_found_in_text_and_special_ones_skipped() {
    assert_eq!(tokens("smollm", "<s>he<tool>he</s>"), ["<s>", "he", "<tool>", "he", "</s>"]);
    let tokenizer = build(&file("smollm")).unwrap();
    let ids = tokenizer.encode("<s>he<tool></s>", false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "he<tool>");
    assert_eq!(tokenizer.token_to_id("<s>"), Some(256 + 7));
}

#[test]
fn begin_and_end_are_added_when_the_file_says_so() {
    let mut writer = file("smollm");
    writer
        .set("tokenizer.ggml.add_bos_token", Value::Bool(true))
        .set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    let tokenizer = build(&writer).unwrap();
    assert_eq!(tokenizer.encode("he", true).unwrap().get_tokens(), ["<s>", "he", "</s>"]);
    assert_eq!(tokenizer.encode("he", false).unwrap().get_tokens(), ["he"]);
    let mut writer = file("llama-bpe");
    writer.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert_eq!(build(&writer).unwrap().encode("he", true).unwrap().get_tokens(), ["he"]);
}

#[test]
fn special_tokens_with_template_syntax_are_taken_literally() {
    let mut writer = file("llama-bpe");
    let Some((_, Value::Array(Array::Strings(tokens)))) =
        writer.metadata.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens")
    else {
        panic!("the file has tokens")
    };
    tokens[256 + 7] = "<|begin|>$A:1".to_owned();
    let tokenizer = build(&writer).unwrap();
    assert_eq!(tokenizer.encode("he", true).unwrap().get_tokens(), ["<|begin|>$A:1", "he"]);
}

#[test]
fn every_known_way_keeps_the_text() {
    let text = "Don't  cut\tmy 12345 words,\r\n\n ÉCOLE écoleX 日本語-한국어 🦀!? ";
    for name in pre_tokenization::names() {
        let tokenizer = build(&file(name)).unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text, "{name}");
    }
}

#[test]
fn ways_differ_where_they_should() {
    // Merges stop at a cut: "123" is one token where three digits may stay together.
    let digits = |pre: &str| tokens(pre, "1231").iter().filter(|token| !token.starts_with('<')).count();
    for (pre, expected) in [("dbrx", 2), ("deepseek-v3", 2), ("falcon", 2), ("default", 2), ("gpt-4o", 2)] {
        assert_eq!(digits(pre), expected, "{pre}");
    }
    for pre in ["stablelm2", "tekken", "command-r", "deepseek-coder", "viking", "seed-coder", "bailingmoe"] {
        assert_eq!(digits(pre), 4, "{pre}");
    }
    assert_eq!(tokens("tekken", "he")[0], "<s>");
    assert_eq!(tokens("dbrx", "he")[0], "he");
}

#[test]
fn unsupported_kinds_are_named() {
    let error = build(&file("nosuch")).unwrap_err();
    assert!(
        error.contains("tokenizer.ggml.pre \"nosuch\" is not supported; supported are default, llama-bpe"),
        "{error}"
    );
    let mut writer = file("smollm");
    writer.text("tokenizer.ggml.model", "rwkv");
    assert!(build(&writer).unwrap_err().contains("tokenizer \"rwkv\""));
}

/// A SentencePiece model: three special tokens, all bytes, and a few pieces.
fn sentence_piece_file() -> GgufWriter {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let pieces = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a", "  ", "\n\n"];
    let scores = [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, -1000.0, -1000.0];
    let tokens: Vec<&str> =
        ["<unk>", "<s>", "</s>"].into_iter().chain(bytes.iter().map(String::as_str)).chain(pieces).collect();
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6; 256]);
    kinds.extend([1, 1, 1, 1, 1, 1, 1, 1, 4, 4]);
    let mut writer = GgufWriter::default();
    writer
        .text("general.architecture", "llama")
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens)
        .set("tokenizer.ggml.token_type", Value::Array(Array::Signed(kinds)))
        .set(
            "tokenizer.ggml.scores",
            Value::Array(Array::Floats([0.0; 259].into_iter().chain(scores).collect())),
        )
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.eos_token_id", 2);
    writer
}

#[test]
fn sentence_piece_joins_the_best_scores_first() {
    let tokenizer = build(&sentence_piece_file()).unwrap();
    let tokens = |text: &str| tokenizer.encode(text, true).unwrap().get_tokens().to_vec();
    // "bc" is better than "ab", and what is left over joins to "abc"; only then would "▁a" be joined.
    assert_eq!(tokens("abc"), ["<s>", "▁", "abc"]);
    assert_eq!(tokens("ab a"), ["<s>", "▁", "ab", "▁a"]);
    assert_eq!(tokens("aé"), ["<s>", "▁a", "<0xC3>", "<0xA9>"]);
    for text in ["abc", " a  b\n\nc", "é🦀 ", "a</s>b"] {
        let ids = tokenizer.encode(text, false).unwrap();
        // The one space that was put before a text, and after a special token, is taken away at the start only.
        let decoded = tokenizer.decode(ids.get_ids(), false).unwrap();
        assert_eq!(decoded.replace("</s> ", "</s>").replace("   b", "  b").replace("\n\n c", "\n\nc"), text);
    }
}

#[test]
fn sentence_piece_without_a_prefix_keeps_text_as_it_is() {
    let mut writer = sentence_piece_file();
    writer.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    let tokenizer = build(&writer).unwrap();
    assert_eq!(tokenizer.encode("a  b", true).unwrap().get_tokens(), ["<s>", "a", "  ", "b"]);
    for text in ["abc", " a  b\n\nc", "é🦀 ", "a</s>b"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
    }
}

#[test]
fn damaged_scores_are_errors() {
    let key = "tokenizer.ggml.scores";
    let changed = |value: Value| build(sentence_piece_file().set(key, value)).unwrap_err();
    assert!(changed(Value::Array(Array::Floats(vec![0.0]))).contains("1 scores for 269 tokens"));
    assert!(changed(Value::Unsigned(1)).contains("not a list of numbers"));
    let mut writer = sentence_piece_file();
    writer.metadata.retain(|(known, _)| known != key);
    assert!(build(&writer).unwrap_err().contains("no metadata key tokenizer.ggml.scores"));
    writer.set(key, Value::Array(Array::Floats(vec![f64::NAN; 269])));
    build(&writer).unwrap();
    for bytes in mutations(&sentence_piece_file().bytes(), 2_000) {
        let Ok(gguf) = Gguf::parse(&bytes) else { continue };
        if let Ok(tokenizer) = tokenizer(&gguf, "m.gguf") {
            let _ = tokenizer.encode("<s>abc é</s>", true);
        }
    }
}

#[test]
fn damaged_vocabularies_are_errors() {
    let changed = |key: &str, value: Value| build(file("smollm").set(key, value)).unwrap_err();
    let texts =
        |items: &[&str]| Value::Array(Array::Strings(items.iter().map(|&item| item.to_owned()).collect()));
    let merges = "tokenizer.ggml.merges";
    assert!(changed(merges, texts(&["hello"])).contains("has no space"));
    assert!(changed(merges, texts(&["hello hello"])).contains("makes no token"));
    assert!(changed(merges, texts(&["h h"])).contains("cannot build the tokenizer"));
    assert!(changed("tokenizer.ggml.tokens", texts(&["a", "a"])).contains("appear twice"));
    let kinds = |kinds| Value::Array(Array::Signed(kinds));
    assert!(changed("tokenizer.ggml.token_type", kinds(vec![1])).contains("1 kinds for 266 tokens"));
    assert!(changed("tokenizer.ggml.token_type", kinds(vec![-1; 266])).contains("not a list of kinds"));
    assert!(changed("tokenizer.ggml.bos_token_id", Value::Unsigned(999)).contains("bos_token_id is 999"));
}

#[test]
fn configuration_comes_from_the_metadata() {
    let gguf = Gguf::parse(&file("smollm").bytes()).unwrap();
    let config = tokenizer_config(&gguf, "m.gguf").unwrap();
    assert_eq!(config.bos_token.as_deref(), Some("<s>"));
    assert_eq!(config.eos_token.as_deref(), Some("</s>"));
    assert_eq!(config.pad_token, None);
    assert_eq!(config.chat_template.as_deref(), Some("{{ messages }}"));
    assert_eq!(config.model_max_length, Some(77));
}

#[test]
fn random_mutations_never_panic() {
    let mut built = 0;
    for bytes in mutations(&file("llama-bpe").bytes(), 3_000) {
        let Ok(gguf) = Gguf::parse(&bytes) else { continue };
        // Errors are as good as results here: only a panic fails.
        let _ = tokenizer_config(&gguf, "m.gguf");
        if let Ok(tokenizer) = tokenizer(&gguf, "m.gguf") {
            built += 1;
            let _ = tokenizer.encode("<s>hello 123</s>", true);
        }
    }
    assert!(built > 10, "{built}");
}
