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
    let tokenizer = files.tokenizer()?;
    // The shards check theirs; this one makes the ids that they look up.
    files.check_vocabulary(&tokenizer)?;
    Ok(ModelParts {
        model_id: model.model_id.clone(),
        sha: files.sha.clone(),
        tokenizer,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_of_another_model_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("model.safetensors", "");
        write(
            "tokenizer.json",
            r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"a":0,"b":7},"unk_token":"a"}}"#,
        );
        let model = ModelRef::new(dir.path().display().to_string());
        let load = || load(&model, &HubOptions::default(), None);
        write("config.json", r#"{"vocab_size": 7}"#);
        let error = load().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("its largest token id is 7, expected ids below"), "{error}");
        write("config.json", r#"{"vocab_size": 8}"#);
        assert!(load().is_ok_and(|parts| parts.template.is_err()));
    }

    #[test]
    fn a_given_tokenizer_config_replaces_the_models() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("model.safetensors", "");
        write("config.json", r#"{"vocab_size": 2}"#);
        write(
            "tokenizer.json",
            r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}"#,
        );
        write("tokenizer_config.json", r#"{"chat_template": "the model's own"}"#);
        write("other.json", r#"{"chat_template": "the given one"}"#);
        let model = ModelRef::new(dir.path().display().to_string());
        let rendered = |path: Option<&Path>| {
            let template = load(&model, &HubOptions::default(), path).unwrap().template.unwrap();
            template.render(&[]).unwrap()
        };
        assert_eq!(rendered(None), "the model's own");
        assert_eq!(rendered(Some(&dir.path().join("other.json"))), "the given one");
        assert!(load(&model, &HubOptions::default(), Some(Path::new("/nowhere.json"))).is_err());
    }
}
