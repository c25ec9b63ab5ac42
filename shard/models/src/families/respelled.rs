//! Configurations under the keys a family reads.

use hub::ModelConfig;
use serde_json::Value;

/// A copy of `config` where values found under another name are also under the one that is read, unless that has a value already.
/// `names` are pairs of what is read and what is looked for; the latter may be a path (`attn_config.alibi`).
pub(super) fn respelled(config: &ModelConfig, names: &[(&str, &str)]) -> ModelConfig {
    let mut raw = config.raw.clone();
    for (read, found) in names {
        let mut steps = found.split('.');
        let first = steps.next().and_then(|step| config.raw.get(step));
        let value = steps.fold(first, |value, step| value?.get(step));
        if let Some(value) = value.filter(|value| !value.is_null()) {
            let slot = raw.entry(*read).or_insert(Value::Null);
            if slot.is_null() {
                *slot = value.clone();
            }
        }
    }
    ModelConfig { raw }
}
