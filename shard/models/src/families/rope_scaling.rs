//! How configurations scale rotary frequencies to longer contexts.

use backend::{LongContext, LongFrequencies, RopeFrequencies, RopeStyle};
use serde_json::{Map, Value};

use super::config_reader::ConfigReader;

const EXPECTED: &str = "expected default, linear, dynamic, llama3, yarn or longrope";

/// A rule from one frequency to another.
pub(super) enum Scaling {
    None,
    /// Positions are divided by the factor (arXiv:2306.15595).
    Linear {
        factor: f64,
    },
    /// Dynamic NTK: prompts beyond the context turn slower, the more the longer they are.
    Dynamic {
        factor: f64,
        context: u32,
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
    /// LongRoPE (arXiv:2402.13753): each pair has its own divisor, another one when the prompt is longer than `context`.
    LongRope {
        short: Divisors,
        long: Divisors,
        context: u32,
    },
}

/// What LongRoPE learned for one range of lengths.
pub(super) struct Divisors {
    /// One a pair.
    pairs: Vec<f64>,
    /// Factor on cosine and sine.
    scale: f64,
}

impl Scaling {
    /// The scaling in `rope_scaling`, for the base `head.0` and `head.1` elements that turn.
    pub(super) fn read(reader: &mut ConfigReader<'_>, head: (f64, usize)) -> Self {
        if let Some(raw) = reader.config().rope_scaling() {
            return Self::read_object(reader, raw, head);
        }
        if let Some(other) = reader.config().raw.get("rope_scaling").filter(|value| !value.is_null()) {
            reader.wrong(format!("rope_scaling: found {other}, expected an object or null"));
        }
        Scaling::None
    }

