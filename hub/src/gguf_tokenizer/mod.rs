//! A tokenizer built from GGUF metadata.
//!
//! The model is built from vocabulary and merges directly; going through tokenizer.json's text would take
//! several times as long, and start-up waits for this.

mod pre_tokenization;
mod sentence_piece;

use std::collections::HashSet;

use pre_tokenization::pre_tokenization;
use tokenizers::AddedToken;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

use crate::config::one_line;
use crate::error::HubError;
use crate::gguf::{Array, Gguf, Value, quote};
use crate::gguf_config::MetadataReader;
use crate::tokenizer::{Bpe, BpeOptions, TokenTable, Tokenizer};
use crate::tokenizer_files::TokenizerConfig;

/// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// What is read, for messages.
const SUPPORTED: &str = "tokenizers \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece)";

/// The tokenizer that `tokenizer.ggml.*` describes.
pub(crate) fn tokenizer(gguf: &Gguf, origin: &str) -> Result<Tokenizer, HubError> {
    let reader = MetadataReader { gguf, origin };
    match reader.str("tokenizer.ggml.model")? {
        Some("gpt2") => byte_pair_tokenizer(&reader),
        Some("llama") => sentence_piece::tokenizer(&reader),
        Some(other) => Err(reader.unsupported(&format!("tokenizer {}", quote(other)), SUPPORTED)),
        None => Err(reader.lacks("tokenizer.ggml.model")),
    }
}

/// Special tokens, template and limits from the metadata.
pub(crate) fn tokenizer_config(gguf: &Gguf, origin: &str) -> Result<TokenizerConfig, HubError> {
    let reader = MetadataReader { gguf, origin };
    let tokens = reader.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let token = |name: &str| Ok(reader.token_id(name)?.and_then(|id| tokens.get(id as usize).cloned()));
    let chat_template = reader.str("tokenizer.chat_template")?.map(str::to_owned);
    let mut named_chat_templates: Vec<_> =
        chat_template.iter().map(|template| ("default".to_owned(), template.clone())).collect();
    for name in reader.strings("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(template) = reader.str(&format!("tokenizer.chat_template.{name}"))? {
            named_chat_templates.push((name.clone(), template.to_owned()));
        }
    }
    let model_max_length = match reader.str("general.architecture")? {
        Some(architecture) => reader.u64(&format!("{architecture}.context_length"))?,
        None => None,
    };
    Ok(TokenizerConfig {
        bos_token: token("bos")?,
        eos_token: token("eos")?,
        unk_token: token("unknown")?,
        pad_token: token("padding")?,
        chat_template,
        named_chat_templates,
        model_max_length,
        add_bos_token: reader.bool("tokenizer.ggml.add_bos_token")?,
        add_eos_token: reader.bool("tokenizer.ggml.add_eos_token")?,
        tokenizer_class: Some("PreTrainedTokenizerFast".to_owned()),
    })
}

fn byte_pair_tokenizer(reader: &MetadataReader<'_>) -> Result<Tokenizer, HubError> {
    let tokens = reader.tokens()?;
    let family = pre_tokenization(reader)?;
    let wrong = |error| broken(reader, error);
    let merges = merges(reader)?;
    let options = BpeOptions { ignore_merges: family.ignore_merges, ..BpeOptions::default() };
    let bpe = Bpe::new(token_table(reader, tokens)?, merges.into_iter(), &options);
    let bpe = bpe.map_err(|problem| broken(reader, problem.into()))?;
    let mut tokenizer = Tokenizer::new(bpe.into());
    tokenizer.with_normalizer(family.normalizer).map_err(wrong)?;
    tokenizer.with_pre_tokenizer(Some(family.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
    finish(reader, &mut tokenizer, &[CONTROL, USER_DEFINED], family.add_bos)?;
    Ok(tokenizer)
}

fn broken(reader: &MetadataReader<'_>, error: tokenizers::Error) -> HubError {
    HubError::Tokenizer { origin: reader.origin.to_owned(), problem: one_line(&error.to_string()) }
}

/// The tokens by id and by text.
fn token_table(reader: &MetadataReader<'_>, tokens: &[String]) -> Result<TokenTable, HubError> {
    let mut end = 0;
    let entries: Vec<(u32, u32)> = (0..)
        .zip(tokens)
        .map(|(id, token)| {
            end += token.len() as u32;
            (id, end)
        })
        .collect();
    TokenTable::new(tokens.concat(), &entries).ok_or_else(|| {
        let different = tokens.iter().collect::<HashSet<_>>().len();
        reader.wrong(format!("{} of {} tokens appear twice", tokens.len() - different, tokens.len()))
    })
}

/// Adds the tokens of `added_kinds`, and what goes before and after a text.
fn finish(
    reader: &MetadataReader<'_>,
    tokenizer: &mut Tokenizer,
    added_kinds: &[u64],
    family_adds_bos: bool,
) -> Result<(), HubError> {
    let tokens = reader.tokens()?;
    let added = added_tokens(reader, tokens, added_kinds)?;
    tokenizer.add_tokens(added).map_err(|error| broken(reader, error))?;
    if let Some(template) = special_token_template(reader, tokens, family_adds_bos)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(())
}

/// The two tokens of each merge.
fn merges<'a>(reader: &MetadataReader<'a>) -> Result<Vec<(&'a str, &'a str)>, HubError> {
    let lines =
        reader.strings("tokenizer.ggml.merges")?.ok_or_else(|| reader.lacks("tokenizer.ggml.merges"))?;
    let merge = |line: &'a String| {
        line.split_once(' ').ok_or_else(|| reader.wrong(format!("merge {} has no space", quote(line))))
    };
    lines.iter().map(merge).collect()
}

