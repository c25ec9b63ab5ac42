//! Token limits that follow from the model when no option sets them.

use hub::ModelConfig;

/// Prompt tokens per step that keep a device busy without freezing the running requests; upstream's value when
/// nothing is known about the card.
const DEFAULT_PREFILL_TOKENS: usize = 4096;

/// `--max-batch-prefill-tokens` when it is not given. Without a config the default stands alone.
pub fn max_batch_prefill_tokens(config: Option<&ModelConfig>) -> u32 {
    // Images cost thousands of prompt tokens each, hence upstream's larger values for these.
    let default = match config.and_then(|config| config.model_type()) {
        Some("qwen2_vl" | "qwen2_5_vl") => 10_000,
        Some("gemma3") => 8_000,
        _ => DEFAULT_PREFILL_TOKENS,
    };
    // A config with a wrong type counts as absent here, as upstream; the shard reads it again and says what is wrong.
    let context = config.and_then(|config| config.longest_sequence().ok().flatten()).unwrap_or(usize::MAX);
    u32::try_from(default.min(context)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ModelConfig {
        ModelConfig { raw: serde_json::from_str(json).unwrap() }
    }

    #[test]
    fn prefill_tokens_are_bounded_by_the_context() {
        for (json, expected) in [
            (r#"{"max_position_embeddings": 8192}"#, 4096),
            (r#"{"max_position_embeddings": 2048}"#, 2048),
            (r#"{"n_positions": 1024}"#, 1024),
            (
                r#"{"max_position_embeddings": 1024, "rope_scaling": {"type": "dynamic", "factor": 3.0}}"#,
                3072,
            ),
            (r#"{"max_seq_len": 512, "n_positions": 1024}"#, 512),
            (r#"{"max_position_embeddings": "many"}"#, 4096),
            (r#"{"model_type": "gemma3", "max_position_embeddings": 131072}"#, 8000),
            (r#"{"model_type": "qwen2_vl"}"#, 10000),
            ("{}", 4096),
        ] {
            assert_eq!(max_batch_prefill_tokens(Some(&config(json))), expected, "{json}");
        }
        assert_eq!(max_batch_prefill_tokens(None), 4096);
    }
}
