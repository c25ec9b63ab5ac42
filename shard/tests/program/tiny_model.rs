//! A Llama small enough to be made up in a test, with made-up weights.

use std::path::Path;

use serde_json::json;

use crate::byte_tokenizer::byte_tokenizer;

const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 96;
const NUM_LAYERS: usize = 2;
const NUM_HEADS: usize = 4;
const NUM_KV_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN_SIZE / NUM_HEADS;
/// Bytes and `<end>`.
const VOCAB_SIZE: usize = 257;

/// Writes config, tokenizer and weights into `dir`.
pub(crate) fn write(dir: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 256,
    });
    let put = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    put("config.json", config.to_string());
    put("tokenizer.json", byte_tokenizer(&["<end>"]).to_string());
    put("tokenizer_config.json", json!({"eos_token": "<end>", "model_max_length": 512}).to_string());
    write_safetensors(&dir.join("model.safetensors"), &tensors());
}

/// Name and shape of each tensor.
pub(crate) fn tensors() -> Vec<(String, Vec<usize>)> {
    let kv_width = NUM_KV_HEADS * HEAD_DIM;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB_SIZE, HIDDEN_SIZE]),
        ("model.norm.weight".to_string(), vec![HIDDEN_SIZE]),
        ("lm_head.weight".to_string(), vec![VOCAB_SIZE, HIDDEN_SIZE]),
    ];
    for layer in 0..NUM_LAYERS {
        let parts: [(&str, Vec<usize>); 9] = [
            ("input_layernorm", vec![HIDDEN_SIZE]),
            ("post_attention_layernorm", vec![HIDDEN_SIZE]),
            ("self_attn.q_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
            ("self_attn.k_proj", vec![kv_width, HIDDEN_SIZE]),
            ("self_attn.v_proj", vec![kv_width, HIDDEN_SIZE]),
            ("self_attn.o_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
            ("mlp.gate_proj", vec![INTERMEDIATE_SIZE, HIDDEN_SIZE]),
            ("mlp.up_proj", vec![INTERMEDIATE_SIZE, HIDDEN_SIZE]),
            ("mlp.down_proj", vec![HIDDEN_SIZE, INTERMEDIATE_SIZE]),
        ];
        tensors.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    tensors
}

/// Eight bytes of length, a JSON header, then the elements: norms are 1, everything else is drawn from a fixed sequence.
fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    let mut state = 1u32;
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let drawn = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            let value = if shape.len() == 1 { 1.0 } else { drawn * 0.6 };
            data.extend_from_slice(&value.to_le_bytes());
        }
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], header.as_bytes(), &data].concat()).unwrap();
}
