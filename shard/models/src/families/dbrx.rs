//! DBRX (Databricks 2024): LayerNorms without biases, clamped queries, keys and values, and experts that lie in one tensor.

use backend::{Activation, Routing, WeightNormalization};
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, activation};
use super::experts;
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{
    DecoderSpec, EmbeddingSpec, ExpertsSpec, FusedColumns, FusedRows, GatedSpec, LinearSpec, MixerSpec,
    MlpSpec, NormSpec, ResidualSpec,
};

/// What is read, and where it is.
const NAMES: [(&str, &str); 12] = [
    ("hidden_size", "d_model"),
    ("num_attention_heads", "n_heads"),
    ("num_hidden_layers", "n_layers"),
    ("max_position_embeddings", "max_seq_len"),
    ("num_key_value_heads", "attn_config.kv_n_heads"),
    ("rope_theta", "attn_config.rope_theta"),
    ("clip_qkv", "attn_config.clip_qkv"),
    ("intermediate_size", "ffn_config.ffn_hidden_size"),
    ("moe_num_experts", "ffn_config.moe_num_experts"),
    ("moe_top_k", "ffn_config.moe_top_k"),
    ("hidden_act", "ffn_config.ffn_act_fn.name"),
    ("moe_normalize_expert_weights", "ffn_config.moe_normalize_expert_weights"),
];

/// Llama's arithmetic under other names.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    // The nested keys are what counts, whatever the same name says at the top.
    let mut nested = config.clone();
    NAMES.iter().filter(|(_, found)| found.contains('.')).for_each(|(read, _)| {
        nested.raw.remove(*read);
    });
    let is_normalized = nested.raw.get("ffn_config").and_then(|ffn| ffn.get("moe_normalize_expert_weights"));
    let is_plain = is_normalized.is_some_and(|value| value.is_null());
    let config = respelled(&nested, &NAMES);
    let mut reader = ConfigReader::new(&config);
    let activation = activation(&mut reader, "hidden_act", Activation::Silu);
    let dense =
        Dense { qkv_bias: false, o_bias: false, mlp_bias: false, activation, ..Dense::llama(&mut reader) };
    let mut spec = dense.spec(&mut reader);
    let clip_qkv = reader.nullable_number("clip_qkv", None).map(|limit| limit as f32);
    let num_experts = experts::count(&mut reader, "moe_num_experts", Some(4));
    let p = reader.number_or("moe_normalize_expert_weights", 1.0) as f32;
    let normalization = if is_plain { WeightNormalization::None } else { WeightNormalization::Norm(p) };
    let routing = Routing { normalization, ..experts::softmax(reader.size_or("moe_top_k", 1), false) };
    experts::check(&mut reader, &routing, num_experts);
    let intermediate_size = reader.size("intermediate_size");
    let hidden_size = spec.hidden_size;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let prefix = format!("transformer.blocks.{index}");
        let attention_prefix = format!("{prefix}.norm_attn_norm");
        layer.residual = ResidualSpec::pre_norm(
            NormSpec::layer(&format!("{attention_prefix}.norm_1"), false, 1e-5),
            NormSpec::layer(&format!("{attention_prefix}.norm_2"), false, 1e-5),
        );
        if let MixerSpec::Attention(attention) = &mut layer.mixer {
            let keys = attention.num_kv_heads * attention.head_dim;
            let qkv = format!("{attention_prefix}.attn.Wqkv");
            [attention.q_proj, attention.k_proj, attention.v_proj] =
                LinearSpec::fused(&qkv, false, [hidden_size, keys, keys]);
            attention.o_proj = LinearSpec::new(&format!("{attention_prefix}.attn.out_proj"), false);
            attention.clip_qkv = clip_qkv;
        }
        layer.mlp = MlpSpec::Experts(Box::new(ExpertsSpec {
            intermediate_size,
            activation,
            routing,
            router: LinearSpec::new(&format!("{prefix}.ffn.router.layer"), false),
            correction: None,
            experts: of_one_tensor(&format!("{prefix}.ffn.experts.mlp"), num_experts, intermediate_size),
            shared: None,
        }));
    }
    spec.embedding = EmbeddingSpec::tokens("transformer.wte.weight");
    spec.norm = NormSpec::layer("transformer.norm_f", false, 1e-5);
    reader.finish(spec)
}

/// Experts one after the other in tensors `[num_experts * width, hidden_size]`, the projection out the other way round.
fn of_one_tensor(prefix: &str, num_experts: usize, width: usize) -> Vec<GatedSpec> {
    let total = num_experts * width;
    let rows = |name: &str, first: usize| {
        let rows = Some(FusedRows { first, run: width, stride: total, total });
        LinearSpec { rows, ..LinearSpec::table(&format!("{prefix}.{name}")) }
    };
    let columns = |name: &str, first: usize| {
        let columns = Some(FusedColumns { first, total });
        LinearSpec { columns, ..LinearSpec::table(&format!("{prefix}.{name}")).transposed() }
    };
    let expert = |first| GatedSpec {
        gate_proj: rows("w1", first),
        up_proj: rows("v1", first),
        down_proj: columns("w2", first),
    };
    (0..num_experts).map(|index| expert(index * width)).collect()
}
