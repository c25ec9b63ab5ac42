//! Rotary scalings: what GGUF keeps of them, in the spelling of `config.json`.

use serde_json::{Value as Json, json};

use super::MetadataReader;
use crate::error::HubError;
use crate::gguf::{GgmlType, TensorInfo, quote};

/// What is read besides, for messages.
const SUPPORTED: &str = "rotary scaling none, linear, yarn, longrope";

/// `rope_scaling` from the scaling keys, or from the factors per frequency that Llama 3.1 and later and Phi-3 are stored with;
/// a rotation turns `rotary_dim` elements of a head. `bytes` is the whole file.
pub(super) fn rope_scaling(
    reader: &MetadataReader<'_>,
    architecture: &str,
    bytes: &[u8],
    (rotary_dim, rope_theta): (u64, f64),
) -> Result<Json, HubError> {
    if let Some(tensor) = reader.gguf.tensor("rope_freqs.weight") {
        return factors(tensor, bytes, rotary_dim)
            .and_then(|factors| Llama3Scaling::behind(&factors, rope_theta))
            .map(|scaling| scaling.to_json())
            .ok_or_else(|| {
                reader
                    .unsupported("rope_freqs.weight", "no frequency factors, or those of Llama 3.1 and later")
            });
    }
    if let Some(long) = reader.gguf.tensor("rope_factors_long.weight") {
        return longrope(reader, long, bytes, rotary_dim);
    }
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    let factor = reader.f64(&key("factor"))?.unwrap_or(1.0);
    let original = reader.u64(&key("original_context_length"))?;
    match reader.str(&key("type"))? {
        None | Some("none") => Ok(Json::Null),
        Some("linear") => Ok(json!({"rope_type": "linear", "factor": factor})),
        Some("yarn") => {
            let mut scaling = json!({"rope_type": "yarn", "factor": factor});
            if let Some(original) = original {
                scaling["original_max_position_embeddings"] = original.into();
            }
            for (gguf, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(value) = reader.f64(&key(gguf))? {
                    scaling[name] = value.into();
                }
            }
            Ok(scaling)
        }
        Some(other) => Err(reader.unsupported(&format!("rotary scaling {}", quote(other)), SUPPORTED)),
    }
}

/// Phi-3's LongRoPE (arXiv:2402.13753): one factor per frequency within the original context and another beyond it.
fn longrope(
    reader: &MetadataReader<'_>,
    long: &TensorInfo,
    bytes: &[u8],
    rotary_dim: u64,
) -> Result<Json, HubError> {
    let short = reader
        .gguf
        .tensor("rope_factors_short.weight")
        .ok_or_else(|| reader.wrong("it has rope_factors_long.weight, but no rope_factors_short.weight"))?;
    let read = |tensor: &TensorInfo| {
        factors(tensor, bytes, rotary_dim).ok_or_else(|| {
            let problem = format!("{} is not {} numbers of type F32", tensor.name, rotary_dim / 2);
            reader.wrong(problem)
        })
    };
    Ok(json!({"rope_type": "longrope", "long_factor": read(long)?, "short_factor": read(short)?}))
}

/// One factor per frequency; none when the tensor is something else.
fn factors(tensor: &TensorInfo, bytes: &[u8], rotary_dim: u64) -> Option<Vec<f64>> {
    let data = bytes.get(tensor.range.clone())?;
    let is_fitting = tensor.ggml_type == GgmlType::F32 && data.len() as u64 == rotary_dim / 2 * 4;
    let number = |&chunk: &[u8; 4]| f64::from(f32::from_le_bytes(chunk));
    is_fitting.then(|| data.as_chunks().0.iter().map(number).collect())
}

/// Llama 3.1's rotary scaling: long waves are slowed by `factor`, short ones kept, those between blended.
///
/// GGUF keeps only the result, a factor per frequency. All published models share every constant but `factor`,
/// which is the largest of the factors; the others are checked by computing them again.
pub(super) struct Llama3Scaling {
    pub(super) factor: f64,
}

impl Llama3Scaling {
    const LOW_FREQ_FACTOR: f64 = 1.0;
    const HIGH_FREQ_FACTOR: f64 = 4.0;
    const ORIGINAL_CONTEXT: f64 = 8192.0;

    /// The scaling whose factors these are; `None` when there is none.
    fn behind(factors: &[f64], rope_theta: f64) -> Option<Self> {
        let factor = factors.iter().copied().reduce(f64::max)?;
        let scaling = Self { factor };
        let same = |(index, &found): (usize, &f64)| {
            let expected = scaling.factor_at(index, factors.len(), rope_theta);
            (found - expected).abs() <= 1e-3 * expected
        };
        (factor.is_finite() && factor >= 1.0 && factors.iter().enumerate().all(same)).then_some(scaling)
    }

    pub(super) fn factor_at(&self, index: usize, count: usize, rope_theta: f64) -> f64 {
        let wavelength = std::f64::consts::TAU * rope_theta.powf(index as f64 / count as f64);
        if wavelength < Self::ORIGINAL_CONTEXT / Self::HIGH_FREQ_FACTOR {
            1.0
        } else if wavelength > Self::ORIGINAL_CONTEXT / Self::LOW_FREQ_FACTOR {
            self.factor
        } else {
            let blend = (Self::ORIGINAL_CONTEXT / wavelength - Self::LOW_FREQ_FACTOR)
                / (Self::HIGH_FREQ_FACTOR - Self::LOW_FREQ_FACTOR);
            1.0 / ((1.0 - blend) / self.factor + blend)
        }
    }

    fn to_json(&self) -> Json {
        json!({
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": Self::LOW_FREQ_FACTOR,
            "high_freq_factor": Self::HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": Self::ORIGINAL_CONTEXT as u64,
        })
    }
}
