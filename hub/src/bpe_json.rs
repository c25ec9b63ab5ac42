//! A quicker way to read a `tokenizer.json` whose model is BPE.
//!
//! The library keeps what it reads of a model in a general form first, because it does not know yet which kind it is: for a
//! vocabulary of 262,144 tokens that takes more than a second and 300 MB. Here the kind is known, and only the model is read
//! differently; all else is the library's. Whatever is unusual is left to the library, its message included.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Error, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token, Tokenizer,
    TokenizerImpl,
};

/// A whole tokenizer; none: the library is to read it.
pub(crate) fn read(text: &[u8]) -> Option<Tokenizer> {
    parse::<Merges>(text)
}

/// A tokenizer that turns tokens into text but not text into tokens; none: the library is to read it.
pub(crate) fn read_for_decoding(text: &[u8]) -> Option<Tokenizer> {
    parse::<NoMerges>(text)
}

fn parse<M>(text: &[u8]) -> Option<Tokenizer>
where
    M: Into<Merges> + for<'de> Deserialize<'de>,
{
    type Parts<M> =
        TokenizerImpl<Lean<M>, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;
    serde_json::from_slice::<Parts<M>>(text).ok().map(Tokenizer::from)
}

/// The pairs that are merged, the first one first.
#[derive(Default)]
struct Merges(Vec<(String, String)>);

/// The same, passed over.
struct NoMerges;

impl From<NoMerges> for Merges {
    fn from(NoMerges: NoMerges) -> Self {
        Self::default()
    }
}

impl<'de> Deserialize<'de> for NoMerges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| NoMerges)
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pairs = Vec::<Pair>::deserialize(deserializer)?;
        Ok(Merges(pairs.into_iter().map(|Pair(first, second)| (first, second)).collect()))
    }
}

/// `"a b"` or `["a", "b"]`.
struct Pair(String, String);

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PairVisitor)
    }
}

struct PairVisitor;

impl<'de> Visitor<'de> for PairVisitor {
    type Value = Pair;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Pair, E> {
        match text.split_once(' ') {
            Some((first, second)) if !second.contains(' ') => Ok(Pair(first.to_owned(), second.to_owned())),
            _ => Err(E::custom("a merge is not two tokens")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Pair, A::Error> {
        match (parts.next_element()?, parts.next_element()?, parts.next_element::<IgnoredAny>()?) {
            (Some(first), Some(second), None) => Ok(Pair(first, second)),
            _ => Err(A::Error::custom("a merge is not two tokens")),
        }
    }
}

/// The fields of a BPE model.
#[derive(Deserialize)]
struct Fields<M> {
    #[serde(rename = "type")]
    _kind: Kind,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: M,
}

#[derive(Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    Bpe,
}

/// A model while its tokenizer is being read.
struct Lean<M>(BPE, std::marker::PhantomData<M>);

impl<'de, M: Into<Merges> + Deserialize<'de>> Deserialize<'de> for Lean<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Fields::<M>::deserialize(deserializer)?;
        let mut builder = BPE::builder().vocab_and_merges(fields.vocab, fields.merges.into().0);
        if let Some(dropout) = fields.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = fields.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = fields.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = fields.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        let model = builder
            .fuse_unk(fields.fuse_unk.unwrap_or_default())
            .byte_fallback(fields.byte_fallback.unwrap_or_default())
            .ignore_merges(fields.ignore_merges.unwrap_or_default())
            .build();
        Ok(Lean(model.map_err(D::Error::custom)?, std::marker::PhantomData))
    }
}

impl<M> From<Lean<M>> for ModelWrapper {
    fn from(model: Lean<M>) -> Self {
        ModelWrapper::BPE(model.0)
    }
}

/// The library asks for the vocabulary while it adds the special tokens.
impl<M> Model for Lean<M> {
    type Trainer = <BPE as Model>::Trainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> Self::Trainer {
        self.0.get_trainer()
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use serde_json::{Value, json};

    use super::*;

    fn tokenizer(merges: &Value) -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [
                {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true},
                {"id": 6, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true}
            ],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null,
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                      "byte_fallback": false, "ignore_merges": false,
                      "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5},
                      "merges": merges}
        })
    }

    #[test]
    fn it_is_the_librarys_tokenizer() {
        for merges in [json!(["a b", "ab c"]), json!([["a", "b"], ["ab", "c"]])] {
            let text = tokenizer(&merges).to_string();
            let (ours, theirs) = (read(text.as_bytes()).unwrap(), Tokenizer::from_str(&text).unwrap());
            assert_eq!(ours.to_string(false).unwrap(), theirs.to_string(false).unwrap());
            for prompt in ["abc ABab <end>x", "", "cab"] {
                let ids = |tokenizer: &Tokenizer| tokenizer.encode(prompt, true).unwrap().get_ids().to_vec();
                assert_eq!(ids(&ours), ids(&theirs), "{prompt}");
            }
        }
    }

    #[test]
    fn without_merges_it_decodes_as_before() {
        let text = tokenizer(&json!(["a b", "ab c"])).to_string();
        let (ours, theirs) =
            (read_for_decoding(text.as_bytes()).unwrap(), Tokenizer::from_str(&text).unwrap());
        let ids = [5, 4, 6, 0, 3, 99];
        for skip in [false, true] {
            assert_eq!(ours.decode(&ids, skip).unwrap(), theirs.decode(&ids, skip).unwrap());
        }
        assert_eq!(ours.token_to_id("<end>"), Some(6));
    }

    #[test]
    fn what_is_unusual_is_left_to_the_library() {
        assert!(read(tokenizer(&json!(["a b c"])).to_string().as_bytes()).is_none());
        assert!(read(tokenizer(&json!(["a x"])).to_string().as_bytes()).is_none());
        let mut other = tokenizer(&json!([]));
        other["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        assert!(read(other.to_string().as_bytes()).is_none());
        assert!(Tokenizer::from_str(&other.to_string()).is_ok());
        assert!(read(b"{").is_none());
    }
}
