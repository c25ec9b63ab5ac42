//! Files of a model to a loaded model, as a shard does it.

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuOptions};
use hub::{HubOptions, ModelFiles, ModelRef};
use models::LoadOptions;

use crate::message::{check_line, check_model_error};

/// A model as small as one can be, for the files of weights to belong to.
pub(super) const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "vocab_size": 8, "max_position_embeddings": 64, "tie_word_embeddings": true}"#;

/// The files of a model; none: refused, properly.
pub(super) fn locate(model: &std::path::Path) -> Option<ModelFiles> {
    let options = HubOptions { cache_dir: "/nonexistent".into(), ..HubOptions::default() };
    let located = hub::locate(&ModelRef::new(model.display().to_string()), &options);
    located.inspect_err(|error| check_line(error)).ok()
}

/// Loads a model, or sees it refused properly.
pub(super) fn load(files: &ModelFiles) {
    let options = CpuOptions { threads: 1, isa: None, pin_threads: false };
    let backend = CpuBackend::new(options, Box::new(Single)).expect("a backend on this machine");
    if let Err(error) = models::load(backend, files, &LoadOptions::default()) {
        check_model_error(&error);
    }
}
