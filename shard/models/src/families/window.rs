//! Sliding windows: how wide they are and which layers have them.

use serde_json::Value;

use super::config_reader::ConfigReader;
use super::dense::attentions;
use crate::spec::DecoderSpec;

/// `sliding_window`, `default` when the key is absent; null is none. It counts the token itself, as the executor does.
pub(super) fn size(reader: &mut ConfigReader<'_>, default: Option<usize>) -> Option<usize> {
    match reader.config().raw.get("sliding_window") {
        None => default,
        Some(Value::Null) => None,
        Some(_) => Some(reader.size("sliding_window")),
    }
}

/// Gives those layers a window that `layer_types` names, or without it those whose index `is_sliding` accepts.
pub(super) fn set(
    reader: &mut ConfigReader<'_>,
    spec: &mut DecoderSpec,
    window: Option<usize>,
    is_sliding: impl Fn(usize) -> bool,
) {
    let types = layer_types(reader, spec.layers.len());
    for (index, attention) in attentions(spec).enumerate() {
        let slides = types.as_ref().map_or_else(|| is_sliding(index), |types| types[index]);
        attention.window = window.filter(|_| slides);
    }
}

/// Qwen's rule: only with `use_sliding_window`, and from layer `max_window_layers` on.
pub(super) fn set_qwen(reader: &mut ConfigReader<'_>, spec: &mut DecoderSpec) {
    if !reader.flag_or("use_sliding_window", false) {
        return;
    }
    let window = size(reader, Some(4096));
    // Zero is allowed: every layer has the window.
    let first = reader.read(reader.config().usize("max_window_layers")).unwrap_or(28);
    set(reader, spec, window, |index| index >= first);
}

/// Which layers slide; none where `layer_types` is absent.
fn layer_types(reader: &mut ConfigReader<'_>, num_layers: usize) -> Option<Vec<bool>> {
    let found = reader.config().raw.get("layer_types").filter(|value| !value.is_null())?;
    let is_sliding = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let types: Option<Vec<bool>> = found.as_array().and_then(|types| types.iter().map(is_sliding).collect());
    match types {
        Some(types) if types.len() == num_layers => Some(types),
        _ => {
            reader.wrong(format!(
                "layer_types: expected \"sliding_attention\" or \"full_attention\" for each of the {num_layers} layers"
            ));
            None
        }
    }
}
