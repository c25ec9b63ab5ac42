//! GGUF metadata in the spelling of `config.json`.

use serde_json::{Map, Value as Json, json};

use crate::config::ModelConfig;
use crate::error::HubError;
use crate::generation_config::GenerationConfig;
use crate::gguf::{GgmlType, Gguf, GgufError, Value, quote};

/// What `general.architecture` may be.
const SUPPORTED: &str = "the architectures llama";

/// The configuration a `config.json` beside the original weights would hold; `bytes` is the whole file.
pub(crate) fn model_config(gguf: &Gguf, bytes: &[u8], origin: &str) -> Result<ModelConfig, HubError> {
    let reader = MetadataReader { gguf, origin };
    let architecture =
        reader.str("general.architecture")?.ok_or_else(|| reader.lacks("general.architecture"))?;
    if reader.u64("split.count")?.is_some_and(|count| count > 1) {
        return Err(
            reader.unsupported("a file split into parts", "one whole file: merge the parts with gguf-split")
        );
    }
    match architecture {
        "llama" => llama(&reader, bytes).map(ModelConfig::new),
        other => Err(reader.unsupported(&format!("architecture {}", quote(other)), SUPPORTED)),
    }
}

/// The tokens that end a text: end of sequence, and end of turn where that is another.
pub(crate) fn generation_config(gguf: &Gguf, origin: &str) -> Result<GenerationConfig, HubError> {
    let reader = MetadataReader { gguf, origin };
    let id = |name: &str| reader.token_id(name);
    let mut eos_token_ids = Vec::new();
    for token in [id("eos")?, id("eot")?].into_iter().flatten() {
        if !eos_token_ids.contains(&token) {
            eos_token_ids.push(token);
        }
    }
    Ok(GenerationConfig { eos_token_ids, bos_token_id: id("bos")?, pad_token_id: id("padding")? })
}

/// Typed metadata with errors that name the file.
pub(crate) struct MetadataReader<'a> {
    pub(crate) gguf: &'a Gguf,
    pub(crate) origin: &'a str,
}

impl<'a> MetadataReader<'a> {
    pub(crate) fn wrong(&self, problem: impl Into<String>) -> HubError {
        HubError::Gguf { origin: self.origin.to_owned(), problem: problem.into() }
    }

    pub(crate) fn lacks(&self, key: &str) -> HubError {
        self.wrong(format!("it has no metadata key {key}"))
    }

    pub(crate) fn unsupported(&self, found: &str, supported: &str) -> HubError {
        HubError::UnsupportedGguf {
            origin: self.origin.to_owned(),
            found: found.to_owned(),
            supported: supported.to_owned(),
        }
    }

    fn read<T>(&self, result: Result<T, GgufError>) -> Result<T, HubError> {
        result.map_err(|error| self.wrong(error.0))
    }

    pub(crate) fn u64(&self, key: &str) -> Result<Option<u64>, HubError> {
        self.read(self.gguf.u64(key))
    }

    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>, HubError> {
        self.read(self.gguf.f64(key))
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, HubError> {
        self.read(self.gguf.bool(key))
    }

    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>, HubError> {
        self.read(self.gguf.str(key))
    }

    pub(crate) fn strings(&self, key: &str) -> Result<Option<&'a [String]>, HubError> {
        self.read(self.gguf.strings(key))
    }

    pub(crate) fn tokens(&self) -> Result<&'a [String], HubError> {
        self.strings("tokenizer.ggml.tokens")?.ok_or_else(|| self.lacks("tokenizer.ggml.tokens"))
    }

    /// A size that must be there and must not be zero.
    fn size(&self, key: &str) -> Result<u64, HubError> {
        match self.u64(key)? {
            Some(0) => Err(self.wrong(format!("{key} is 0, expected at least 1"))),
            Some(n) => Ok(n),
            None => Err(self.lacks(key)),
        }
    }

    /// A size per layer that must be the same in all of them; written once or as a list.
    fn uniform_size(&self, key: &str) -> Result<Option<u64>, HubError> {
        let Some(Value::Array(list)) = self.gguf.metadata.get(key) else { return self.u64(key) };
        let sizes = list.to_u64s().unwrap_or_default();
        match sizes.as_slice() {
            [first, rest @ ..] if rest.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => {
                Err(self
                    .unsupported(&format!("{key} that differs between layers"), "one value for all layers"))
            }
        }
    }

    /// The id of a special token such as `eos`, checked against the vocabulary.
    pub(crate) fn token_id(&self, name: &str) -> Result<Option<u32>, HubError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.u64(&key)? else { return Ok(None) };
        let num_tokens = self.strings("tokenizer.ggml.tokens")?.map_or(0, <[String]>::len);
        match u32::try_from(id) {
            // Some converters write -1 as 32 bits where there is no such token.
            Ok(u32::MAX) => Ok(None),
            Ok(id) if (id as usize) < num_tokens => Ok(Some(id)),
            _ => Err(self.wrong(format!("{key} is {id}, but there are {num_tokens} tokens"))),
        }
    }
}

