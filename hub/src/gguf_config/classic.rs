//! Architectures after GPT-2's plan, and others whose feed-forward has no gate.

use serde_json::json;

use super::architectures::Builder;
use crate::error::HubError;

/// GPT-2: learned positions.
pub(super) fn gpt2(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_epsilon")?;
    let positions = builder.shape("position_embd.weight").map(|shape| shape[0] as u64);
    builder.extend(json!({
        "activation_function": "gelu_new",
        "n_inner": builder.known("intermediate_size"),
        "n_positions": positions.unwrap_or_else(|| builder.known("max_position_embeddings")),
    }));
    Ok(())
}

/// GPT-NeoX: `gptneox`.
pub(super) fn gpt_neox(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_eps")?;
    builder.partial_rope()?;
    let is_parallel = builder.bool("use_parallel_residual")?.unwrap_or(true);
    builder.extend(json!({
        "attention_bias": builder.has("blk.0.attn_qkv.bias"),
        "hidden_act": "gelu",
        "use_parallel_residual": is_parallel,
    }));
    Ok(())
}

/// BLOOM: linear biases for positions.
pub(super) fn bloom(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_epsilon")?;
    builder.set("seq_length", builder.known("max_position_embeddings"));
    builder.set("n_inner", builder.known("intermediate_size"));
    Ok(())
}

/// Falcon of 7B and its descendants. How many KV heads there are is what the tensor has: some files name the query heads.
pub(super) fn falcon(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_epsilon")?;
    builder.rope()?;
    let (heads, head_dim) = (builder.known("num_attention_heads"), builder.known("head_dim"));
    let rows = builder.shape("blk.0.attn_qkv.weight").map_or(0, |shape| shape[0] as u64);
    let kv_heads = (rows / head_dim).saturating_sub(heads) / 2;
    if kv_heads == 0 || kv_heads == heads || rows != (heads + 2 * kv_heads) * head_dim {
        let found =
            format!("falcon with blk.0.attn_qkv.weight of {rows} rows for {heads} heads of {head_dim}");
        return Err(builder.reader.unsupported(&found, "the layouts of 7B, 11B, 40B and 180B"));
    }
    let has_two_norms = builder.has("blk.0.attn_norm_2.weight");
    builder.extend(json!({
        "activation": "gelu",
        "alibi": false,
        "bias": builder.has("blk.0.attn_qkv.bias"),
        "ffn_hidden_size": builder.known("intermediate_size"),
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": has_two_norms || kv_heads > 1,
        "num_kv_heads": kv_heads,
        "num_ln_in_parallel_attn": if has_two_norms { 2 } else { 1 },
        "parallel_attn": true,
    }));
    Ok(())
}

/// MPT: linear biases, or learned positions where there are none.
pub(super) fn mpt(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_epsilon")?;
    let max_bias = builder.number("attention.max_alibi_bias")?.unwrap_or(0.0);
    let clamp = builder.number("attention.clamp_kqv")?.filter(|&limit| limit > 0.0);
    let heads = builder.known("num_attention_heads");
    let is_grouped = builder.known("num_key_value_heads") != heads;
    builder.extend(json!({
        "attn_config": {
            "alibi": max_bias > 0.0,
            "alibi_bias_max": max_bias,
            "attn_type": if is_grouped { "grouped_query_attention" } else { "multihead_attention" },
            "clip_qkv": clamp,
            "qk_ln": builder.has("blk.0.attn_q_norm.weight"),
        },
        "d_model": builder.known("hidden_size"),
        "learned_pos_emb": builder.has("position_embd.weight"),
        "max_seq_len": builder.known("max_position_embeddings"),
        "n_heads": heads,
        "n_inner": builder.known("intermediate_size"),
        "n_layers": builder.known("num_hidden_layers"),
        "no_bias": !builder.has("blk.0.attn_qkv.bias"),
        // A copy of the embedding may be there besides; it is not read.
        "tie_word_embeddings": true,
    }));
    Ok(())
}

/// StarCoder 2.
pub(super) fn starcoder2(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "norm_epsilon")?;
    builder.rope()?;
    builder.window()?;
    builder.set("hidden_act", "gelu_pytorch_tanh");
    builder.set("use_bias", builder.has("blk.0.attn_q.bias"));
    Ok(())
}

/// Phi-1 to Phi-2: `phi2`.
pub(super) fn phi(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_eps")?;
    builder.partial_rope()?;
    builder.set("hidden_act", "gelu_new");
    Ok(())
}

/// Command R and Aya: `command-r`.
pub(super) fn cohere(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_eps")?;
    builder.rope()?;
    builder.copy("logit_scale", "logit_scale")?;
    builder.extend(json!({
        "attention_bias": false,
        "hidden_act": "silu",
        "use_qk_norm": builder.has("blk.0.attn_q_norm.weight"),
    }));
    Ok(())
}
