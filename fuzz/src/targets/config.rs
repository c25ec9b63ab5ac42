//! A `config.json` of any family, to the description of its decoder and the list of its tensors.

use hub::ModelConfig;
use serde_json::Value;

use crate::message::{check_line, check_model_error};

/// Reads the configuration.
pub fn run(input: &[u8]) {
    let Ok(Value::Object(object)) = serde_json::from_slice(input) else { return };
    let config = ModelConfig::new(object);
    for size in [
        config.vocab_size(),
        config.hidden_size(),
        config.head_dim(),
        config.num_attention_heads(),
        config.max_position_embeddings(),
    ] {
        let _ = size.inspect_err(|error| check_line(error));
    }
    match models::decoder_spec(&config) {
        Err(error) => check_model_error(&error),
        Ok(spec) => {
            let elements = |shape: &[usize]| shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
            for tensor in spec.tensors() {
                assert!(elements(&tensor.shape).is_some(), "{} of shape {:?}", tensor.name, tensor.shape);
            }
        }
    }
}
