//! What `--quantize` and the configuration say of how weights are stored: a pure function.

use hub::ModelConfig;
use serde_json::{Map, Value};

use crate::ModelError;

/// What `--quantize` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// E4M3 weights: those of the files, or rounded while they are loaded.
    Fp8,
    /// Weights as the library compressed-tensors stored them.
    CompressedTensors,
}

impl Quantize {
    /// The value of `--quantize`: `fp8`, `compressed-tensors`.
    pub const fn name(self) -> &'static str {
        match self {
            Quantize::Fp8 => "fp8",
            Quantize::CompressedTensors => "compressed-tensors",
        }
    }

    /// The inverse of [`Quantize::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        [Quantize::Fp8, Quantize::CompressedTensors].into_iter().find(|quantize| quantize.name() == name)
    }
}

/// How weights of eight bits are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fp8Scheme {
    /// Rows and columns that share a scale where there is a matrix of scales.
    pub(crate) block: [usize; 2],
}

/// What DeepSeek-V3 has, and everybody after it.
const USUAL_BLOCK: [usize; 2] = [128, 128];

/// How the files hold their weights; none: plainly, or in a GGUF file's blocks.
///
/// # Errors
/// They are quantized in a way that is not run, or `asked` contradicts them: one line.
pub(crate) fn stored_as(
    config: &ModelConfig,
    asked: Option<Quantize>,
) -> Result<Option<Fp8Scheme>, ModelError> {
    let section = ["quantization_config", "compression_config"]
        .into_iter()
        .find_map(|key| Some((key, config.raw.get(key)?.as_object()?)));
    let Some((key, section)) = section else {
        return match asked {
            Some(Quantize::CompressedTensors) => Err(refusal(
                "--quantize is compressed-tensors, but config.json has no quantization_config: leave it out"
                    .to_owned(),
            )),
            Some(Quantize::Fp8) | None => Ok(None),
        };
    };
    let method = section.get("quant_method").and_then(Value::as_str).unwrap_or_default();
    let stored = match method {
        "fp8" | "fbgemm_fp8" => Quantize::Fp8,
        "compressed-tensors" => Quantize::CompressedTensors,
        _ => {
            let method = if method.is_empty() { "of an unnamed method" } else { method };
            let method: String = method.chars().filter(|c| !c.is_control()).take(60).collect();
            return Err(refusal(format!(
                "config.json: {key} is {method}, expected none, fp8, fbgemm_fp8 or compressed-tensors; quantized checkpoints \
                 ({method}) come later: choose the unquantized checkpoint or a GGUF file with --model-id"
            )));
        }
    };
    if let Some(asked) = asked.filter(|&asked| asked != stored) {
        return Err(refusal(format!(
            "--quantize is {}, but config.json says that the weights are {method}: use --quantize {} or leave it out",
            asked.name(),
            stored.name()
        )));
    }
    match stored {
        Quantize::Fp8 => {
            let format = section.get("fmt").filter(|format| format.as_str() != Some("e4m3"));
            if let Some(format) = format.filter(|format| !format.is_null()) {
                return Err(unsupported(&format!("{key}.fmt"), Some(format), "\"e4m3\""));
            }
            Ok(Some(Fp8Scheme {
                block: block(&format!("{key}.weight_block_size"), section.get("weight_block_size"))?,
            }))
        }
        Quantize::CompressedTensors => compressed(key, section).map(Some),
    }
}

/// The scheme of compressed-tensors' 8-bit floats.
fn compressed(key: &str, section: &Map<String, Value>) -> Result<Fp8Scheme, ModelError> {
    for (name, expected) in [
        ("format", &["float-quantized", "naive-quantized"][..]),
        ("quantization_status", &["compressed", "frozen"][..]),
    ] {
        let found = section.get(name);
        if !found.and_then(Value::as_str).is_some_and(|found| expected.contains(&found)) {
            return Err(unsupported(&format!("{key}.{name}"), found, &expected.join(" or ")));
        }
    }
    let mut scheme = Fp8Scheme { block: USUAL_BLOCK };
    let groups = section.get("config_groups").and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let weights = group.get("weights");
        let field = |field: &str| weights.and_then(|weights| weights.get(field));
        let path = |field: &str| format!("{key}.config_groups.{}.weights.{field}", one_word(name));
        if field("type").and_then(Value::as_str) != Some("float") {
            return Err(unsupported(&path("type"), field("type"), "\"float\""));
        }
        if field("num_bits").and_then(Value::as_u64) != Some(8) {
            return Err(unsupported(&path("num_bits"), field("num_bits"), "8"));
        }
        match field("strategy").and_then(Value::as_str) {
            Some("tensor" | "channel") => {}
            Some("block") => scheme.block = block(&path("block_structure"), field("block_structure"))?,
            _ => {
                return Err(unsupported(
                    &path("strategy"),
                    field("strategy"),
                    "\"tensor\", \"channel\" or \"block\"",
                ));
            }
        }
    }
    Ok(scheme)
}

