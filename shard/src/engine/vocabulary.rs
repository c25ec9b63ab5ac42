//! Between text and token ids.

use std::collections::HashSet;
use std::sync::OnceLock;

use hub::{Tokenizer, catch_panic};

/// Token ids in a message.
const MAX_IDS_SHOWN: usize = 8;

/// Makes the tokenizer for texts.
pub(crate) type MakeTokenizer = Box<dyn Fn() -> Result<Tokenizer, String> + Send>;

/// A model's tokenizer and what it says about single tokens.
pub struct Vocabulary {
    /// Turns tokens into text.
    tokenizer: Tokenizer,
    /// Turns text into tokens. Our router sends tokens, so it is made when somebody else's router sends a text.
    encoding: OnceLock<Result<Tokenizer, String>>,
    make_encoding: MakeTokenizer,
    special_ids: HashSet<u32>,
    eos_token_ids: Vec<u32>,
}

impl Vocabulary {
    /// `tokenizer` turns tokens into text, what `make_encoding` makes turns text into tokens; `eos_token_ids`: the tokens that
    /// end a text.
    pub fn new(tokenizer: Tokenizer, make_encoding: MakeTokenizer, eos_token_ids: Vec<u32>) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let special_ids = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        Self { tokenizer, encoding: OnceLock::new(), make_encoding, special_ids, eos_token_ids }
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// The tokenizer's own words, or why it could not be made.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let tokenizer = self.encoding.get_or_init(|| (self.make_encoding)());
        let tokenizer = tokenizer.as_ref().map_err(String::clone)?;
        let encode = || tokenizer.encode_fast(text, add_special_tokens).map_err(|error| error.to_string());
        // A damaged tokenizer.json makes the library panic only once it is used.
        let encoding = catch_panic(encode).flatten();
        let encoding = encoding.map_err(|error| format!("the prompt cannot be tokenized: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens; ids outside of the vocabulary have none.
    ///
    /// # Errors
    /// The tokenizer's own words.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        let decode = || self.tokenizer.decode(ids, skip_special_tokens).map_err(|error| error.to_string());
        catch_panic(decode).flatten().map_err(|error| {
            let last = &ids[ids.len().saturating_sub(MAX_IDS_SHOWN)..];
            format!("the {} tokens that end in {last:?} cannot be turned into text: {error}", ids.len())
        })
    }

    /// Whether a token is a mark such as the end of the text rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The tokens that end a text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_the_library_panic_is_an_error() {
        // It strips the same space from both sides, and chunks of no length from texts.
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"FixedLength","length":0},"post_processor":null,
            "decoder":{"type":"Strip","content":" ","start":1,"stop":1},
            "model":{"type":"WordLevel","vocab":{" ":0,"a":1},"unk_token":"a"}}"#;
        let read = move || hub::tokenizer_from_json(json.as_bytes()).map_err(|error| error.to_string());
        let vocabulary = Vocabulary::new(read().unwrap(), Box::new(read), vec![]);
        let error = vocabulary.decode(&[1, 0], false).unwrap_err();
        assert!(error.starts_with("the 2 tokens that end in [1, 0] cannot be turned into text: "), "{error}");
        assert_eq!(vocabulary.decode(&[1], false).unwrap(), "a");
        let error = vocabulary.encode("a", false).unwrap_err();
        assert_eq!(error, "the prompt cannot be tokenized: chunk size must be non-zero");
    }
}
