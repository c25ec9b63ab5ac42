//! Rotary frequencies: which elements of a head turn how fast. How they are scaled is in `rope_scaling`.

use backend::RopeFrequencies;
use serde_json::{Map, Value};

use super::config_reader::ConfigReader;
use super::rope_scaling::{Scaling, number, yarn_magnitude};

/// What is read from a configuration without `rope_theta`.
const DEFAULT_THETA: f64 = 10_000.0;
const NESTED: &str = "rope_parameters: found one object per kind of layer, expected one for all layers";

/// The frequencies of heads of `head_dim` elements, from `rope_theta` and `rope_scaling`. Mistakes go to `reader`.
pub(super) fn frequencies(reader: &mut ConfigReader<'_>, head_dim: usize) -> RopeFrequencies {
    frequencies_or(reader, head_dim, DEFAULT_THETA)
}

/// The same with another default of `rope_theta`.
pub(super) fn frequencies_or(
    reader: &mut ConfigReader<'_>,
    head_dim: usize,
    default_theta: f64,
) -> RopeFrequencies {
    if nested(reader).is_some() {
        reader.wrong(NESTED);
    }
    if reader.number_or("partial_rotary_factor", 1.0) != 1.0 {
        reader.wrong(
            "partial_rotary_factor: found another value than 1, which this architecture does not have",
        );
    }
    rotary(reader, head_dim, default_theta)
}

/// The frequencies of the first `partial_rotary_factor` of a head, all of it when absent; the rest is not turned.
pub(super) fn partial(reader: &mut ConfigReader<'_>, head_dim: usize) -> RopeFrequencies {
    partial_or(reader, head_dim, 1.0)
}

/// The same with another default of `partial_rotary_factor`.
pub(super) fn partial_or(
    reader: &mut ConfigReader<'_>,
    head_dim: usize,
    default_factor: f64,
) -> RopeFrequencies {
    if nested(reader).is_some() {
        reader.wrong(NESTED);
    }
    let factor = reader.number_or("partial_rotary_factor", default_factor);
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || rotary_dim < 2 || rotary_dim % 2 == 1 {
        // What follows from a mistake is no second one.
        if factor > 1.0 || !reader.has_mistakes() {
            reader.wrong(format!(
                "partial_rotary_factor: found {factor}, expected an even number of a head's {head_dim} elements"
            ));
        }
        return unscaled(DEFAULT_THETA, 2);
    }
    rotary(reader, rotary_dim, DEFAULT_THETA)
}

fn rotary(reader: &mut ConfigReader<'_>, rotary_dim: usize, default_theta: f64) -> RopeFrequencies {
    let theta = reader.number_or("rope_theta", default_theta);
    let scaling = Scaling::read(reader, (theta, rotary_dim));
    checked(reader, scaling.frequencies(theta, rotary_dim))
}

/// The frequencies of one kind of layers where `rope_parameters` has an object for each, as transformers 5 writes it; none
/// where it has not.
pub(super) fn of_kind(reader: &mut ConfigReader<'_>, kind: &str, head_dim: usize) -> Option<RopeFrequencies> {
    let kinds = nested(reader)?;
    let Some(raw) = kinds.get(kind).and_then(Value::as_object) else {
        reader.wrong(format!("rope_parameters: {kind} is missing, expected an object"));
        return None;
    };
    let theta = number(reader, raw, "rope_theta");
    let scaling = Scaling::read_object(reader, raw, (theta, head_dim));
    Some(checked(reader, scaling.frequencies(theta, head_dim)))
}

/// The factor on the scores that belongs to a YaRN scaling with `mscale_all_dim`, as DeepSeek's latent attention has it;
/// else 1. The one on cosines and sines is part of the frequencies and does not include it.
pub(super) fn softmax_factor(reader: &mut ConfigReader<'_>) -> f32 {
    let Some(raw) = reader.config().rope_scaling() else { return 1.0 };
    if raw.get("mscale_all_dim").is_none_or(|weight| weight.is_null() || weight.as_f64() == Some(0.0)) {
        return 1.0;
    }
    let magnitude = yarn_magnitude(number(reader, raw, "factor"), number(reader, raw, "mscale_all_dim"));
    (magnitude * magnitude) as f32
}

/// The frequencies that `theta` gives.
pub(super) fn unscaled(theta: f64, head_dim: usize) -> RopeFrequencies {
    Scaling::None.frequencies(theta, head_dim)
}

/// `rope_parameters` with an object for each kind of layer.
fn nested<'a>(reader: &ConfigReader<'a>) -> Option<&'a Map<String, Value>> {
    let kinds = reader.config().raw.get("rope_parameters")?.as_object()?;
    kinds.values().any(Value::is_object).then_some(kinds)
}

/// Numbers that no float32 holds would turn every head into nonsense.
fn checked(reader: &mut ConfigReader<'_>, frequencies: RopeFrequencies) -> RopeFrequencies {
    let long =
        frequencies.beyond.as_ref().map(|beyond| frequencies.for_prompt(beyond.context.saturating_add(1)));
    let (short_inv_freq, short_scale) = (&frequencies.inv_freq, frequencies.scale);
    let all = [&short_inv_freq[..], &[short_scale]].concat();
    let all_long = long.map(|(inv_freq, scale)| [&inv_freq[..], &[scale]].concat()).unwrap_or_default();
    if all.iter().chain(&all_long).any(|number| !number.is_finite()) && !reader.has_mistakes() {
        reader.wrong("rope_theta or rope_scaling: found values whose frequencies are not finite numbers");
    }
    frequencies
}
