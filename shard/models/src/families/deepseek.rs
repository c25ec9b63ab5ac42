//! DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): attention over latent vectors, and experts of which some are shared.

use backend::{
    Activation, ExpertGroups, GroupRank, RopeFrequencies, RopeStyle, RouterScores, Routing,
    WeightNormalization,
};
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::activation;
use super::{experts, rope};
use crate::ModelError;
use crate::spec::{
    DecoderSpec, EmbeddingSpec, ExpertsSpec, GatedSpec, LatentAttentionSpec, LatentProjectionSpec, LayerSpec,
    LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormSpec, ResidualSpec, SharedExpertSpec,
};

/// Epsilon of the norms of latent vectors, which is no key of the configuration.
const LATENT_EPS: f32 = 1e-6;
/// The widest parts in use have 512 elements.
const MAX_HEAD_DIM: usize = 2048;

/// What a version takes for granted where config.json is silent.
struct Version {
    first_dense: usize,
    routing: fn(&mut ConfigReader<'_>) -> Routing,
    has_correction: bool,
    has_mlp_bias: bool,
    rope_style: RopeStyle,
    max_position_embeddings: usize,
}

/// DeepSeek-V2.
pub(super) fn v2(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let version = Version {
        first_dense: 0,
        routing: v2_routing,
        has_correction: false,
        has_mlp_bias: reader.flag_or("mlp_bias", false),
        rope_style: RopeStyle::Interleaved,
        max_position_embeddings: 2048,
    };
    let spec = version.spec(&mut reader);
    reader.finish(spec)
}

/// DeepSeek-V3 and R1.
pub(super) fn v3(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let is_interleaved = reader.flag_or("rope_interleave", true);
    let version = Version {
        first_dense: 3,
        routing: v3_routing,
        has_correction: true,
        has_mlp_bias: false,
        rope_style: if is_interleaved { RopeStyle::Interleaved } else { RopeStyle::Half },
        max_position_embeddings: 4096,
    };
    let spec = version.spec(&mut reader);
    reader.finish(spec)
}

/// Softmax, possibly limited to the groups with the best expert; the weights are not normalised.
fn v2_routing(reader: &mut ConfigReader<'_>) -> Routing {
    expect(reader, "scoring_func", "softmax");
    if reader.flag_or("norm_topk_prob", false) {
        reader.wrong("norm_topk_prob: found true, which deepseek_v2 does not have, expected false");
    }
    let method = reader.config().str("topk_method").unwrap_or("greedy");
    let groups = match method {
        "greedy" => None,
        "group_limited_greedy" => Some(ExpertGroups {
            count: reader.size("n_group"),
            num_chosen: reader.size("topk_group"),
            rank: GroupRank::Largest,
        }),
        other => {
            reader.wrong(format!("topk_method: found {other:?}, expected greedy or group_limited_greedy"));
            None
        }
    };
    let num_chosen = reader.size("num_experts_per_tok");
    let scale = reader.number_or("routed_scaling_factor", 1.0) as f32;
    Routing { groups, scale, ..experts::softmax(num_chosen, false) }
}

/// The logistic function, the choice corrected by a bias and limited to the groups with the best two.
fn v3_routing(reader: &mut ConfigReader<'_>) -> Routing {
    expect(reader, "scoring_func", "sigmoid");
    expect(reader, "topk_method", "noaux_tc");
    let is_normalized = reader.flag_or("norm_topk_prob", true);
    Routing {
        num_chosen: reader.size_or("num_experts_per_tok", 8),
        scores: RouterScores::Sigmoid,
        groups: Some(ExpertGroups {
            count: reader.size_or("n_group", 8),
            num_chosen: reader.size_or("topk_group", 4),
            rank: GroupRank::LargestTwo,
        }),
        normalization: if is_normalized { WeightNormalization::Sum } else { WeightNormalization::None },
        scale: reader.number_or("routed_scaling_factor", 2.5) as f32,
    }
}

/// Refuses another rule than the version's.
fn expect(reader: &mut ConfigReader<'_>, key: &str, expected: &str) {
    if let Some(other) = reader.config().str(key).filter(|&found| found != expected) {
        reader.wrong(format!("{key}: found {other:?}, expected {expected}"));
    }
}

impl Version {
    fn spec(&self, reader: &mut ConfigReader<'_>) -> DecoderSpec {
        let hidden_size = reader.size("hidden_size");
        let eps = reader.number_or("rms_norm_eps", 1e-6) as f32;
        let activation = activation(reader, "hidden_act", Activation::Silu);
        let num_layers = reader.num_layers("num_hidden_layers");
        let attention = self.attention(reader);
        let intermediate_size = reader.size("intermediate_size");
        // Zero is allowed: no layer is without experts.
        let first_dense =
            reader.read(reader.config().usize("first_k_dense_replace")).unwrap_or(self.first_dense);
        let frequency = reader.size_or("moe_layer_freq", 1);
        let experts = self.experts(reader, activation);
        let dense = |prefix: &str| {
            let linear = |name: &str| LinearSpec::new(&format!("{prefix}.mlp.{name}"), self.has_mlp_bias);
            let (gate_proj, up_proj, down_proj) =
                (linear("gate_proj"), linear("up_proj"), linear("down_proj"));
            MlpSpec::Gated { intermediate_size, activation, gate_proj, up_proj, down_proj }
        };
        let layers = (0..num_layers).map(|index| {
            let prefix = format!("model.layers.{index}");
            let has_experts = index >= first_dense && index.is_multiple_of(frequency);
            LayerSpec {
                residual: ResidualSpec::pre_norm(
                    NormSpec::rms(&format!("{prefix}.input_layernorm"), eps),
                    NormSpec::rms(&format!("{prefix}.post_attention_layernorm"), eps),
                ),
                mixer: MixerSpec::LatentAttention(attention(&format!("{prefix}.self_attn"))),
                mlp: if has_experts {
                    MlpSpec::Experts(Box::new(experts(&format!("{prefix}.mlp"))))
                } else {
                    dense(&prefix)
                },
            }
        });
        let layers = layers.collect();
        let is_tied = reader.flag_or("tie_word_embeddings", false);
        // Layers after the last guess further tokens.
        let further = reader.read(reader.config().usize("num_nextn_predict_layers")).unwrap_or(0);
        let further =
            (num_layers..num_layers + further.min(64)).map(|index| format!("model.layers.{index}."));
        DecoderSpec {
            vocab_size: reader.size("vocab_size"),
            hidden_size,
            max_position_embeddings: reader.size_or("max_position_embeddings", self.max_position_embeddings),
            embedding: EmbeddingSpec::tokens("model.embed_tokens.weight"),
            layers,
            norm: NormSpec::rms("model.norm", eps),
            lm_head: LmHeadSpec::new(is_tied),
            logits_multiplier: 1.0,
            logits_soft_cap: None,
            other_tensors: further.collect(),
        }
    }

