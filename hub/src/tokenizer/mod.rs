//! The tokenizer of a model, however its vocabulary is kept.
//!
//! Everything around the model (normalizers, pre-tokenizers, decoders, added tokens) is the library's. Byte pair encodings, which
//! have the large vocabularies, are ours, because start-up waits for them; all other kinds are the library's.

mod bpe;
mod json;
mod token_table;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use tokenizers::models::ModelWrapper;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerBuilder, TokenizerImpl,
};

pub(crate) use bpe::{Bpe, BpeOptions};
pub(crate) use json::decoding_tokenizer_from_json;
pub use json::tokenizer_from_json;
pub(crate) use token_table::TokenTable;

/// A whole tokenizer: between text and token ids.
pub type Tokenizer =
    TokenizerImpl<TokenModel, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// What cuts words into tokens.
pub struct TokenModel(Kind);

enum Kind {
    Bpe(Bpe),
    Library(ModelWrapper),
}

impl TokenModel {
    /// The largest id of the vocabulary, added tokens aside.
    pub fn largest_id(&self) -> Option<u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokens().largest_id(),
            Kind::Library(model) => model.get_vocab().into_values().max(),
        }
    }
}

/// Vocabularies are too long to be shown.
impl fmt::Debug for TokenModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if matches!(self.0, Kind::Bpe(_)) { "byte pair encoding" } else { "the library's" };
        write!(f, "TokenModel({kind}, {} tokens)", self.get_vocab_size())
    }
}

impl From<Bpe> for TokenModel {
    fn from(bpe: Bpe) -> Self {
        Self(Kind::Bpe(bpe))
    }
}

impl From<ModelWrapper> for TokenModel {
    fn from(model: ModelWrapper) -> Self {
        Self(Kind::Library(model))
    }
}

impl Model for TokenModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        match &self.0 {
            Kind::Bpe(bpe) => Ok(bpe.tokenize(sequence)),
            Kind::Library(model) => model.tokenize(sequence),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokens().id(token),
            Kind::Library(model) => model.token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokens().text(id).map(str::to_owned),
            Kind::Library(model) => model.id_to_token(id),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokens().iter().map(|(text, id)| (text.to_owned(), id)).collect(),
            Kind::Library(model) => model.get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match &self.0 {
            Kind::Bpe(bpe) => bpe.tokens().len(),
            Kind::Library(model) => model.get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match &self.0 {
            Kind::Bpe(_) => Err("vocabularies are only read".into()),
            Kind::Library(model) => model.save(folder, prefix),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match &self.0 {
            Kind::Bpe(_) => TrainerWrapper::BpeTrainer(BpeTrainer::default()),
            Kind::Library(model) => model.get_trainer(),
        }
    }
}

/// The library's tokenizer under this type.
fn from_library(tokenizer: tokenizers::Tokenizer) -> tokenizers::Result<Tokenizer> {
    TokenizerBuilder::new()
        .with_normalizer(tokenizer.get_normalizer().cloned())
        .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
        .with_post_processor(tokenizer.get_post_processor().cloned())
        .with_decoder(tokenizer.get_decoder().cloned())
        .with_added_vocabulary(tokenizer.get_added_vocabulary().clone())
        .with_truncation(tokenizer.get_truncation().cloned())
        .with_padding(tokenizer.get_padding().cloned())
        .with_model(tokenizer.get_model().clone().into())
        .build()
}
