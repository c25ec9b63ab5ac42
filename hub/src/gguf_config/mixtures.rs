//! Architectures with experts.

use serde_json::{Value as Json, json};

use super::architectures::{Builder, llama};
use crate::error::HubError;

/// Mixtral, which calls itself `llama` and has experts.
pub(super) fn mixtral(builder: &mut Builder<'_>) -> Result<(), HubError> {
    llama(builder)?;
    let experts = Experts::read(builder)?;
    builder.extend(json!({
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": experts.width,
        "model_type": "mixtral",
        "num_experts_per_tok": experts.num_chosen,
        "num_local_experts": experts.count,
    }));
    Ok(())
}

/// Qwen1.5 and Qwen2 with experts: the weights of the chosen ones are not normalised.
pub(super) fn qwen2(builder: &mut Builder<'_>) -> Result<(), HubError> {
    qwen(builder, false)?;
    let shared = builder.shape("blk.0.ffn_gate_shexp.weight").map(|shape| shape[0]);
    builder.set("shared_expert_intermediate_size", shared);
    Ok(())
}

/// Qwen3 with experts, whose weights add up to 1.
pub(super) fn qwen3(builder: &mut Builder<'_>) -> Result<(), HubError> {
    qwen(builder, true)
}

fn qwen(builder: &mut Builder<'_>, is_normalized: bool) -> Result<(), HubError> {
    super::architectures::qwen(builder)?;
    let experts = Experts::read(builder)?;
    let num_layers = builder.known("num_hidden_layers").min(MAX_LAYERS);
    let is_dense = |layer: &u64| builder.has(&format!("blk.{layer}.ffn_gate.weight"));
    let dense: Vec<u64> = (0..num_layers).filter(is_dense).collect();
    builder.extend(json!({
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": is_normalized,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.num_chosen,
    }));
    Ok(())
}

/// DBRX: the weights of the chosen experts add up to 1.
pub(super) fn dbrx(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rope()?;
    let experts = Experts::read(builder)?;
    let rope_theta = builder.number("rope.freq_base")?.unwrap_or(10_000.0);
    builder.extend(json!({
        "attn_config": {
            "clip_qkv": builder.number("attention.clamp_kqv")?.filter(|&limit| limit > 0.0),
            "kv_n_heads": builder.known("num_key_value_heads"),
            "rope_theta": rope_theta,
        },
        "d_model": builder.known("hidden_size"),
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": experts.width,
            "moe_normalize_expert_weights": 1.0,
            "moe_num_experts": experts.count,
            "moe_top_k": experts.num_chosen,
        },
        "max_seq_len": builder.known("max_position_embeddings"),
        "n_heads": builder.known("num_attention_heads"),
        "n_layers": builder.known("num_hidden_layers"),
    }));
    Ok(())
}

/// DeepSeek 2 and 3: `deepseek2`, the latter where the choice is corrected by a bias.
pub(super) fn deepseek(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    let experts = Experts::read(builder)?;
    let num_layers = builder.known("num_hidden_layers").min(MAX_LAYERS);
    let is_v3 = (0..num_layers).any(|layer| builder.has(&format!("blk.{layer}.exp_probs_b.bias")));
    if is_v3 {
        builder.set("model_type", "deepseek_v3");
        builder.set("architectures", json!(["DeepseekV3ForCausalLM"]));
    }
    let rotary_dim = builder.rotary_dim()?;
    builder.scaled_rope(rotary_dim)?;
    // Files for absorbed projections have a head's lengths under another name.
    let length = |builder: &Builder<'_>, name: &str| match builder.integer(&format!("{name}_mla"))? {
        Some(length) => Ok(Some(length)),
        None => builder.integer(name),
    };
    let key_length = length(builder, "attention.key_length")?.unwrap_or_else(|| builder.known("head_dim"));
    let value_length = length(builder, "attention.value_length")?.unwrap_or(key_length);
    let latent = "attention.kv_lora_rank";
    let latent_dim = builder.integer(latent)?.ok_or_else(|| builder.reader.lacks(&builder.key(latent)))?;
    let groups = builder.integer("expert_group_count")?.unwrap_or(1).max(1);
    let is_grouped = groups > 1;
    let method = match (is_v3, is_grouped) {
        (true, _) => "noaux_tc",
        (false, true) => "group_limited_greedy",
        (false, false) => "greedy",
    };
    builder.extend(json!({
        "attention_bias": false,
        "first_k_dense_replace": builder.integer("leading_dense_block_count")?.unwrap_or(0),
        "hidden_act": "silu",
        "kv_lora_rank": latent_dim,
        "moe_intermediate_size": experts.width,
        "n_group": groups,
        "n_routed_experts": experts.count,
        "n_shared_experts": builder.integer("expert_shared_count")?.filter(|&count| count > 0),
        "norm_topk_prob": builder.bool("expert_weights_norm")?.unwrap_or(false),
        "num_experts_per_tok": experts.num_chosen,
        "num_key_value_heads": builder.known("num_attention_heads"),
        "q_lora_rank": builder.integer("attention.q_lora_rank")?.filter(|&rank| rank > 0),
        "qk_nope_head_dim": key_length.saturating_sub(rotary_dim),
        "qk_rope_head_dim": rotary_dim,
        "routed_scaling_factor": builder.number("expert_weights_scale")?.unwrap_or(1.0),
        "topk_group": builder.integer("expert_group_used_count")?.unwrap_or(1),
        "topk_method": method,
        "v_head_dim": value_length,
    }));
    scale_scores(builder)
}

/// YaRN's factor on the scores: the file has a tenth of its weight.
fn scale_scores(builder: &mut Builder<'_>) -> Result<(), HubError> {
    let Some(tenth) = builder.number("rope.scaling.yarn_log_multiplier")? else { return Ok(()) };
    if let Some(Json::Object(scaling)) = builder.config.get_mut("rope_scaling") {
        // The published models have the same weight for the rotation, where it cancels out. Ten times a number of 32 bits.
        let weight = (tenth * 10.0 * 1e6).round() / 1e6;
        scaling.insert("mscale".to_owned(), weight.into());
        scaling.insert("mscale_all_dim".to_owned(), weight.into());
    }
    Ok(())
}

/// Of a hostile file, which could name any number.
const MAX_LAYERS: u64 = 1 << 12;

/// The experts' numbers.
struct Experts {
    count: u64,
    num_chosen: u64,
    width: u64,
}

impl Experts {
    fn read(builder: &Builder<'_>) -> Result<Self, HubError> {
        let reader = builder.reader;
        let num_layers = builder.known("num_hidden_layers").min(MAX_LAYERS);
        let shape = |layer| builder.shape(&format!("blk.{layer}.ffn_gate_exps.weight"));
        let width = match (0..num_layers).find_map(shape) {
            Some(&[_, width, _]) => width as u64,
            _ => {
                let width = builder.integer("expert_feed_forward_length")?;
                width.unwrap_or_else(|| builder.known("intermediate_size"))
            }
        };
        let count = reader.size(&builder.key("expert_count"))?;
        let num_chosen = reader.size(&builder.key("expert_used_count"))?;
        Ok(Self { count, num_chosen, width })
    }
}
