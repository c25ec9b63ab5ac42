//! `config.json`: what a model's architecture is, with typed access.

use std::path::Path;

use serde_json::{Map, Value};

use crate::bounded::{self, MAX_JSON_BYTES};
use crate::error::HubError;

/// A model's `config.json`, in Hugging Face's spelling.
///
/// The spelling of transformers 5 is translated when the file is read: `rope_parameters` also appears as
/// `rope_theta` and `rope_scaling`, `dtype` also as `torch_dtype`. So readers know one spelling only.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelConfig {
    /// The whole object.
    pub raw: Map<String, Value>,
}

impl ModelConfig {
    /// Takes an object as it was read and adds the older spelling of newer keys.
    pub fn new(mut raw: Map<String, Value>) -> Self {
        normalise(&mut raw);
        Self { raw }
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// The file cannot be read or does not hold a JSON object.
    pub fn from_file(path: &Path) -> Result<Self, HubError> {
        read_object(path).map(Self::new)
    }

    /// `model_type`, such as `llama`.
    pub fn model_type(&self) -> Option<&str> {
        self.str("model_type")
    }

    /// `architectures`, such as `LlamaForCausalLM`; empty when absent.
    pub fn architectures(&self) -> Vec<&str> {
        match self.raw.get("architectures") {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// A text value; `None` when absent or of another type.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.raw.get(key).and_then(Value::as_str)
    }

    /// A non-negative integer; `None` when absent or null.
    ///
    /// # Errors
    /// The value has another type.
    pub fn usize(&self, key: &str) -> Result<Option<usize>, HubError> {
        self.typed(key, "a non-negative integer", |value| {
            // Some writers put 1.0 where they mean 1.
            let whole = value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n));
            value.as_u64().or(whole.map(|n| n as u64)).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A number; `None` when absent or null.
    ///
    /// # Errors
    /// The value has another type.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, HubError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A boolean; `None` when absent or null.
    ///
    /// # Errors
    /// The value has another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, HubError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, HubError> {
        match self.raw.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(found) => Ok(Some(found)),
                None => Err(HubError::format(
                    format!("config.json: {key}"),
                    format!("found {}, expected {expected}", shorten(&value.to_string())),
                )),
            },
        }
    }