    /// Reads the attention once; the result gives each layer its own tensor names.
    fn attention(&self, reader: &mut ConfigReader<'_>) -> impl Fn(&str) -> LatentAttentionSpec + use<> {
        let num_heads = reader.size("num_attention_heads");
        let [plain_dim, rotary_dim, value_dim] =
            ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|key| head_dim(reader, key));
        let latent_dim = head_dim(reader, "kv_lora_rank");
        if rotary_dim % 2 == 1 && !reader.has_mistakes() {
            reader.wrong(format!("qk_rope_head_dim: found {rotary_dim}, expected an even number"));
        }
        let q_width = match reader.config().raw.get("q_lora_rank") {
            Some(value) if value.is_null() => None,
            _ => Some(reader.size_or("q_lora_rank", 1536)),
        };
        let has_bias = reader.flag_or("attention_bias", false);
        let frequencies = rope::frequencies(reader, rotary_dim.max(2));
        let rope = RopeFrequencies { style: self.rope_style, ..frequencies };
        let scale = rope::softmax_factor(reader) / ((plain_dim + rotary_dim) as f32).sqrt();
        move |prefix| {
            let linear = |name: &str, has_bias| LinearSpec::new(&format!("{prefix}.{name}"), has_bias);
            let down = |width, proj: &str, norm: &str| LatentProjectionSpec {
                width,
                proj: linear(proj, has_bias),
                norm: NormSpec::rms(&format!("{prefix}.{norm}"), LATENT_EPS),
            };
            LatentAttentionSpec {
                num_heads,
                plain_dim,
                rotary_dim,
                value_dim,
                latent_dim,
                scale,
                rope: rope.clone(),
                q_down: q_width.map(|width| down(width, "q_a_proj", "q_a_layernorm")),
                q_proj: linear(if q_width.is_some() { "q_b_proj" } else { "q_proj" }, false),
                kv_down: down(latent_dim, "kv_a_proj_with_mqa", "kv_a_layernorm"),
                kv_up: linear("kv_b_proj", false),
                o_proj: linear("o_proj", has_bias),
            }
        }
    }

    /// Reads the experts once; the result gives each layer its own tensor names.
    fn experts(
        &self,
        reader: &mut ConfigReader<'_>,
        activation: Activation,
    ) -> impl Fn(&str) -> ExpertsSpec + use<> {
        let num_experts = experts::count(reader, "n_routed_experts", None);
        let intermediate_size = reader.size("moe_intermediate_size");
        let routing = (self.routing)(reader);
        experts::check(reader, &routing, num_experts);
        let num_shared = match reader.config().raw.get("n_shared_experts") {
            None | Some(serde_json::Value::Null) => 0,
            Some(_) => experts::count(reader, "n_shared_experts", None),
        };
        let has_correction = self.has_correction;
        move |prefix| ExpertsSpec {
            intermediate_size,
            activation,
            routing,
            router: LinearSpec::new(&format!("{prefix}.gate"), false),
            correction: has_correction.then(|| format!("{prefix}.gate.e_score_correction_bias")),
            experts: experts::numbered(&format!("{prefix}.experts"), num_experts, experts::NAMES),
            shared: (num_shared > 0).then(|| SharedExpertSpec {
                intermediate_size: num_shared * intermediate_size,
                projections: GatedSpec::new(&format!("{prefix}.shared_experts"), experts::NAMES),
                gate: None,
            }),
        }
    }
}

/// Elements of a part of a head.
fn head_dim(reader: &mut ConfigReader<'_>, key: &str) -> usize {
    let found = reader.size(key);
    if found > MAX_HEAD_DIM {
        reader.wrong(format!("{key}: found {found}, expected at most {MAX_HEAD_DIM}"));
        return 1;
    }
    found
}