/// Rows and columns of a block.
fn block(what: &str, value: Option<&Value>) -> Result<[usize; 2], ModelError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(USUAL_BLOCK) };
    let sizes: Option<Vec<usize>> = value.as_array().and_then(|sizes| {
        let size = |size: &Value| size.as_u64().and_then(|size| usize::try_from(size).ok());
        sizes.iter().map(|value| size(value).filter(|size| (1..=1 << 20).contains(size))).collect()
    });
    let wrong = || unsupported(what, Some(value), "two sizes from 1 up, such as [128, 128]");
    sizes.and_then(|sizes| sizes.try_into().ok()).ok_or_else(wrong)
}

fn unsupported(what: &str, found: Option<&Value>, expected: &str) -> ModelError {
    refusal(format!(
        "config.json: {what} is {}, expected {expected}: choose another model with --model-id",
        shorten(found)
    ))
}

fn refusal(line: String) -> ModelError {
    ModelError::Unusable(vec![line])
}

/// A value of the file in a message.
fn shorten(value: Option<&Value>) -> String {
    value.map_or("missing".to_owned(), |value| value.to_string().chars().take(60).collect())
}

fn one_word(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(40).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stored(section: Value, asked: Option<Quantize>) -> Result<Option<Fp8Scheme>, String> {
        let config = json!({"quantization_config": section});
        let config = ModelConfig::new(config.as_object().unwrap().clone());
        stored_as(&config, asked).map_err(|error| error.to_string())
    }

    fn plain(asked: Option<Quantize>) -> Result<Option<Fp8Scheme>, String> {
        stored_as(&ModelConfig::default(), asked).map_err(|error| error.to_string())
    }

    fn compressed_section(kind: &str, bits: u32, strategy: &str) -> Value {
        json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"weights": {"type": kind, "num_bits": bits, "strategy": strategy}}},
        })
    }

    #[test]
    fn the_configuration_says_how_weights_are_stored() {
        let usual = Ok(Some(Fp8Scheme { block: [128, 128] }));
        assert_eq!(plain(None), Ok(None));
        assert_eq!(plain(Some(Quantize::Fp8)), Ok(None));
        assert_eq!(stored(json!({"quant_method": "fp8"}), None), usual);
        assert_eq!(stored(json!({"quant_method": "fbgemm_fp8"}), Some(Quantize::Fp8)), usual);
        let blocks = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]});
        assert_eq!(stored(blocks, None), Ok(Some(Fp8Scheme { block: [64, 32] })));
        for strategy in ["tensor", "channel", "block"] {
            let section = compressed_section("float", 8, strategy);
            assert_eq!(stored(section, Some(Quantize::CompressedTensors)), usual, "{strategy}");
        }
    }

    #[test]
    fn contradictions_are_one_line_that_says_what_to_change() {
        let line = |result: Result<Option<Fp8Scheme>, String>| {
            let line = result.unwrap_err();
            assert!(!line.contains('\n') && line.len() < 350, "{line}");
            line
        };
        assert_eq!(
            line(plain(Some(Quantize::CompressedTensors))),
            "--quantize is compressed-tensors, but config.json has no quantization_config: leave it out"
        );
        assert_eq!(
            line(stored(compressed_section("float", 8, "channel"), Some(Quantize::Fp8))),
            "--quantize is fp8, but config.json says that the weights are compressed-tensors: use --quantize \
             compressed-tensors or leave it out"
        );
        let gptq = line(stored(json!({"quant_method": "gptq", "bits": 4}), Some(Quantize::Fp8)));
        assert_eq!(
            gptq,
            "config.json: quantization_config is gptq, expected none, fp8, fbgemm_fp8 or compressed-tensors; quantized \
             checkpoints (gptq) come later: choose the unquantized checkpoint or a GGUF file with --model-id"
        );
        let integers = line(stored(compressed_section("int", 8, "channel"), None));
        assert!(
            integers.contains("config_groups.group_0.weights.type is \"int\", expected \"float\""),
            "{integers}"
        );
        assert!(
            line(stored(compressed_section("float", 4, "channel"), None))
                .contains("num_bits is 4, expected 8")
        );
        assert!(
            line(stored(compressed_section("float", 8, "group"), None)).contains("strategy is \"group\"")
        );
        let e5m2 = line(stored(json!({"quant_method": "fp8", "fmt": "e5m2"}), None));
        assert!(e5m2.contains("fmt is \"e5m2\", expected \"e4m3\""), "{e5m2}");
        for sizes in [json!([128]), json!([0, 128]), json!("128"), json!([1, 2, 3])] {
            let line = line(stored(json!({"quant_method": "fp8", "weight_block_size": sizes}), None));
            assert!(line.contains("weight_block_size is"), "{line}");
        }
        line(stored(json!({"quant_method": "\n".repeat(1000)}), None));
        line(stored(json!({}), None));
    }
}
