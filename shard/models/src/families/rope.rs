//! Rotary frequencies and how configurations scale them to longer contexts.

use backend::{RopeFrequencies, RopeStyle};
use serde_json::{Map, Value};

use super::config_reader::ConfigReader;

/// What is read from a configuration without `rope_theta`.
const DEFAULT_THETA: f64 = 10_000.0;
/// Scalings that exist but are not computed here yet.
const LATER: [&str; 5] = ["dynamic", "yarn", "longrope", "su", "mrope"];

/// The frequencies of heads of `head_dim` elements, from `rope_theta` and `rope_scaling`. Mistakes go to `reader`.
pub(super) fn frequencies(reader: &mut ConfigReader<'_>, head_dim: usize) -> RopeFrequencies {
    let theta = reader.number_or("rope_theta", DEFAULT_THETA);
    let unscaled = (0..head_dim / 2).map(|pair| theta.powf(-((2 * pair) as f64) / head_dim as f64));
    let scaling = Scaling::read(reader);
    RopeFrequencies {
        inv_freq: unscaled.map(|frequency| scaling.apply(frequency) as f32).collect(),
        scale: 1.0,
        style: RopeStyle::Half,
    }
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
}

impl Scaling {
    fn read(reader: &mut ConfigReader<'_>) -> Self {
        let Some(raw) = reader.config().rope_scaling() else {
            if let Some(other) = reader.config().raw.get("rope_scaling").filter(|value| !value.is_null()) {
                reader.wrong(format!("rope_scaling: found {other}, expected an object or null"));
            }
            return Scaling::None;
        };
        let kind = raw.get("rope_type").or_else(|| raw.get("type"));
        match kind.and_then(Value::as_str) {
            Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear { factor: number(reader, raw, "factor") },
            Some("llama3") => Self::read_llama3(reader, raw),
            Some(kind) if LATER.contains(&kind) => {
                reader.wrong(format!(
                    "rope_scaling: found type {kind:?}, which comes later (as do {}); expected default, linear or llama3",
                    LATER.iter().filter(|&&other| other != kind).copied().collect::<Vec<_>>().join(", ")
                ));
                Scaling::None
            }
            _ => {
                let found = kind.map_or_else(|| "no type".to_owned(), |kind| format!("type {kind}"));
                reader.wrong(format!("rope_scaling: found {found}, expected default, linear or llama3"));
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

    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                // How often the wave turns within the original context.
                let turns = original_context * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * ((1.0 - kept) / factor + kept)
            }
        }
    }
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
