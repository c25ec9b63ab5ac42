//! SentencePiece's byte-pair model: tokens with scores.
//!
//! Of two neighbours those are joined first whose joint token has the best score. That is byte-pair encoding whose merges are
//! every way to cut a token into two others, best score first.

use std::collections::HashMap;

use tokenizers::NormalizerWrapper;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as Normalizers;

use super::{BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, broken, finish, kinds, token_table};
use crate::error::HubError;
use crate::gguf::{Array, Value};
use crate::gguf_config::MetadataReader;
use crate::tokenizer::{Bpe, BpeOptions, Tokenizer};

/// What stands for a space within tokens.
const SPACE: &str = "▁";
/// Tokens of more bytes are not made of others: trying every cut of one costs the square of its length.
const MAX_MERGED: usize = 512;

/// The tokenizer of a file of the kind `llama`.
pub(super) fn tokenizer(reader: &MetadataReader<'_>) -> Result<Tokenizer, HubError> {
    let tokens = reader.tokens()?;
    let kinds = kinds(reader, tokens.len())?.unwrap_or_else(|| vec![1; tokens.len()]);
    let scores = scores(reader, tokens.len())?;
    let merges = merges(tokens, &kinds, &scores);
    let unknown = reader.token_id("unknown")?.or_else(|| position(&kinds, UNKNOWN));
    let options = BpeOptions {
        unk_token: unknown.map(|id| tokens[id as usize].clone()),
        fuse_unk: true,
        byte_fallback: kinds.contains(&BYTE),
        ignore_merges: false,
    };
    let bpe = Bpe::new(token_table(reader, tokens)?, merges.into_iter(), &options);
    let wrong = |error| broken(reader, error);
    let mut tokenizer = Tokenizer::new(bpe.map_err(|problem| wrong(problem.into()))?.into());
    let has_prefix = reader.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(wrong);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if has_prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(replace(" ", SPACE)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(wrong)?;
    tokenizer.with_decoder(Some(Sequence::new(decoders)));
    finish(reader, &mut tokenizer, &[CONTROL, USER_DEFINED, UNKNOWN], true)?;
    Ok(tokenizer)
}

fn position(kinds: &[u64], wanted: u64) -> Option<u32> {
    kinds.iter().position(|&kind| kind == wanted).map(|id| id as u32)
}

/// One score per token; all equal where the file has none.
fn scores(reader: &MetadataReader<'_>, num_tokens: usize) -> Result<Vec<f64>, HubError> {
    let key = "tokenizer.ggml.scores";
    match reader.gguf.metadata.get(key) {
        Some(Value::Array(Array::Floats(scores))) if scores.len() == num_tokens => Ok(scores.clone()),
        Some(Value::Array(Array::Floats(scores))) => {
            Err(reader.wrong(format!("{key} has {} scores for {num_tokens} tokens", scores.len())))
        }
        Some(_) => Err(reader.wrong(format!("{key} is not a list of numbers"))),
        None => Err(reader.lacks(key)),
    }
}

/// Every way to cut a token into two others, the best score first. Of one score, the longer first part comes first, as the
/// converters have it.
fn merges<'a>(tokens: &'a [String], kinds: &[u64], scores: &[f64]) -> Vec<(&'a str, &'a str)> {
    let is_text = |id: usize| ![UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE].contains(&kinds[id]);
    let texts: HashMap<&str, usize> =
        (0..tokens.len()).filter(|&id| is_text(id)).map(|id| (tokens[id].as_str(), id)).collect();
    let longest = texts.keys().map(|text| text.len()).filter(|&length| length <= MAX_MERGED).max();
    let longest = longest.unwrap_or(0);
    let mut found: Vec<(f64, &'a str, &'a str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, token)| is_text(*id) && token.len() <= longest)
    {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if texts.contains_key(left) && texts.contains_key(right) {
                found.push((scores[id], left, right));
            }
        }
    }
    // A stable order of everything a file may hold, not-a-number included.
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())).then(b.2.len().cmp(&a.2.len())));
    found.into_iter().map(|(_, left, right)| (left, right)).collect()
}
