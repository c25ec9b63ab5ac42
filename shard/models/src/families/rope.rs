//! Rotary frequencies and how configurations scale them to longer contexts.

use backend::{RopeFrequencies, RopeStyle};
use serde_json::{Map, Value};

use super::config_reader::ConfigReader;

/// What is read from a configuration without `rope_theta`.
const DEFAULT_THETA: f64 = 10_000.0;
/// Scalings that exist but are not computed here yet.
const LATER: [&str; 4] = ["dynamic", "longrope", "su", "mrope"];
const EXPECTED: &str = "expected default, linear, llama3 or yarn";
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
    scaling.frequencies(theta, rotary_dim)
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
    Some(scaling.frequencies(theta, head_dim))
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

/// A rule from one frequency to another.
enum Scaling {
    None,
    /// Positions are divided by the factor (arXiv:2306.15595).
    Linear {
        factor: f64,
    },
    /// Llama 3.1: slow waves are divided by the factor, fast ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: f64,
    },
    /// YaRN (arXiv:2309.00071): pairs up to `low` are kept, those from `high` on divided by the factor, those between
    /// blended.
    Yarn {
        factor: f64,
        low: f64,
        high: f64,
        attention_factor: f64,
    },
}

impl Scaling {
    fn read(reader: &mut ConfigReader<'_>, head: (f64, usize)) -> Self {
        if let Some(raw) = reader.config().rope_scaling() {
            return Self::read_object(reader, raw, head);
        }
        if let Some(other) = reader.config().raw.get("rope_scaling").filter(|value| !value.is_null()) {
            reader.wrong(format!("rope_scaling: found {other}, expected an object or null"));
        }
        Scaling::None
    }

    fn read_object(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, head: (f64, usize)) -> Self {
        let kind = raw.get("rope_type").or_else(|| raw.get("type"));
        match kind.and_then(Value::as_str) {
            Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear { factor: number(reader, raw, "factor") },
            Some("llama3") => Self::read_llama3(reader, raw),
            Some("yarn") => Self::read_yarn(reader, raw, head),
            Some(kind) if LATER.contains(&kind) => {
                reader.wrong(format!(
                    "rope_scaling: found type {kind:?}, which comes later (as do {}); {EXPECTED}",
                    LATER.iter().filter(|&&other| other != kind).copied().collect::<Vec<_>>().join(", ")
                ));
                Scaling::None
            }
            _ => {
                let found = kind.map_or_else(|| "no type".to_owned(), |kind| format!("type {kind}"));
                reader.wrong(format!("rope_scaling: found {found}, {EXPECTED}"));
                Scaling::None
            }
        }
    }

    fn read_llama3(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>) -> Self {
        let (low, high) = (number(reader, raw, "low_freq_factor"), number(reader, raw, "high_freq_factor"));
        if high <= low {
            reader.wrong(format!(
                "rope_scaling: high_freq_factor is {high}, expected more than low_freq_factor, {low}"
            ));
        }
        Scaling::Llama3 {
            factor: number(reader, raw, "factor"),
            low_freq_factor: low,
            high_freq_factor: high,
            original_context: number(reader, raw, "original_max_position_embeddings"),
        }
    }

    fn read_yarn(
        reader: &mut ConfigReader<'_>,
        raw: &Map<String, Value>,
        (theta, head_dim): (f64, usize),
    ) -> Self {
        let factor = number(reader, raw, "factor");
        let original = match reader.config().max_position_embeddings() {
            Ok(Some(longest)) => number_or(reader, raw, "original_max_position_embeddings", longest as f64),
            _ => number(reader, raw, "original_max_position_embeddings"),
        };
        let (fast, slow) =
            (number_or(reader, raw, "beta_fast", 32.0), number_or(reader, raw, "beta_slow", 1.0));
        if theta <= 1.0 {
            reader.wrong(format!("rope_theta: found {theta}, expected more than 1 with yarn"));
        }
        // The pair that turns so often within the original context.
        let pair_of = |turns: f64| {
            head_dim as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(fast), pair_of(slow));
        if raw.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        let magnitude = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let is_given =
            |key: &str| raw.get(key).is_some_and(|value| !value.is_null() && value.as_f64() != Some(0.0));
        let attention_factor = if is_given("mscale") && is_given("mscale_all_dim") {
            magnitude(number(reader, raw, "mscale")) / magnitude(number(reader, raw, "mscale_all_dim"))
        } else {
            magnitude(1.0)
        };
        Scaling::Yarn {
            factor,
            low,
            high: if low == high { high + 0.001 } else { high },
            attention_factor: number_or(reader, raw, "attention_factor", attention_factor),
        }
    }

    fn frequencies(&self, theta: f64, head_dim: usize) -> RopeFrequencies {
        let frequency = |pair: usize| theta.powf(-((2 * pair) as f64) / head_dim as f64);
        RopeFrequencies {
            inv_freq: (0..head_dim / 2).map(|pair| self.apply(pair, frequency(pair)) as f32).collect(),
            scale: if let Scaling::Yarn { attention_factor, .. } = self {
                *attention_factor as f32
            } else {
                1.0
            },
            style: RopeStyle::Half,
            beyond: None,
        }
    }

    fn apply(&self, pair: usize, frequency: f64) -> f64 {
        match *self {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                // How often the wave turns within the original context.
                let turns = original_context * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * ((1.0 - kept) / factor + kept)
            }
            Scaling::Yarn { factor, low, high, .. } => {
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (divided / factor + 1.0 - divided)
            }
        }
    }
}

/// A number that may be absent.
fn number_or(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, key: &str, default: f64) -> f64 {
    if raw.get(key).is_none_or(Value::is_null) { default } else { number(reader, raw, key) }
}

fn number(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, key: &str) -> f64 {
    match raw.get(key).map(|value| (value, value.as_f64())) {
        Some((_, Some(number))) if number.is_finite() && number > 0.0 => return number,
        Some((found, _)) => {
            reader.wrong(format!("rope_scaling: {key} is {found}, expected a positive number"));
        }
        None => reader.wrong(format!("rope_scaling: {key} is missing, expected a positive number")),
    }
    1.0
}
