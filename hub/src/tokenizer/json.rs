//! Reading a `tokenizer.json`.
//!
//! The library keeps what it reads of a model in a general form first, because it does not know yet which kind it is: for a
//! vocabulary of 262,144 tokens that takes more than a second and 300 MB. Here byte pair encodings are read at once into
//! what they become. Whatever is unusual is left to the library, its message included.

use std::fmt;

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder, TruncationParams,
};

use super::{Bpe, BpeOptions, TokenTable, Tokenizer, from_library};

/// The tokenizer that the text of a `tokenizer.json` describes.
///
/// # Errors
/// The library's words.
pub fn tokenizer_from_json(text: &[u8]) -> tokenizers::Result<Tokenizer> {
    read_with::<Merges>(text)
}

/// The same, good only to turn tokens into text: a byte pair encoding's merges are passed over.
///
/// # Errors
/// The library's words.
pub(crate) fn decoding_tokenizer_from_json(text: &[u8]) -> tokenizers::Result<Tokenizer> {
    read_with::<NoMerges>(text)
}

fn read_with<'de, M: Into<Merges> + Deserialize<'de>>(text: &'de [u8]) -> tokenizers::Result<Tokenizer> {
    match parse::<M>(text) {
        Some(tokenizer) => Ok(tokenizer),
        None => from_library(tokenizers::Tokenizer::from_bytes(text)?),
    }
}

/// None: the library is to read it.
fn parse<'de, M: Into<Merges> + Deserialize<'de>>(text: &'de [u8]) -> Option<Tokenizer> {
    let file: File<M> = serde_json::from_slice(text).ok()?;
    if file.version.is_some_and(|version| version != "1.0") || !file.model.is_plain() {
        return None;
    }
    let model = file.model;
    let merges: Merges = model.merges.into();
    let options = BpeOptions {
        unk_token: model.unk_token,
        fuse_unk: model.fuse_unk.unwrap_or_default(),
        byte_fallback: model.byte_fallback.unwrap_or_default(),
        ignore_merges: model.ignore_merges.unwrap_or_default(),
    };
    let bpe = Bpe::new(model.vocab.table()?, merges.pairs(), &options).ok()?;
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(bpe.into())
        .with_normalizer(file.normalizer)
        .with_pre_tokenizer(file.pre_tokenizer)
        .with_post_processor(file.post_processor)
        .with_decoder(file.decoder)
        .with_truncation(file.truncation)
        .with_padding(file.padding)
        .build()
        .ok()?;
    tokenizer.add_tokens(file.added_tokens.into_iter().map(Added::into_token)).ok()?;
    Some(tokenizer)
}

/// A `tokenizer.json`.
#[derive(Deserialize)]
struct File<M> {
    version: Option<String>,
    truncation: Option<TruncationParams>,
    padding: Option<PaddingParams>,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: Model<M>,
}

/// An added token; the library numbers them itself.
#[derive(Deserialize)]
struct Added {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl Added {
    fn into_token(self) -> AddedToken {
        AddedToken {
            content: self.content,
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized,
            special: self.special,
        }
    }
}

/// The fields of a BPE model.
#[derive(Deserialize)]
struct Model<M> {
    #[serde(rename = "type")]
    _kind: BpeOnly,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocabulary,
    merges: M,
}

impl<M> Model<M> {
    /// Nothing is random and words are as they are written.
    fn is_plain(&self) -> bool {
        let is_empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
        self.dropout.is_none_or(|dropout| dropout == 0.0)
            && is_empty(&self.continuing_subword_prefix)
            && is_empty(&self.end_of_word_suffix)
    }
}

#[derive(Deserialize)]
enum BpeOnly {
    #[serde(rename = "BPE")]
    Bpe,
}

/// Tokens in the order of the file: their texts one after the other; of each its id and where its text ends.
struct Vocabulary {
    texts: String,
    entries: Vec<(u32, u32)>,
}

impl Vocabulary {
    fn table(self) -> Option<TokenTable> {
        TokenTable::new(self.texts, &self.entries)
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(VocabularyVisitor)
    }
}

struct VocabularyVisitor;

impl<'de> Visitor<'de> for VocabularyVisitor {
    type Value = Vocabulary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ids by token")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
        let mut vocabulary = Vocabulary { texts: String::new(), entries: Vec::new() };
        while map.next_key_seed(Append(&mut vocabulary.texts))?.is_some() {
            let end = u32::try_from(vocabulary.texts.len()).map_err(A::Error::custom)?;
            vocabulary.entries.push((map.next_value()?, end));
        }
        Ok(vocabulary)
    }
}

/// Reads a text to the end of another.
struct Append<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

/// The pairs that are merged, the first one first: their texts one after the other, and of each pair where its two texts end.
/// There are often twice as many as tokens, so that texts of their own would take more memory than the file.
#[derive(Default)]
struct Merges {
    texts: String,
    ends: Vec<(u32, u32)>,
}

impl Merges {
    /// The pairs.
    fn pairs(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        let mut start = 0;
        self.ends.iter().map(move |&(middle, end)| {
            let (left, right) =
                (&self.texts[start..middle as usize], &self.texts[middle as usize..end as usize]);
            start = end as usize;
            (left, right)
        })
    }

    /// Where the texts end by now.
    fn end<E: Error>(&self) -> Result<u32, E> {
        u32::try_from(self.texts.len()).map_err(E::custom)
    }
}

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
        deserializer.deserialize_seq(MergesVisitor)
    }
}

struct MergesVisitor;

impl<'de> Visitor<'de> for MergesVisitor {
    type Value = Merges;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<Merges, A::Error> {
        let mut merges = Merges::default();
        while pairs.next_element_seed(AppendPair(&mut merges))?.is_some() {}
        Ok(merges)
    }
}

/// Reads `"a b"` or `["a", "b"]` to the end of the others.
struct AppendPair<'a>(&'a mut Merges);

impl<'de> DeserializeSeed<'de> for AppendPair<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The only space of a merge is between its tokens.
fn split(text: &str) -> Option<(&str, &str)> {
    text.split_once(' ').filter(|(_, right)| !right.contains(' '))
}

impl<'de> Visitor<'de> for AppendPair<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let merges = self.0;
        let (left, right) = split(text).ok_or_else(|| E::custom("a merge is not two tokens"))?;
        merges.texts.push_str(left);
        let middle = merges.end()?;
        merges.texts.push_str(right);
        merges.ends.push((middle, merges.end()?));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<(), A::Error> {
        let merges = self.0;
        let wrong = || A::Error::custom("a merge is not two tokens");
        parts.next_element_seed(Append(&mut merges.texts))?.ok_or_else(wrong)?;
        let middle = merges.end()?;
        parts.next_element_seed(Append(&mut merges.texts))?.ok_or_else(wrong)?;
        if parts.next_element::<IgnoredAny>()?.is_some() {
            return Err(wrong());
        }
        merges.ends.push((middle, merges.end()?));
        Ok(())
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
