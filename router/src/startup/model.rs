//! Tokenizer and chat template.

use std::path::Path;

use hub::{HubError, HubOptions, ModelRef, Tokenizer, TokenizerConfig};

use crate::chat_template::{ChatTemplate, TemplateError};

/// What the router needs of a model.
pub struct ModelParts {
    /// The name it is served under.
    pub model_id: String,
    /// Its commit on the Hub.
    pub sha: Option<String>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, or why chat requests will be refused.
    pub template: Result<ChatTemplate, TemplateError>,
}

/// Reads files of this disk only: whoever started the shards has fetched the model.
pub(super) fn load(
    model: &ModelRef,
    options: &HubOptions,
    tokenizer_config_path: Option<&Path>,
) -> Result<ModelParts, HubError> {
    let files = hub::locate(model, options)?;
    let config = match tokenizer_config_path {
        Some(path) => TokenizerConfig::from_file(path)?,
        None => files.tokenizer_config()?,
    };
    Ok(ModelParts {
        model_id: model.model_id.clone(),
        sha: files.sha.clone(),
        tokenizer: files.tokenizer()?,
        template: compile_template(config),
    })
}

/// A model without a usable template still serves everything but chat.
fn compile_template(config: TokenizerConfig) -> Result<ChatTemplate, TemplateError> {
    let source = config.chat_template.ok_or(TemplateError::NotFound)?;
    let template = ChatTemplate::new(&source, config.bos_token, config.eos_token);
    if let Err(error) = &template {
        tracing::warn!("the chat template cannot be used, chat requests will be refused: {error}");
    }
    template
}