fn llama(reader: &MetadataReader<'_>, bytes: &[u8]) -> Result<Map<String, Json>, HubError> {
    let gguf = reader.gguf;
    if reader.u64("llama.expert_count")?.is_some_and(|count| count > 0) {
        return Err(reader.unsupported("architecture \"llama\" with experts", "llama without experts"));
    }
    let hidden_size = reader.size("llama.embedding_length")?;
    let num_heads = reader.size("llama.attention.head_count")?;
    let num_kv_heads = reader.uniform_size("llama.attention.head_count_kv")?.unwrap_or(num_heads);
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        let problem = format!("{num_heads} attention heads cannot share {num_kv_heads} key and value heads");
        return Err(reader.wrong(problem));
    }
    let head_dim = match reader.u64("llama.attention.key_length")? {
        Some(head_dim) if head_dim > 0 => head_dim,
        _ if hidden_size % num_heads == 0 => hidden_size / num_heads,
        _ => return Err(reader.wrong(format!("{num_heads} attention heads do not divide {hidden_size}"))),
    };
    let rotary = reader.u64("llama.rope.dimension_count")?.unwrap_or(head_dim);
    if rotary != head_dim {
        let found = format!("a rotation of {rotary} of a head's {head_dim} numbers");
        return Err(reader.unsupported(&found, "a rotation of all"));
    }
    let vocab_size = match reader.u64("llama.vocab_size")? {
        Some(n) => n,
        None => reader.tokens()?.len() as u64,
    };
    let rope_theta = reader.f64("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let context_length = reader.size("llama.context_length")?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": gguf.tensor("blk.0.attn_q.bias").is_some(),
        "attention_dropout": 0.0,
        "bos_token_id": reader.token_id("bos")?,
        "eos_token_id": reader.token_id("eos")?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": reader.uniform_size("llama.feed_forward_length")?
            .ok_or_else(|| reader.lacks("llama.feed_forward_length"))?,
        "max_position_embeddings": context_length,
        "mlp_bias": gguf.tensor("blk.0.ffn_gate.bias").is_some(),
        "num_attention_heads": num_heads,
        "num_hidden_layers": reader.size("llama.block_count")?,
        "num_key_value_heads": num_kv_heads,
        "pad_token_id": reader.token_id("padding")?,
        "pretraining_tp": 1,
        "rms_norm_eps": reader.f64("llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| reader.lacks("llama.attention.layer_norm_rms_epsilon"))?,
        "rope_scaling": rope_scaling(reader, bytes, head_dim, rope_theta)?,
        "rope_theta": rope_theta,
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "torch_dtype": activation_dtype(gguf),
        "use_cache": true,
        "vocab_size": vocab_size,
    });
    match config {
        Json::Object(config) => Ok(config),
        // The literal above is an object.
        _ => Ok(Map::new()),
    }
}

/// The dtype to compute in: that of plain weights, and bfloat16 for quantized ones, as their originals had.
fn activation_dtype(gguf: &Gguf) -> &'static str {
    match gguf.tensor("blk.0.attn_q.weight").map(|tensor| tensor.ggml_type) {
        Some(GgmlType::F32) => "float32",
        Some(GgmlType::F16) => "float16",
        _ => "bfloat16",
    }
}

/// `rope_scaling` from the scaling keys, or from the factors per frequency that Llama 3.1 and later are stored with.
fn rope_scaling(
    reader: &MetadataReader<'_>,
    bytes: &[u8],
    head_dim: u64,
    rope_theta: f64,
) -> Result<Json, HubError> {
    if let Some(tensor) = reader.gguf.tensor("rope_freqs.weight") {
        let data = &bytes[tensor.range.clone()];
        let factors: Vec<f32> =
            data.as_chunks().0.iter().map(|&chunk: &[u8; 4]| f32::from_le_bytes(chunk)).collect();
        if tensor.ggml_type == GgmlType::F32
            && factors.len() as u64 == head_dim / 2
            && let Some(scaling) = Llama3Scaling::behind(&factors, rope_theta)
        {
            return Ok(scaling.to_json());
        }
        return Err(
            reader.unsupported("rope_freqs.weight", "no frequency factors, or those of Llama 3.1 and later")
        );
    }
    let factor = reader.f64("llama.rope.scaling.factor")?.unwrap_or(1.0);
    let original = reader.u64("llama.rope.scaling.original_context_length")?;
    match reader.str("llama.rope.scaling.type")? {
        None | Some("none") => Ok(Json::Null),
        Some("linear") => Ok(json!({"rope_type": "linear", "factor": factor})),
        Some("yarn") => Ok(json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        })),
        Some(other) => Err(reader
            .unsupported(&format!("rotary scaling {}", quote(other)), "rotary scaling none, linear, yarn")),
    }
}

/// Llama 3.1's rotary scaling: long waves are slowed by `factor`, short ones kept, those between blended.
///
/// GGUF keeps only the result, a factor per frequency. All published models share every constant but `factor`,
/// which is the largest of the factors; the others are checked by computing them again.
struct Llama3Scaling {
    factor: f64,
}

impl Llama3Scaling {
    const LOW_FREQ_FACTOR: f64 = 1.0;
    const HIGH_FREQ_FACTOR: f64 = 4.0;
    const ORIGINAL_CONTEXT: f64 = 8192.0;

    /// The scaling whose factors these are; `None` when there is none.
    fn behind(factors: &[f32], rope_theta: f64) -> Option<Self> {
        let factor = f64::from(factors.iter().copied().reduce(f32::max)?);
        let scaling = Self { factor };
        let same = |(index, &found): (usize, &f32)| {
            let expected = scaling.factor_at(index, factors.len(), rope_theta);
            (f64::from(found) - expected).abs() <= 1e-3 * expected
        };
        (factor.is_finite() && factor >= 1.0 && factors.iter().enumerate().all(same)).then_some(scaling)
    }

    fn factor_at(&self, index: usize, count: usize, rope_theta: f64) -> f64 {
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

#[cfg(test)]
#[path = "gguf_config_tests.rs"]
mod tests;
