//! `--rope-scaling` and `--rope-factor`: a rotary scaling that takes the place of the one in `config.json`, and how long
//! sequences may be with a scaling.

use serde_json::{Map, Value, json};

use crate::config::ModelConfig;
use crate::error::HubError;

/// Families whose `max_position_embeddings` is the context after linear scaling.
const COUNTS_LINEAR_SCALING: [&str; 1] = ["gemma3_text"];

/// The kind of layers that a scaling is for where a configuration has several.
const SCALED_LAYERS: &str = "full_attention";

/// Which scaling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// All positions divided by the factor.
    Linear,
    /// The base grows with the prompt.
    Dynamic,
}

impl RopeKind {
    /// As options and `config.json` spell it.
    pub fn name(self) -> &'static str {
        match self {
            RopeKind::Linear => "linear",
            RopeKind::Dynamic => "dynamic",
        }
    }

    /// The kind called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [RopeKind::Linear, RopeKind::Dynamic].into_iter().find(|kind| kind.name() == name)
    }
}

/// A scaling that somebody asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeOverride {
    /// Which.
    pub kind: RopeKind,
    /// How many times the context, at least 1.
    pub factor: f64,
}

impl RopeOverride {
    /// What the two options mean together: a kind alone has the factor 1, a factor alone is linear, neither is `None`.
    ///
    /// # Errors
    /// A factor below 1 or not finite, in one line that names the option.
    pub fn new(kind: Option<RopeKind>, factor: Option<f64>) -> Result<Option<Self>, String> {
        if kind.is_none() && factor.is_none() {
            return Ok(None);
        }
        let factor = factor.unwrap_or(1.0);
        if !(factor.is_finite() && factor >= 1.0) {
            return Err(format!("--rope-factor (ROPE_FACTOR) is {factor}, expected a number from 1 up"));
        }
        Ok(Some(Self { kind: kind.unwrap_or(RopeKind::Linear), factor }))
    }
}

impl ModelConfig {
    /// The same model with another rotary scaling.
    pub fn with_rope_scaling(&self, rope: &RopeOverride) -> Self {
        let mut raw = self.raw.clone();
        let scaling = json!({"rope_type": rope.kind.name(), "factor": rope.factor});
        if let Some(of_kind) = raw
            .get_mut("rope_parameters")
            .and_then(|kinds| kinds.get_mut(SCALED_LAYERS))
            .and_then(Value::as_object_mut)
        {
            of_kind.retain(|key, _| key == "rope_theta" || key == "partial_rotary_factor");
            of_kind.extend(
                scaling.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())),
            );
        }
        raw.insert("rope_scaling".to_owned(), scaling);
        Self { raw }
    }

    /// How many times `max_position_embeddings` sequences may be long, because that is the context before the scaling;
    /// 1 where it is the one after it.
    pub fn context_stretch(&self) -> f64 {
        let Some(scaling) = self.rope_scaling() else { return 1.0 };
        let number =
            |key: &str| scaling.get(key).and_then(Value::as_f64).filter(|n| n.is_finite() && *n > 0.0);
        let factor = number("factor").unwrap_or(1.0);
        let stretch = match kind(scaling) {
            Some("linear") if self.model_type().is_some_and(|kind| COUNTS_LINEAR_SCALING.contains(&kind)) => {
                1.0
            }
            Some("linear" | "dynamic") => factor,
            Some("yarn") => {
                match (number("original_max_position_embeddings"), self.max_position_embeddings()) {
                    (Some(original), Ok(Some(longest))) if longest > 0 => original * factor / longest as f64,
                    // Without the original context, the one there is counts as such.
                    (None, _) if !scaling.contains_key("long_factor") => factor,
                    _ => 1.0,
                }
            }
            _ => 1.0,
        };
        stretch.max(1.0)
    }

    /// The longest sequence in tokens, scaling included.
    ///
    /// # Errors
    /// `max_position_embeddings` or what stands for it has the wrong type.
    pub fn longest_sequence(&self) -> Result<Option<usize>, HubError> {
        let longest = self.max_position_embeddings()?;
        Ok(longest.map(|longest| stretched(longest, self.context_stretch())))
    }
}

