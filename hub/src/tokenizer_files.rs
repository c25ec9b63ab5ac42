//! `tokenizer_config.json`, `special_tokens_map.json` and the chat template beside them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::bounded::{self, MAX_JSON_BYTES};
use crate::config::{read_object, shorten};
use crate::error::HubError;

/// What a model's tokenizer files say beyond the vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Text of the token a text begins with.
    pub bos_token: Option<String>,
    /// Text of the token that ends a text.
    pub eos_token: Option<String>,
    /// Text of the token for what is not in the vocabulary.
    pub unk_token: Option<String>,
    /// Text of the token that fills unused places.
    pub pad_token: Option<String>,
    /// The chat template (Jinja) under the name `default`.
    pub chat_template: Option<String>,
    /// All chat templates by name, when the model has more than one; `default` among them.
    pub named_chat_templates: Vec<(String, String)>,
    /// The longest text in tokens; absent when the file has the "very large integer" that means unlimited.
    pub model_max_length: Option<u64>,
    /// Whether encoding puts the BOS token first, when the file says so.
    pub add_bos_token: Option<bool>,
    /// Whether encoding puts the EOS token last, when the file says so.
    pub add_eos_token: Option<bool>,
    /// The Python class, such as `PreTrainedTokenizerFast`.
    pub tokenizer_class: Option<String>,
}

impl TokenizerConfig {
    /// Reads the files in `root`; all of them are optional.
    pub(crate) fn from_root(root: &Path) -> Result<Self, HubError> {
        let path = root.join("tokenizer_config.json");
        let mut config = if path.is_file() { Self::from_file(&path)? } else { Self::default() };
        let path = root.join("special_tokens_map.json");
        if path.is_file() {
            config.fill_special_tokens(&read_object(&path)?);
        }
        config.prefer_template_files(root)?;
        Ok(config)
    }

    /// Reads one `tokenizer_config.json`, such as `--tokenizer-config-path` names.
    ///
    /// # Errors
    /// The file cannot be read, holds no JSON object, or its chat template has a wrong type.
    pub fn from_file(path: &Path) -> Result<Self, HubError> {
        let object = read_object(path)?;
        let mut config = Self {
            model_max_length: object.get("model_max_length").and_then(Value::as_u64),
            add_bos_token: object.get("add_bos_token").and_then(Value::as_bool),
            add_eos_token: object.get("add_eos_token").and_then(Value::as_bool),
            tokenizer_class: object.get("tokenizer_class").and_then(Value::as_str).map(str::to_owned),
            ..Self::default()
        };
        config.fill_special_tokens(&object);
        config.set_template(&path.display().to_string(), object.get("chat_template"))?;
        Ok(config)
    }

    /// The chat template under `name`.
    pub fn chat_template_named(&self, name: &str) -> Option<&str> {
        let named = self.named_chat_templates.iter().find(|(known, _)| known == name);
        named.map(|(_, template)| template.as_str())
    }

    /// Takes special tokens that are not set yet. A token is a text or an object with its text as `content`.
    fn fill_special_tokens(&mut self, object: &Map<String, Value>) {
        let token = |key: &str| {
            let value = object.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        for (slot, key) in [
            (&mut self.bos_token, "bos_token"),
            (&mut self.eos_token, "eos_token"),
            (&mut self.unk_token, "unk_token"),
            (&mut self.pad_token, "pad_token"),
        ] {
            if slot.is_none() {
                *slot = token(key);
            }
        }
    }

    /// `chat_template.jinja` wins over `chat_template.json`, and that over `tokenizer_config.json`.
    fn prefer_template_files(&mut self, root: &Path) -> Result<(), HubError> {
        let path = root.join("chat_template.json");
        if path.is_file() {
            let object = read_object(&path)?;
            self.set_template(&path.display().to_string(), object.get("chat_template"))?;
        }
        let path = root.join("chat_template.jinja");
        if path.is_file() {
            let text = bounded::read_text(&path, MAX_JSON_BYTES)?;
            self.set_template(&path.display().to_string(), Some(&Value::String(text)))?;
        }
        Ok(())
    }

    /// A template is a text, or a list of `{name, template}`.
    fn set_template(&mut self, origin: &str, value: Option<&Value>) -> Result<(), HubError> {
        let wrong = |found: &Value| {
            let found = shorten(&found.to_string());
            HubError::format(
                format!("{origin}: chat_template"),
                format!("found {found}, expected a text or a list of objects with name and template"),
            )
        };
        let named = match value {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::String(text)) => vec![("default".to_owned(), text.clone())],
            Some(Value::Array(entries)) => {
                let text = |entry: &Value, key: &str| entry.get(key)?.as_str().map(str::to_owned);
                let pair =
                    |entry| text(entry, "name").zip(text(entry, "template")).ok_or_else(|| wrong(entry));
                entries.iter().map(pair).collect::<Result<_, _>>()?
            }
            Some(other) => return Err(wrong(other)),
        };
        self.named_chat_templates = named;
        self.chat_template = self.chat_template_named("default").map(str::to_owned);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(files: &[(&str, &str)]) -> Result<TokenizerConfig, HubError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        TokenizerConfig::from_root(dir.path())
    }

    #[test]
    fn tokens_may_be_text_or_objects() {
        let config = read(&[
            (
                "tokenizer_config.json",
                r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": null}"#,
            ),
            ("special_tokens_map.json", r#"{"bos_token": "ignored", "eos_token": "</s>"}"#),
        ])
        .unwrap();
        assert_eq!(config.bos_token.as_deref(), Some("<s>"));
        assert_eq!(config.eos_token.as_deref(), Some("</s>"));
    }

    #[test]
    fn default_entry_of_a_template_list_is_taken() {
        let list = json!({"chat_template": [
            {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"},
        ]});
        let config = read(&[("tokenizer_config.json", &list.to_string())]).unwrap();
        assert_eq!(config.chat_template.as_deref(), Some("D"));
        assert_eq!(config.chat_template_named("tool_use"), Some("T"));
    }

    #[test]
    fn template_files_win() {
        let config = ("tokenizer_config.json", r#"{"chat_template": "A"}"#);
        let json = ("chat_template.json", r#"{"chat_template": "B"}"#);
        let jinja = ("chat_template.jinja", "C");
        let template = |files: &[(&str, &str)]| read(files).unwrap().chat_template.unwrap();
        assert_eq!(template(&[config]), "A");
        assert_eq!(template(&[config, json]), "B");
        assert_eq!(template(&[config, json, jinja]), "C");
    }

    #[test]
    fn unlimited_length_is_absent() {
        let config =
            read(&[("tokenizer_config.json", r#"{"model_max_length": 1000000000000000019884624838656}"#)])
                .unwrap();
        assert_eq!(config.model_max_length, None);
        assert_eq!(read(&[]).unwrap(), TokenizerConfig::default());
    }

    #[test]
    fn wrong_template_type_is_an_error() {
        let error = read(&[("tokenizer_config.json", r#"{"chat_template": 7}"#)]).unwrap_err().to_string();
        assert!(error.contains("chat_template: found 7, expected a text"), "{error}");
    }
}