    fn first_usize(&self, keys: &[&str]) -> Result<Option<usize>, HubError> {
        for key in keys {
            if let Some(value) = self.usize(key)? {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The longest sequence in tokens: `max_position_embeddings`, else `max_seq_len`, else `n_positions`.
    ///
    /// # Errors
    /// The value has the wrong type.
    pub fn max_position_embeddings(&self) -> Result<Option<usize>, HubError> {
        self.first_usize(&["max_position_embeddings", "max_seq_len", "n_positions"])
    }

    /// Number of rows of the embedding.
    ///
    /// # Errors
    /// The value has the wrong type.
    pub fn vocab_size(&self) -> Result<Option<usize>, HubError> {
        self.usize("vocab_size")
    }

    /// `hidden_size`, else `n_embd`.
    ///
    /// # Errors
    /// The value has the wrong type.
    pub fn hidden_size(&self) -> Result<Option<usize>, HubError> {
        self.first_usize(&["hidden_size", "n_embd"])
    }

    /// `num_attention_heads`, else `n_head`.
    ///
    /// # Errors
    /// The value has the wrong type.
    pub fn num_attention_heads(&self) -> Result<Option<usize>, HubError> {
        self.first_usize(&["num_attention_heads", "n_head"])
    }

    /// `head_dim`, else `hidden_size / num_attention_heads` when that is whole.
    ///
    /// # Errors
    /// A value has the wrong type.
    pub fn head_dim(&self) -> Result<Option<usize>, HubError> {
        if let Some(head_dim) = self.usize("head_dim")? {
            return Ok(Some(head_dim));
        }
        Ok(match (self.hidden_size()?, self.num_attention_heads()?) {
            (Some(size), Some(heads)) if heads > 0 && size % heads == 0 => Some(size / heads),
            _ => None,
        })
    }

    /// The dtype the weights were saved in, without a `torch.` prefix, such as `bfloat16`.
    pub fn torch_dtype(&self) -> Option<&str> {
        let dtype = self.str("torch_dtype").or_else(|| self.str("dtype"))?;
        Some(dtype.strip_prefix("torch.").unwrap_or(dtype))
    }

    /// `quantization_config.quant_method`, such as `gptq`.
    pub fn quant_method(&self) -> Option<&str> {
        self.raw.get("quantization_config")?.get("quant_method")?.as_str()
    }

    /// Base of the rotary frequencies, wherever it is written.
    ///
    /// # Errors
    /// The value has the wrong type.
    pub fn rope_theta(&self) -> Result<Option<f64>, HubError> {
        self.f64("rope_theta")
    }

    /// The rotary scaling as it is written (`rope_type` or `type`, `factor`, …); `None` when unscaled.
    pub fn rope_scaling(&self) -> Option<&Map<String, Value>> {
        self.raw.get("rope_scaling").and_then(Value::as_object)
    }
}

/// Adds the older spelling beside transformers 5's.
fn normalise(raw: &mut Map<String, Value>) {
    if let Some(dtype) = raw.get("dtype").filter(|dtype| dtype.is_string()).cloned() {
        raw.entry("torch_dtype").or_insert(dtype);
    }
    let Some(Value::Object(mut rope)) = raw.get("rope_parameters").cloned() else { return };
    // Models with several kinds of layers hold one object per kind instead; those are read by their family.
    if rope.values().any(Value::is_object) {
        return;
    }
    for key in ["rope_theta", "partial_rotary_factor"] {
        if let Some(value) = rope.shift_remove(key) {
            raw.entry(key).or_insert(value);
        }
    }
    let kind = rope.get("rope_type").or_else(|| rope.get("type"));
    let is_default = kind.is_none_or(|kind| kind == "default");
    let scaling = if is_default { Value::Null } else { Value::Object(rope) };
    raw.entry("rope_scaling").or_insert(scaling);
}

/// Reads a JSON file that holds one object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, HubError> {
    read_object_of(path, MAX_JSON_BYTES)
}

/// [`read_object`], for a file of at most `max_bytes`.
pub(crate) fn read_object_of(path: &Path, max_bytes: u64) -> Result<Map<String, Value>, HubError> {
    let text = bounded::read_text(path, max_bytes)?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(HubError::format(
            path.display().to_string(),
            format!("found {}, expected a JSON object", shorten(&other.to_string())),
        )),
        Err(error) => Err(HubError::format(path.display().to_string(), format!("not valid JSON: {error}"))),
    }
}

/// At most 200 characters of somebody else's words, in one line.
pub(crate) fn one_line(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(200).map(visible).collect()
}

/// At most 80 characters of a value, for messages, in one line.
pub(crate) fn shorten(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    let more = if text.chars().nth(80).is_some() { "…" } else { "" };
    text.chars().take(80).map(visible).chain(more.chars()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: Value) -> ModelConfig {
        ModelConfig::new(value.as_object().unwrap().clone())
    }

    #[test]
    fn transformers_5_spelling_reads_like_the_older_one() {
        let newer = config(json!({
            "dtype": "float32",
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0},
        }));
        assert_eq!(newer.torch_dtype(), Some("float32"));
        assert_eq!(newer.raw["torch_dtype"], "float32");
        assert_eq!(newer.rope_theta().unwrap(), Some(500000.0));
        assert_eq!(
            Value::Object(newer.rope_scaling().unwrap().clone()),
            json!({"rope_type": "llama3", "factor": 8.0})
        );
    }

    #[test]
    fn default_rope_parameters_are_no_scaling() {
        let newer = config(json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}));
        assert_eq!(newer.rope_theta().unwrap(), Some(1e4));
        assert!(newer.rope_scaling().is_none());
        let half_renamed = config(json!({"rope_parameters": {"type": "dynamic", "factor": 2.0}}));
        assert!(half_renamed.rope_scaling().is_some());
    }

    #[test]
    fn rope_parameters_per_layer_kind_are_left_alone() {
        let newer = config(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}));
        assert_eq!(newer.rope_theta().unwrap(), None);
        assert!(newer.raw["rope_parameters"]["full_attention"].is_object());
    }

    #[test]
    fn older_keys_win_over_translated_ones() {
        let both = config(json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}));
        assert_eq!(both.rope_theta().unwrap(), Some(1.0));
    }

    #[test]
    fn wrong_types_name_key_and_expectation() {
        let config = config(json!({"vocab_size": "many", "head_dim": -1, "x": 1.5, "n": null, "w": 4.0}));
        let error = config.vocab_size().unwrap_err().to_string();
        assert_eq!(error, "config.json: vocab_size: found \"many\", expected a non-negative integer");
        assert!(config.head_dim().is_err());
        assert!(config.usize("x").is_err());
        assert!(config.bool("x").is_err());
        assert_eq!(config.f64("x").unwrap(), Some(1.5));
        assert_eq!(config.usize("n").unwrap(), None);
        assert_eq!(config.usize("w").unwrap(), Some(4));
    }

    #[test]
    fn derived_sizes() {
        let gpt2 = config(json!({"n_embd": 768, "n_head": 12, "n_positions": 1024}));
        assert_eq!(gpt2.head_dim().unwrap(), Some(64));
        assert_eq!(gpt2.max_position_embeddings().unwrap(), Some(1024));
        let odd = config(json!({"hidden_size": 10, "num_attention_heads": 0}));
        assert_eq!(odd.head_dim().unwrap(), None);
        let gptq =
            config(json!({"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "torch.float16"}));
        assert_eq!(gptq.quant_method(), Some("gptq"));
        assert_eq!(gptq.torch_dtype(), Some("float16"));
    }
}
