//! A tokenizer built from GGUF metadata.
//!
//! The model is built from vocabulary and merges directly; going through tokenizer.json's text would take
//! several times as long, and start-up waits for this.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use crate::error::HubError;
use crate::gguf::{Array, Gguf, Value, quote};
use crate::gguf_config::MetadataReader;
use crate::tokenizer_files::TokenizerConfig;

/// Values of `tokenizer.ggml.token_type`.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Words, numbers of up to three digits, punctuation and white space, as Llama 3 cuts text.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits, as Qwen 2 cuts text.
const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a family cuts text before byte-pair encoding.
struct PreTokenization {
    pre_tokenizer: PreTokenizerWrapper,
    normalizer: Option<NormalizerWrapper>,
    /// Whether a piece that is a token needs no merges to become it.
    ignore_merges: bool,
    /// Whether the family puts the BOS token first when the file does not say.
    add_bos: bool,
}

/// The tokenizer that `tokenizer.ggml.*` describes.
pub(crate) fn tokenizer(gguf: &Gguf, origin: &str) -> Result<Tokenizer, HubError> {
    let reader = MetadataReader { gguf, origin };
    match reader.str("tokenizer.ggml.model")? {
        Some("gpt2") => byte_pair_tokenizer(&reader),
        Some("llama") => Err(reader.unsupported(
            "tokenizer \"llama\" (SentencePiece)",
            "tokenizer \"gpt2\" (byte-level BPE) in GGUF files; use the model's safetensors for now",
        )),
        Some(other) => {
            Err(reader
                .unsupported(&format!("tokenizer {}", quote(other)), "tokenizer \"gpt2\" (byte-level BPE)"))
        }
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
    let broken = |error: tokenizers::Error| HubError::Tokenizer {
        origin: reader.origin.to_owned(),
        problem: error.to_string(),
    };
    let vocab: Vocab = tokens.iter().cloned().zip(0_u32..).collect();
    if vocab.len() != tokens.len() {
        let problem = format!("{} of {} tokens appear twice", tokens.len() - vocab.len(), tokens.len());
        return Err(reader.wrong(problem));
    }
    let merges = merges(reader, &vocab)?;
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(family.ignore_merges)
        .build()
        .map_err(broken)?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_normalizer(family.normalizer).map_err(broken)?;
    tokenizer.with_pre_tokenizer(Some(family.pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
    tokenizer.add_tokens(added_tokens(reader, tokens)?).map_err(broken)?;
    if let Some(template) = special_token_template(reader, tokens, family.add_bos)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

/// The merges, each checked: the library's builder trusts that a merge's result is no longer than any token.
fn merges(reader: &MetadataReader<'_>, vocab: &Vocab) -> Result<Vec<(String, String)>, HubError> {
    let lines =
        reader.strings("tokenizer.ggml.merges")?.ok_or_else(|| reader.lacks("tokenizer.ggml.merges"))?;
    let longest = vocab.keys().map(String::len).max().unwrap_or_default();
    let merge = |line: &String| match line.split_once(' ') {
        Some((left, right)) if left.len() + right.len() <= longest => Ok((left.to_owned(), right.to_owned())),
        Some(_) => Err(reader.wrong(format!("merge {} makes no token", quote(line)))),
        None => Err(reader.wrong(format!("merge {} has no space", quote(line)))),
    };
    lines.iter().map(merge).collect()
}

/// The tokens that are found in text before anything else, in order of their ids.
fn added_tokens(reader: &MetadataReader<'_>, tokens: &[String]) -> Result<Vec<AddedToken>, HubError> {
    let key = "tokenizer.ggml.token_type";
    let kinds = match reader.gguf.metadata.get(key) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list @ (Array::Unsigned(_) | Array::Signed(_)))) => list.to_u64s(),
        Some(_) => None,
    };
    let kinds = kinds
        .ok_or_else(|| reader.wrong(format!("{key} is not a list of kinds, expected integers from 0")))?;
    if kinds.len() != tokens.len() {
        return Err(reader.wrong(format!("{key} has {} kinds for {} tokens", kinds.len(), tokens.len())));
    }
    let added = tokens.iter().zip(kinds).filter(|(_, kind)| [CONTROL, USER_DEFINED].contains(kind));
    Ok(added
        .map(|(token, kind)| AddedToken::from(token.as_str(), kind == CONTROL).normalized(false))
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

/// How text is cut, by the name llama.cpp gave the family's way.
fn pre_tokenization(reader: &MetadataReader<'_>) -> Result<PreTokenization, HubError> {
    let byte_level = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
    let sequence = |first: PreTokenizerWrapper, use_regex| {
        PreTokenizerWrapper::from(Sequence::new(vec![first, byte_level(use_regex)]))
    };
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|error| reader.wrong(error.to_string()))
    };
    let plain = |pre_tokenizer| PreTokenization {
        pre_tokenizer,
        normalizer: None,
        ignore_merges: false,
        add_bos: false,
    };
    let name = reader.str("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!("{}: it has no tokenizer.ggml.pre; text is cut as for GPT-2", reader.origin);
        "default"
    });
    match name {
        "default" | "gpt-2" | "phi-2" => Ok(plain(byte_level(true))),
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            Ok(plain(sequence(PreTokenizerWrapper::from(Digits::new(true)), true)))
        }
        "llama-bpe" | "llama3" | "llama-v3" => Ok(PreTokenization {
            ignore_merges: true,
            add_bos: true,
            ..plain(sequence(split(LLAMA3_PATTERN)?, false))
        }),
        "qwen2" | "deepseek-r1-qwen" => Ok(PreTokenization {
            normalizer: Some(NormalizerWrapper::from(NFC)),
            ..plain(sequence(split(QWEN2_PATTERN)?, false))
        }),
        other => Err(reader.unsupported(
            &format!("tokenizer.ggml.pre {}", quote(other)),
            "default, gpt-2, phi-2, smollm, starcoder, refact, codeshell, llama-bpe, llama3, llama-v3, qwen2, \
             deepseek-r1-qwen",
        )),
    }
}

#[cfg(test)]
#[path = "gguf_tokenizer_tests.rs"]
mod tests;