/// The kind of each token; none where the file does not say.
fn kinds(reader: &MetadataReader<'_>, num_tokens: usize) -> Result<Option<Vec<u64>>, HubError> {
    let key = "tokenizer.ggml.token_type";
    let kinds = match reader.gguf.metadata.get(key) {
        None => return Ok(None),
        Some(Value::Array(list @ (Array::Unsigned(_) | Array::Signed(_)))) => list.to_u64s(),
        Some(_) => None,
    };
    let kinds = kinds
        .ok_or_else(|| reader.wrong(format!("{key} is not a list of kinds, expected integers from 0")))?;
    if kinds.len() != num_tokens {
        return Err(reader.wrong(format!("{key} has {} kinds for {num_tokens} tokens", kinds.len())));
    }
    Ok(Some(kinds))
}

/// The tokens that are found in text before anything else, in order of their ids.
fn added_tokens(
    reader: &MetadataReader<'_>,
    tokens: &[String],
    added_kinds: &[u64],
) -> Result<Vec<AddedToken>, HubError> {
    let kinds = kinds(reader, tokens.len())?.unwrap_or_default();
    let added = tokens.iter().zip(kinds).filter(|(_, kind)| added_kinds.contains(kind));
    Ok(added
        .map(|(token, kind)| AddedToken::from(token.as_str(), kind != USER_DEFINED).normalized(false))
        .collect())
}

/// Puts BOS first and EOS last where the file, or its family, wants that.
fn special_token_template(
    reader: &MetadataReader<'_>,
    tokens: &[String],
    family_adds_bos: bool,
) -> Result<Option<TemplateProcessing>, HubError> {
    let broken = |problem: String| HubError::Tokenizer { origin: reader.origin.to_owned(), problem };
    // In the template a token goes by the name of its role: its text could be mistaken for template syntax.
    let special = |name: &str, wanted: bool| match (wanted, reader.token_id(name)?) {
        (true, Some(id)) => SpecialToken::new(name.to_owned(), vec![id], vec![tokens[id as usize].clone()])
            .map(|token| vec![token])
            .map_err(|error| broken(error.to_string())),
        (true, None) => Err(reader.lacks(&format!("tokenizer.ggml.{name}_token_id"))),
        (false, _) => Ok(Vec::new()),
    };
    let bos = special("bos", reader.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(family_adds_bos))?;
    let eos = special("eos", reader.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false))?;
    if bos.is_empty() && eos.is_empty() {
        return Ok(None);
    }
    let around = |text: &'static str| {
        let bos = (!bos.is_empty()).then_some("bos");
        let eos = (!eos.is_empty()).then_some("eos");
        bos.into_iter().chain([text]).chain(eos).collect::<Vec<_>>()
    };
    let pair = [around("$A"), around("$B:1")].concat();
    let template = TemplateProcessing::builder()
        .try_single(around("$A"))
        .and_then(|builder| builder.try_pair(pair))
        .map_err(broken)?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()
        .map_err(|error| broken(error.to_string()))?;
    Ok(Some(template))
}

#[cfg(test)]
mod tests;
