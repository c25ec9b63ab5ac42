//! Which files of a repository on the Hub make up the model.

use crate::error::HubError;
use crate::snapshot::{HubId, ModelRef};
use crate::weight_choice::{
    EXPECTED_WEIGHTS, WeightFormat, WeightNames, choose_weights, is_gguf, no_weights,
};

/// Files beside the weights that are read if they exist.
const SMALL_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
];

/// What to fetch from a repository.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DownloadPlan {
    /// Configuration and tokenizer; fetched whatever the weights are.
    pub(crate) small_files: Vec<String>,
    /// The weights, perhaps by way of an index, itself a file to fetch first.
    pub(crate) weights: WeightNames,
}

impl DownloadPlan {
    /// Chooses among the repository's file names.
    ///
    /// # Errors
    /// There are no weights that can be read, or several GGUF files and no choice.
    pub(crate) fn new(model: &ModelRef, id: &HubId, names: &[String], place: &str) -> Result<Self, HubError> {
        let remedy = "check --model-id and --revision";
        if let Some(file) = &id.gguf {
            if !names.contains(file) {
                let known: Vec<&str> =
                    names.iter().map(String::as_str).filter(|name| is_gguf(name)).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let remedy = format!("its GGUF files: {known}; {remedy}");
                return Err(model.missing(file, place.as_ref(), &remedy));
            }
            return Ok(Self::gguf(file.clone()));
        }
        match choose_weights(model, names, &id.repository)? {
            Some(choice) => {
                let has_all = choice.format == WeightFormat::Gguf;
                let small_files = if has_all { Vec::new() } else { small_files(names) };
                Ok(Self { small_files, weights: choice.names })
            }
            None => Err(no_weights(model, names).unwrap_or_else(|| {
                model.missing(&format!("a weight file ({EXPECTED_WEIGHTS})"), place.as_ref(), remedy)
            })),
        }
    }

    /// A GGUF file holds configuration and tokenizer too.
    fn gguf(file: String) -> Self {
        Self { small_files: Vec::new(), weights: WeightNames::Files(vec![file]) }
    }
}

/// Configuration and tokenizer files at the repository's root.
pub(crate) fn small_files(names: &[String]) -> Vec<String> {
    let is_small = |name: &&String| {
        SMALL_FILES.contains(&name.as_str())
            || (name.starts_with("tokenizer") && name.ends_with(".json") && !name.contains('/'))
    };
    names.iter().filter(is_small).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight_choice::{PYTORCH_INDEX, SAFETENSORS_INDEX};

    fn plan(model_id: &str, names: &[&str]) -> Result<DownloadPlan, HubError> {
        let model = ModelRef::new(model_id);
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        DownloadPlan::new(&model, &HubId::parse(model_id)?, &names, "the Hub")
    }

    fn files(names: &[&str]) -> WeightNames {
        WeightNames::Files(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn takes_only_what_is_needed() {
        let plan = plan(
            "org/name",
            &[
                ".gitattributes",
                "README.md",
                "chat_template.jinja",
                "config.json",
                "model.safetensors",
                "onnx/model.safetensors",
                "pytorch_model.bin",
                "tokenizer.json",
                "tokenizer.model",
                "tokenizer_config.json",
                "training_args.safetensors",
            ],
        )
        .unwrap();
        assert_eq!(plan.weights, files(&["model.safetensors"]));
        assert_eq!(
            plan.small_files,
            ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
        );
    }

    #[test]
    fn an_index_decides() {
        let plan =
            plan("org/name", &["a-1.safetensors", "consolidated.safetensors", SAFETENSORS_INDEX]).unwrap();
        assert_eq!(plan.weights, WeightNames::Indexed(SAFETENSORS_INDEX));
    }

    #[test]
    fn gguf_is_taken_when_it_is_the_only_one_or_named() {
        assert_eq!(plan("org/name", &["README.md", "m.gguf"]).unwrap().weights, files(&["m.gguf"]));
        let error = plan("org/name", &["a.gguf", "b.gguf"]).unwrap_err().to_string();
        assert!(error.contains("2 GGUF files (a.gguf, b.gguf)"), "{error}");
        assert!(error.contains("--model-id org/name/a.gguf"), "{error}");
        let named = plan("org/name/b.gguf", &["a.gguf", "b.gguf"]).unwrap();
        assert_eq!(named.weights, files(&["b.gguf"]));
        let error = plan("org/name/c.gguf", &["a.gguf"]).unwrap_err().to_string();
        assert!(error.contains("its GGUF files: a.gguf"), "{error}");
    }

    #[test]
    fn pytorch_is_taken_where_there_are_no_safetensors() {
        let weights = |names: &[&str]| plan("org/name", names).unwrap().weights;
        assert_eq!(
            weights(&["config.json", "other.bin", "pytorch_model.bin", "training_args.bin"]),
            files(&["pytorch_model.bin"])
        );
        let shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
        assert_eq!(weights(&[shards[0], shards[1], "a.gguf"]), files(&shards));
        assert_eq!(weights(&[PYTORCH_INDEX, shards[0]]), WeightNames::Indexed(PYTORCH_INDEX));
        assert_eq!(weights(&[PYTORCH_INDEX, shards[0], "m.safetensors"]), files(&["m.safetensors"]));
        assert_eq!(weights(&["weights.bin"]), files(&["weights.bin"]));
        // Beside a GGUF file, a file of another name is something else.
        assert_eq!(weights(&["imatrix.bin", "m.gguf"]), files(&["m.gguf"]));
        assert_eq!(
            plan("org/name", &["config.json", "pytorch_model.bin"]).unwrap().small_files,
            ["config.json"]
        );
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let error = plan("org/name", &["config.json", "consolidated.00.pth"]).unwrap_err().to_string();
        assert!(error.contains("its weights as consolidated.00.pth only"), "{error}");
        let error = plan("org/name", &["config.json", "training_args.bin"]).unwrap_err().to_string();
        assert!(error.contains("a weight file"), "{error}");
    }
}