    /// The scaling that `raw` describes.
    pub(super) fn read_object(
        reader: &mut ConfigReader<'_>,
        raw: &Map<String, Value>,
        head: (f64, usize),
    ) -> Self {
        let kind = raw.get("rope_type").or_else(|| raw.get("type"));
        match kind.and_then(Value::as_str) {
            Some("default") if !raw.contains_key("mrope_section") => Scaling::None,
            Some("default" | "mrope") => {
                reader.wrong(format!(
                    "rope_scaling: found mrope, which numbers images and video in three directions, {EXPECTED}; choose \
                     a model of text alone with --model-id"
                ));
                Scaling::None
            }
            Some("linear") => Scaling::Linear { factor: number(reader, raw, "factor") },
            Some("dynamic") => {
                let factor = number(reader, raw, "factor");
                Scaling::Dynamic { factor, context: whole(longest(reader, "dynamic")) }
            }
            Some("llama3") => Self::read_llama3(reader, raw),
            // The first Phi-3 models called LongRoPE "su", some of them "yarn".
            Some("yarn") if raw.contains_key("long_factor") => Self::read_longrope(reader, raw, head.1),
            Some("longrope" | "su") => Self::read_longrope(reader, raw, head.1),
            Some("yarn") => Self::read_yarn(reader, raw, head),
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
        (theta, rotary_dim): (f64, usize),
    ) -> Self {
        let has_original = is_given(raw, "original_max_position_embeddings");
        let original = if has_original {
            number(reader, raw, "original_max_position_embeddings")
        } else {
            longest(reader, "yarn")
        };
        // A factor that is there wins over the ratio of the contexts, even where they differ.
        let factor = if has_original && raw.get("factor").is_none_or(Value::is_null) {
            longest(reader, "yarn") / original
        } else {
            number(reader, raw, "factor")
        };
        let (fast, slow) =
            (number_or(reader, raw, "beta_fast", 32.0), number_or(reader, raw, "beta_slow", 1.0));
        if theta <= 1.0 {
            reader.wrong(format!("rope_theta: found {theta}, expected more than 1 with yarn"));
        }
        // The pair that turns so often within the original context.
        let pair_of = |turns: f64| {
            rotary_dim as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(fast), pair_of(slow));
        if raw.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
        let attention_factor = if is_given(raw, "mscale") && is_given(raw, "mscale_all_dim") {
            yarn_magnitude(factor, number(reader, raw, "mscale"))
                / yarn_magnitude(factor, number(reader, raw, "mscale_all_dim"))
        } else {
            yarn_magnitude(factor, 1.0)
        };
        Scaling::Yarn {
            factor,
            low,
            high: if low == high { high + 0.001 } else { high },
            attention_factor: number_or(reader, raw, "attention_factor", attention_factor),
        }
    }

    fn read_longrope(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, rotary_dim: usize) -> Self {
        const ORIGINAL: &str = "original_max_position_embeddings";
        // What follows from a mistake is no second one, and the size of a head may follow from one.
        let is_size_known = !reader.has_mistakes();
        // Phi-3 has it beside the scaling, and there it wins over a factor.
        let beside = reader.nullable_number(ORIGINAL, None);
        let original = beside.unwrap_or_else(|| number(reader, raw, ORIGINAL));
        let factor = if beside.is_some() || raw.get("factor").is_none_or(Value::is_null) {
            longest(reader, "longrope") / original
        } else {
            number(reader, raw, "factor")
        };
        if original <= 1.0 && !reader.has_mistakes() {
            reader.wrong(format!("{ORIGINAL}: found {original}, expected more than 1 with longrope"));
        }
        let num_pairs = is_size_known.then_some(rotary_dim / 2);
        let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        let usual = number_or(reader, raw, "attention_factor", usual);
        let mut divisors = |pairs: &str, scale: &str| Divisors {
            pairs: list(reader, raw, pairs, num_pairs),
            scale: number_or(reader, raw, scale, usual),
        };
        Scaling::LongRope {
            short: divisors("short_factor", "short_mscale"),
            long: divisors("long_factor", "long_mscale"),
            context: whole(original),
        }
    }

    /// The frequencies of `rotary_dim` elements with the base `theta`.
    pub(super) fn frequencies(&self, theta: f64, rotary_dim: usize) -> RopeFrequencies {
        let frequency = |pair: usize| theta.powf(-((2 * pair) as f64) / rotary_dim as f64);
        let divided = |by: &Divisors| -> Vec<f32> {
            by.pairs.iter().enumerate().map(|(pair, by)| (frequency(pair) / by) as f32).collect()
        };
        let plain = RopeFrequencies {
            inv_freq: (0..rotary_dim / 2).map(|pair| self.apply(pair, frequency(pair)) as f32).collect(),
            scale: 1.0,
            style: RopeStyle::Half,
            beyond: None,
        };
        match self {
            Scaling::Yarn { attention_factor, .. } => {
                RopeFrequencies { scale: *attention_factor as f32, ..plain }
            }
            Scaling::LongRope { short, long, context } => {
                let frequencies =
                    LongFrequencies::Fixed { inv_freq: divided(long), scale: long.scale as f32 };
                RopeFrequencies {
                    inv_freq: divided(short),
                    scale: short.scale as f32,
                    beyond: Some(LongContext { context: *context, frequencies }),
                    ..plain
                }
            }
            &Scaling::Dynamic { factor, context } => {
                let frequencies = LongFrequencies::Ntk { theta, factor };
                RopeFrequencies { beyond: Some(LongContext { context, frequencies }), ..plain }
            }
            Scaling::None | Scaling::Linear { .. } | Scaling::Llama3 { .. } => plain,
        }
    }

    /// What a frequency becomes where that depends on nothing but the pair.
    fn apply(&self, pair: usize, frequency: f64) -> f64 {
        match *self {
            Scaling::None | Scaling::Dynamic { .. } | Scaling::LongRope { .. } => frequency,
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

/// YaRN's answer to scores that flatten in a context `factor` times as long.
pub(super) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// The model's longest sequence, on which a scaling of this kind depends.
fn longest(reader: &mut ConfigReader<'_>, kind: &str) -> f64 {
    match reader.config().max_position_embeddings() {
        Ok(Some(longest)) if longest > 0 => return longest as f64,
        Ok(None) => reader.wrong(format!(
            "max_position_embeddings: missing, expected a positive integer with rope_scaling of type {kind}"
        )),
        // It is read, and told, as the model's longest sequence as well.
        _ => {}
    }
    1.0
}

/// A number of tokens; what no prompt reaches is the largest there is.
fn whole(tokens: f64) -> u32 {
    tokens as u32
}

/// Whether there is a value; as in Python, zero says that there is none.
fn is_given(raw: &Map<String, Value>, key: &str) -> bool {
    raw.get(key).is_some_and(|value| !value.is_null() && value.as_f64() != Some(0.0))
}

/// A number that may be absent.
fn number_or(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, key: &str, default: f64) -> f64 {
    if is_given(raw, key) { number(reader, raw, key) } else { default }
}

/// A positive number of a scaling.
pub(super) fn number(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, key: &str) -> f64 {
    match raw.get(key).map(|value| (value, value.as_f64())) {
        Some((_, Some(number))) if number.is_finite() && number > 0.0 => return number,
        Some((found, _)) => {
            reader.wrong(format!("rope_scaling: {key} is {found}, expected a positive number"));
        }
        None => reader.wrong(format!("rope_scaling: {key} is missing, expected a positive number")),
    }
    1.0
}

/// Positive numbers, `len` of them where that is known.
fn list(reader: &mut ConfigReader<'_>, raw: &Map<String, Value>, key: &str, len: Option<usize>) -> Vec<f64> {
    let Some(values) = raw.get(key).and_then(Value::as_array) else {
        let found = if raw.contains_key(key) { "no list" } else { "missing" };
        reader.wrong(format!("rope_scaling: {key} is {found}, expected a list of positive numbers"));
        return Vec::new();
    };
    if let Some(len) = len.filter(|&len| len != values.len()) {
        reader.wrong(format!(
            "rope_scaling: {key} has {} numbers, expected {len}, one for every two elements of a head that turn",
            values.len()
        ));
    }
    let positive = |value: &Value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
    if let Some(other) = values.iter().find(|value| positive(value).is_none()) {
        reader.wrong(format!("rope_scaling: {key} has {other}, expected positive numbers"));
    }
    values.iter().filter_map(positive).collect()
}