/// A context that is `stretch` times as long; positions have 32 bits.
pub fn stretched(context: usize, stretch: f64) -> usize {
    if stretch <= 1.0 { context } else { (context as f64 * stretch).min(f64::from(u32::MAX)) as usize }
}

fn kind(scaling: &Map<String, Value>) -> Option<&str> {
    scaling.get("rope_type").or_else(|| scaling.get("type"))?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(value: &Value) -> ModelConfig {
        ModelConfig::new(value.as_object().unwrap().clone())
    }

    #[test]
    fn the_options_complete_each_other() {
        let rope = |kind, factor| RopeOverride::new(kind, factor).unwrap();
        assert_eq!(rope(None, None), None);
        let dynamic = Some(RopeOverride { kind: RopeKind::Dynamic, factor: 1.0 });
        assert_eq!(rope(Some(RopeKind::Dynamic), None), dynamic);
        let linear = Some(RopeOverride { kind: RopeKind::Linear, factor: 2.5 });
        assert_eq!(rope(None, Some(2.5)), linear);
        assert_eq!(rope(Some(RopeKind::Linear), Some(2.5)), linear);
        for factor in [0.5, 0.0, -2.0, f64::NAN, f64::INFINITY] {
            let error = RopeOverride::new(None, Some(factor)).unwrap_err();
            assert!(
                error.starts_with("--rope-factor (ROPE_FACTOR) is ") && error.contains("from 1 up"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_override_replaces_what_the_file_says() {
        let rope = RopeOverride { kind: RopeKind::Dynamic, factor: 2.0 };
        let scaled = config(&json!({"rope_scaling": {"type": "yarn", "factor": 8.0, "beta_fast": 16}}));
        let expected = json!({"rope_type": "dynamic", "factor": 2.0});
        assert_eq!(scaled.with_rope_scaling(&rope).raw["rope_scaling"], expected);
        let newer =
            config(&json!({"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 8.0}}));
        let newer = newer.with_rope_scaling(&rope);
        assert_eq!((&newer.raw["rope_scaling"], newer.rope_theta().unwrap()), (&expected, Some(5.0)));
        let local = json!({"rope_type": "default", "rope_theta": 10.0});
        let kinds = config(&json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": local,
        }}));
        let kinds = kinds.with_rope_scaling(&rope).raw["rope_parameters"].clone();
        assert_eq!(kinds["sliding_attention"], local);
        assert_eq!(
            kinds["full_attention"],
            json!({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6})
        );
    }

    #[test]
    fn scalings_make_sequences_longer() {
        for (scaling, expected) in [
            (json!(null), 4096),
            (json!({"type": "linear", "factor": 4.0}), 16384),
            (json!({"rope_type": "dynamic", "factor": 2.5}), 10240),
            (json!({"type": "dynamic", "factor": 0.5}), 4096),
            (json!({"type": "dynamic", "factor": "two"}), 4096),
            (json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}), 16384),
            (json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}), 4096),
            (json!({"type": "yarn", "factor": 4.0}), 16384),
            (json!({"type": "yarn", "long_factor": [], "factor": 4.0}), 4096),
            (json!({"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}), 4096),
            (json!({"type": "longrope", "factor": 8.0}), 4096),
            (json!({"type": "linear", "factor": 1e300}), u32::MAX as usize),
        ] {
            let config = config(&json!({"max_position_embeddings": 4096, "rope_scaling": scaling}));
            assert_eq!(config.longest_sequence().unwrap(), Some(expected), "{scaling}");
        }
        let gemma = json!({
            "model_type": "gemma3_text", "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        });
        assert_eq!(config(&gemma).longest_sequence().unwrap(), Some(4096));
        assert_eq!(config(&json!({})).longest_sequence().unwrap(), None);
    }
}
