//! What to say of a model that is not run: what kind it is, in a line short enough to read.

use hub::ModelConfig;

use super::FAMILIES;
use crate::ModelError;

/// A kind of models that no family covers.
struct Kind {
    /// As in "is a …".
    what: &'static str,
    /// What is run instead, or when it comes.
    outlook: &'static str,
    model_types: &'static [&'static str],
}

const ENCODER_DECODER: Kind = Kind {
    what: "an encoder-decoder",
    outlook: "encoder-decoders come later",
    model_types: &[
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "encoder-decoder",
        "fsmt",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "mvp",
        "nllb-moe",
        "pegasus",
        "pegasus_x",
        "plbart",
        "prophetnet",
        "switch_transformers",
        "t5",
        "t5gemma",
        "umt5",
        "whisper",
    ],
};

const KINDS: [Kind; 3] = [
    ENCODER_DECODER,
    Kind {
        what: "a state-space or recurrent model",
        outlook: "those come later",
        model_types: &[
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "mamba",
            "mamba2",
            "nemotron_h",
            "plamo2",
            "recurrent_gemma",
            "rwkv",
            "rwkv7",
            "xlstm",
            "zamba",
            "zamba2",
        ],
    },
    Kind {
        what: "an encoder, which generates no text",
        outlook: "only models that generate text are served",
        model_types: &[
            "albert",
            "bert",
            "camembert",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "modernbert",
            "mpnet",
            "nomic_bert",
            "roberta",
            "xlm-roberta",
        ],
    },
];

/// The refusal of a model whose `model_type` and `architectures` are no family's.
pub(super) fn refusal(config: &ModelConfig) -> ModelError {
    let model_type = config.model_type().map(shorten);
    let found = match &model_type {
        Some(model_type) => format!("model_type {model_type:?}"),
        None => "no model_type".to_owned(),
    };
    let kind =
        KINDS.iter().find(|kind| config.model_type().is_some_and(|found| kind.model_types.contains(&found)));
    let is_encoder_decoder = config.raw.get("is_encoder_decoder").is_some_and(|flag| flag == true);
    let kind = kind.or(is_encoder_decoder.then_some(&ENCODER_DECODER));
    let problem = match kind {
        Some(Kind { what, outlook, .. }) => {
            format!("{found} is {what}, expected a decoder alone; {outlook}")
        }
        None => format!("{found} {}", expectation(config)),
    };
    ModelError::Unusable(vec![format!("config.json: {problem}: choose another model with --model-id")])
}

/// What would do: another architecture of the same type, else another type.
fn expectation(config: &ModelConfig) -> String {
    let architectures: Vec<String> = config.architectures().into_iter().take(3).map(shorten).collect();
    let of_type = FAMILIES.iter().filter(|family| config.model_type() == Some(family.model_type));
    let of_type: Vec<_> = of_type.map(|family| family.architecture).collect();
    if !of_type.is_empty() {
        return format!("with architectures {architectures:?}, expected {}", of_type.join(" or "));
    }
    let has_vision = ["vision_config", "audio_config"].iter().any(|key| config.raw.contains_key(*key));
    let hint = if has_vision { " (it takes images or sound, which come later)" } else { "" };
    let mut supported: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
    supported.dedup();
    format!(
        "with architectures {architectures:?} is not supported{hint}, expected one of {}",
        supported.join(", ")
    )
}

/// A name from the file for a message.
fn shorten(name: &str) -> String {
    name.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn line(config: Value) -> String {
        let config = ModelConfig::new(config.as_object().unwrap().clone());
        let text = super::super::decoder_spec(&config).unwrap_err().to_string();
        assert!(!text.contains('\n') && text.len() < 700, "{text}");
        assert!(text.ends_with(": choose another model with --model-id"), "{text}");
        text
    }

    #[test]
    fn kinds_that_come_later_are_named() {
        let t5 = json!({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]});
        assert_eq!(
            line(t5),
            "config.json: model_type \"t5\" is an encoder-decoder, expected a decoder alone; encoder-decoders come \
             later: choose another model with --model-id"
        );
        for (config, words) in [
            (
                json!({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}),
                "an encoder-decoder",
            ),
            (
                json!({"model_type": "newer", "is_encoder_decoder": true}),
                "model_type \"newer\" is an encoder-decoder",
            ),
            (
                json!({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}),
                "a state-space or recurrent model",
            ),
            (json!({"model_type": "rwkv"}), "those come later"),
            (
                json!({"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
                "an encoder, which generates no text",
            ),
            (
                json!({"model_type": "llava", "vision_config": {}}),
                "(it takes images or sound, which come later)",
            ),
            (json!({}), "no model_type with architectures [] is not supported, expected one of "),
            (
                json!({"model_type": "llama", "architectures": ["MistralForCausalLM"]}),
                "expected LlamaForCausalLM:",
            ),
        ] {
            let line = line(config);
            assert!(line.contains(words), "{line}");
        }
        let hostile =
            line(json!({"model_type": "\n".repeat(1000), "architectures": vec!["x".repeat(1000); 1000]}));
        assert!(hostile.contains("llama, mistral"), "{hostile}");
    }
}
