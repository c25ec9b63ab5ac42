//! GGUF metadata in the spelling of `config.json`.

mod architectures;
mod classic;
mod mixtures;
mod rope_scaling;

use crate::config::ModelConfig;
use crate::error::HubError;
use crate::generation_config::GenerationConfig;
use crate::gguf::{Gguf, GgufError, Value};

/// Tokens that end a turn of a chat, where the file names none.
const TURN_ENDS: [&str; 5] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>"];

/// The configuration a `config.json` beside the original weights would hold; `bytes` is the whole file.
pub(crate) fn model_config(gguf: &Gguf, bytes: &[u8], origin: &str) -> Result<ModelConfig, HubError> {
    let reader = MetadataReader { gguf, origin };
    let architecture =
        reader.str("general.architecture")?.ok_or_else(|| reader.lacks("general.architecture"))?;
    if reader.u64("split.count")?.is_some_and(|count| count > 1) {
        return Err(
            reader.unsupported("a file split into parts", "one whole file: merge the parts with gguf-split")
        );
    }
    architectures::config(&reader, architecture, bytes).map(ModelConfig::new)
}

/// The tokens that end a text: end of sequence, and end of turn or message where those are others.
pub(crate) fn generation_config(gguf: &Gguf, origin: &str) -> Result<GenerationConfig, HubError> {
    let reader = MetadataReader { gguf, origin };
    let id = |name: &str| reader.token_id(name);
    let mut eos_token_ids = Vec::new();
    let turn_end = match id("eot")? {
        None if reader.gguf.metadata.contains_key("tokenizer.chat_template") => {
            let tokens = reader.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
            let found = TURN_ENDS.iter().find_map(|end| tokens.iter().position(|token| token == end));
            found.map(|id| id as u32)
        }
        known => known,
    };
    for token in [id("eos")?, turn_end, id("eom")?].into_iter().flatten() {
        if !eos_token_ids.contains(&token) {
            eos_token_ids.push(token);
        }
    }
    Ok(GenerationConfig { eos_token_ids, bos_token_id: id("bos")?, pad_token_id: id("padding")? })
}

/// Typed metadata with errors that name the file.
pub(crate) struct MetadataReader<'a> {
    pub(crate) gguf: &'a Gguf,
    pub(crate) origin: &'a str,
}

impl<'a> MetadataReader<'a> {
    pub(crate) fn wrong(&self, problem: impl Into<String>) -> HubError {
        HubError::Gguf { origin: self.origin.to_owned(), problem: problem.into() }
    }

    pub(crate) fn lacks(&self, key: &str) -> HubError {
        self.wrong(format!("it has no metadata key {key}"))
    }

    pub(crate) fn unsupported(&self, found: &str, supported: &str) -> HubError {
        HubError::UnsupportedGguf {
            origin: self.origin.to_owned(),
            found: found.to_owned(),
            supported: supported.to_owned(),
        }
    }

    fn read<T>(&self, result: Result<T, GgufError>) -> Result<T, HubError> {
        result.map_err(|error| self.wrong(error.0))
    }

    pub(crate) fn u64(&self, key: &str) -> Result<Option<u64>, HubError> {
        self.read(self.gguf.u64(key))
    }

    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>, HubError> {
        self.read(self.gguf.f64(key))
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, HubError> {
        self.read(self.gguf.bool(key))
    }

    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>, HubError> {
        self.read(self.gguf.str(key))
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<&'a [String]>, HubError> {
        self.read(self.gguf.strings(key))
    }

    pub(crate) fn tokens(&self) -> Result<&'a [String], HubError> {
        self.strings("tokenizer.ggml.tokens")?.ok_or_else(|| self.lacks("tokenizer.ggml.tokens"))
    }

    /// A size that must be there and must not be zero.
    pub(super) fn size(&self, key: &str) -> Result<u64, HubError> {
        match self.u64(key)? {
            Some(0) => Err(self.wrong(format!("{key} is 0, expected at least 1"))),
            Some(n) => Ok(n),
            None => Err(self.lacks(key)),
        }
    }

    /// A size per layer that must be the same in all of them; written once or as a list.
    pub(super) fn uniform_size(&self, key: &str) -> Result<Option<u64>, HubError> {
        let Some(Value::Array(list)) = self.gguf.metadata.get(key) else { return self.u64(key) };
        let sizes = list.to_u64s().unwrap_or_default();
        match sizes.as_slice() {
            [first, rest @ ..] if rest.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => {
                Err(self
                    .unsupported(&format!("{key} that differs between layers"), "one value for all layers"))
            }
        }
    }

    /// The id of a special token such as `eos`, checked against the vocabulary.
    pub(crate) fn token_id(&self, name: &str) -> Result<Option<u32>, HubError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.u64(&key)? else { return Ok(None) };
        let num_tokens = self.strings("tokenizer.ggml.tokens")?.map_or(0, <[String]>::len);
        match u32::try_from(id) {
            // Some converters write -1 as 32 bits where there is no such token.
            Ok(u32::MAX) => Ok(None),
            Ok(id) if (id as usize) < num_tokens => Ok(Some(id)),
            _ => Err(self.wrong(format!("{key} is {id}, but there are {num_tokens} tokens"))),
        }
    }
}

#[cfg(test)]
mod tests;
