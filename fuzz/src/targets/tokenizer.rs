//! A `tokenizer.json`, read whole and for decoding only, and used as shard and router use it.

use std::sync::{Arc, LazyLock};

use hub::{ModelFiles, Tokenizer, catch_panic};
use router::tokenization::Tokenization;
use shard::engine::Vocabulary;
use tokio::runtime::{Builder, Runtime};

use super::loading;
use crate::message::check_line;
use crate::scratch::Scratch;

/// What people may write.
const TEXTS: [&str; 4] =
    ["", "Hello  wörld\n\t123<s> é🦀</s>", "<unk>ab c\u{0}\u{301}", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa"];
/// What a model may generate.
const IDS: [&[u32]; 4] =
    [&[], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255, 256], &[3, 3, u32::MAX, 1 << 20], &[7]];

static MODEL: LazyLock<Scratch> = LazyLock::new(|| {
    Scratch::with(&[
        ("config.json", loading::CONFIG.as_bytes()),
        ("model.safetensors", b""),
        ("tokenizer.json", b""),
    ])
});

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("an event loop"));

/// Reads the tokenizer and uses it.
pub fn run(input: &[u8]) {
    MODEL.write("tokenizer.json", input);
    let Some(files) = loading::locate(MODEL.path()) else { return };
    use_tokenizer_of(&files);
    check_against_library(&files, input);
}

/// Encodes and decodes as shard and router do.
pub(super) fn use_tokenizer_of(files: &ModelFiles) {
    let decoding = match files.decoding_tokenizer() {
        Ok(tokenizer) => tokenizer,
        Err(error) => return check_line(&error),
    };
    if let Err(error) = files.check_vocabulary(&decoding) {
        check_line(&error);
    }
    let encoding = files.clone();
    let make_encoding = move || encoding.tokenizer().map_err(|error| error.to_string());
    let vocabulary = Vocabulary::new(decoding, Box::new(make_encoding), vec![]);
    for ids in IDS {
        for skip_special_tokens in [false, true] {
            let _ = vocabulary.decode(ids, skip_special_tokens).inspect_err(|error| check_line(error));
        }
        let _ = ids.iter().filter(|&&id| vocabulary.is_special(id)).count();
    }
    for text in TEXTS {
        let ids = vocabulary.encode(text, true).inspect_err(|error| check_line(error));
        let _ = ids.and_then(|ids| vocabulary.decode(&ids, false)).inspect_err(|error| check_line(error));
    }
    match files.tokenizer() {
        Ok(tokenizer) => serve(tokenizer),
        Err(error) => check_line(&error),
    }
}

/// The router's way.
fn serve(tokenizer: Tokenizer) {
    let tokenization = Tokenization::start(Arc::new(tokenizer), 1).expect("a thread");
    RUNTIME.block_on(async {
        for text in TEXTS {
            let encoded = tokenization.encode(text.to_owned(), true, Some(5)).await;
            let _ =
                encoded.inspect_err(|error| check_line(error)).inspect(|(_, ids)| assert!(ids.len() <= 5));
            let tokens = tokenization.tokenize(text.to_owned(), false).await;
            let _ = tokens.inspect_err(|error| check_line(error));
        }
        // Whatever happened, the thread is still there for others.
        let last = tokenization.encode(String::new(), false, None).await;
        let has_ended = last.is_err_and(|error| error.to_string().contains("thread has ended"));
        assert!(!has_ended, "the tokenizer thread has ended");
    });
}

/// Our own byte pair encodings must cut words as the library's do.
fn check_against_library(files: &ModelFiles, input: &[u8]) {
    // Dropout leaves merges out at random.
    if !String::from_utf8_lossy(input).contains("\"dropout\":null") {
        return;
    }
    let Ok(ours) = files.tokenizer() else { return };
    let Ok(theirs) = catch_panic(|| tokenizers::Tokenizer::from_bytes(input)) else { return };
    // It refuses some things that do not matter, such as an added token's number, which it makes itself.
    let Ok(mut theirs) = theirs else { return };
    // Ours leaves out what would change prompts.
    theirs.with_padding(None);
    let _ = theirs.with_truncation(None);
    for text in TEXTS {
        let encoded = catch_panic(|| ours.encode_fast(text, true)).ok().and_then(Result::ok);
        let expected = catch_panic(|| theirs.encode_fast(text, true)).ok().and_then(Result::ok);
        if let (Some(encoded), Some(expected)) = (encoded, expected) {
            assert_eq!(encoded.get_ids(), expected.get_ids(), "{text:?}");
        }
    }
}
