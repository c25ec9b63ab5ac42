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
fn unsupported_kinds_are_named() {
    let error = build(&file("tekken")).unwrap_err();
    assert!(
        error.contains("tokenizer.ggml.pre \"tekken\" is not supported; supported are default"),
        "{error}"
    );
    let mut writer = file("smollm");
    writer.text("tokenizer.ggml.model", "llama");
    assert!(build(&writer).unwrap_err().contains("SentencePiece"));
    writer.text("tokenizer.ggml.model", "rwkv");
    assert!(build(&writer).unwrap_err().contains("tokenizer \"rwkv\""));
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
