//! `generation_config.json`: which tokens end a text.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::{ModelConfig, read_object, shorten};
use crate::error::HubError;

/// What a model says about generating with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GenerationConfig {
    /// Tokens that end a text; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// The token a text begins with.
    pub bos_token_id: Option<u32>,
    /// The token that fills unused places.
    pub pad_token_id: Option<u32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `root`; what it does not say is taken from `config`.
    pub(crate) fn from_root(root: &Path, config: &ModelConfig) -> Result<Self, HubError> {
        let path = root.join("generation_config.json");
        let own = if path.is_file() { read_object(&path)? } else { Map::new() };
        let ids = |key: &str| match token_ids("generation_config.json", key, &own)? {
            Some(ids) => Ok(ids),
            None => Ok(token_ids("config.json", key, &config.raw)?.unwrap_or_default()),
        };
        Ok(Self {
            eos_token_ids: ids("eos_token_id")?,
            bos_token_id: ids("bos_token_id")?.first().copied(),
            pad_token_id: ids("pad_token_id")?.first().copied(),
        })
    }
}

/// A token id or a list of them; `None` when absent or null.
fn token_ids(origin: &str, key: &str, object: &Map<String, Value>) -> Result<Option<Vec<u32>>, HubError> {
    let id = |value: &Value| match value.as_i64() {
        // Upstream configs mark "no such token" by -1.
        Some(n) if n < 0 => Ok(None),
        Some(n) => Ok(u32::try_from(n).ok()),
        None => Err(HubError::format(
            format!("{origin}: {key}"),
            format!("found {}, expected a token id or a list of them", shorten(&value.to_string())),
        )),
    };
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(values)) => {
            let ids = values.iter().map(id).collect::<Result<Vec<_>, _>>()?;
            Ok(Some(ids.into_iter().flatten().collect()))
        }
        Some(value) => Ok(id(value)?.map(|id| vec![id])),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(own: Option<Value>, config: Value) -> Result<GenerationConfig, HubError> {
        let dir = tempfile::tempdir().unwrap();
        if let Some(own) = own {
            std::fs::write(dir.path().join("generation_config.json"), own.to_string()).unwrap();
        }
        GenerationConfig::from_root(dir.path(), &ModelConfig::new(config.as_object().unwrap().clone()))
    }

    #[test]
    fn accepts_one_id_or_a_list() {
        let one = read(Some(json!({"eos_token_id": 2})), json!({})).unwrap();
        assert_eq!(one.eos_token_ids, [2]);
        let list = read(Some(json!({"eos_token_id": [128001, 128009]})), json!({"eos_token_id": 7})).unwrap();
        assert_eq!(list.eos_token_ids, [128001, 128009]);
    }

    #[test]
    fn falls_back_to_the_model_config() {
        let generation =
            read(None, json!({"eos_token_id": [3], "bos_token_id": 1, "pad_token_id": -1})).unwrap();
        assert_eq!(generation.eos_token_ids, [3]);
        assert_eq!(generation.bos_token_id, Some(1));
        assert_eq!(generation.pad_token_id, None);
        assert_eq!(read(None, json!({})).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn wrong_type_is_an_error() {
        let error = read(Some(json!({"eos_token_id": "</s>"})), json!({})).unwrap_err().to_string();
        assert!(error.contains("eos_token_id") && error.contains("</s>"), "{error}");
    }
}
