//! Mixtures of experts and attention over latent vectors: their tensors, their plain reference, and the tests of both.

use backend::DType;
use serde_json::{Value, json};

use crate::fixture::{Fixture, Kind, Stored};
use crate::reference::{self, dot, linear, mlp, norm_with};
use crate::{alone, assert_close, in_pieces, on_ranks, options, tolerance, tolerance_in_pieces};

const NUM_EXPERTS: usize = 6;
const EXPERT_WIDTH: usize = 20;
const SHARED_WIDTH: usize = 28;
const PLAIN_DIM: usize = 10;
const ROTARY_DIM: usize = 6;
const VALUE_DIM: usize = 7;
const LATENT_DIM: usize = 19;
const QUERY_LATENT_DIM: usize = 18;

/// Whether queries come from a narrow vector: both ways are used.
fn has_query_latent(fixture: &Fixture) -> bool {
    fixture.has_biases
}

/// Adds what llama does not have to its configuration.
pub(crate) fn change(config: &mut Value, fixture: &Fixture) {
    let changes = match fixture.kind {
        Kind::Experts => json!({
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
            "qkv_bias": fixture.has_biases, "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH, "norm_topk_prob": false,
            "shared_expert_intermediate_size": SHARED_WIDTH, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "head_dim": fixture.head_dim,
        }),
        Kind::Latent => json!({
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
            "q_lora_rank": has_query_latent(fixture).then_some(QUERY_LATENT_DIM), "kv_lora_rank": LATENT_DIM,
            "qk_nope_head_dim": PLAIN_DIM, "qk_rope_head_dim": ROTARY_DIM, "v_head_dim": VALUE_DIM,
            "first_k_dense_replace": 1, "n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 3, "n_group": 3,
            "topk_group": 2, "moe_intermediate_size": EXPERT_WIDTH, "n_shared_experts": 1, "norm_topk_prob": true,
            "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1,
        }),
        _ => return,
    };
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
}

/// Adds the tensors of a layer but for its norms.
pub(crate) fn add_layer(fixture: &mut Fixture, layer: usize) {
    let (hidden, heads) = (fixture.hidden_size, fixture.num_heads);
    let has_bias = fixture.has_biases;
    let prefix = format!("model.layers.{layer}.self_attn");
    let is_latent = fixture.kind == Kind::Latent;
    if is_latent {
        let queries = heads * (PLAIN_DIM + ROTARY_DIM);
        if has_query_latent(fixture) {
            fixture.add_linear(&format!("{prefix}.q_a_proj"), [QUERY_LATENT_DIM, hidden], has_bias);
            fixture.add(&format!("{prefix}.q_a_layernorm.weight"), &[QUERY_LATENT_DIM]);
            fixture.add_linear(&format!("{prefix}.q_b_proj"), [queries, QUERY_LATENT_DIM], false);
        } else {
            fixture.add_linear(&format!("{prefix}.q_proj"), [queries, hidden], false);
        }
        let down = format!("{prefix}.kv_a_proj_with_mqa");
        fixture.add_linear(&down, [LATENT_DIM + ROTARY_DIM, hidden], has_bias);
        fixture.add(&format!("{prefix}.kv_a_layernorm.weight"), &[LATENT_DIM]);
        fixture.add_linear(
            &format!("{prefix}.kv_b_proj"),
            [heads * (PLAIN_DIM + VALUE_DIM), LATENT_DIM],
            false,
        );
        fixture.add_linear(&format!("{prefix}.o_proj"), [hidden, heads * VALUE_DIM], has_bias);
    } else {
        let (queries, keys) = (heads * fixture.head_dim, fixture.num_kv_heads * fixture.head_dim);
        fixture.add_linear(&format!("{prefix}.q_proj"), [queries, hidden], has_bias);
        fixture.add_linear(&format!("{prefix}.k_proj"), [keys, hidden], has_bias);
        fixture.add_linear(&format!("{prefix}.v_proj"), [keys, hidden], has_bias);
        fixture.add_linear(&format!("{prefix}.o_proj"), [hidden, queries], false);
    }
    let prefix = format!("model.layers.{layer}.mlp");
    if is_latent && layer == 0 {
        return add_gated(fixture, &prefix, fixture.intermediate_size);
    }
    fixture.add(&format!("{prefix}.gate.weight"), &[NUM_EXPERTS, hidden]);
    for expert in 0..NUM_EXPERTS {
        add_gated(fixture, &format!("{prefix}.experts.{expert}"), EXPERT_WIDTH);
    }
    if is_latent {
        fixture.add(&format!("{prefix}.gate.e_score_correction_bias"), &[NUM_EXPERTS]);
        add_gated(fixture, &format!("{prefix}.shared_experts"), EXPERT_WIDTH);
    } else {
        add_gated(fixture, &format!("{prefix}.shared_expert"), SHARED_WIDTH);
        fixture.add(&format!("{prefix}.shared_expert_gate.weight"), &[1, hidden]);
    }
}

fn add_gated(fixture: &mut Fixture, prefix: &str, width: usize) {
    let hidden = fixture.hidden_size;
    fixture.add_linear(&format!("{prefix}.gate_proj"), [width, hidden], false);
    fixture.add_linear(&format!("{prefix}.up_proj"), [width, hidden], false);
    fixture.add_linear(&format!("{prefix}.down_proj"), [hidden, width], false);
}

/// Keys and values of every head in full, as the paper begins.
pub(crate) fn attention(fixture: &Fixture, x: &[Vec<f64>], prefix: &str) -> Vec<Vec<f64>> {
    let queries = if has_query_latent(fixture) {
        let narrow = linear(fixture, x, &format!("{prefix}.q_a_proj"));
        let narrow = norm_with(fixture, &narrow, &format!("{prefix}.q_a_layernorm"), 1e-6);
        linear(fixture, &narrow, &format!("{prefix}.q_b_proj"))
    } else {
        linear(fixture, x, &format!("{prefix}.q_proj"))
    };
    let down = linear(fixture, x, &format!("{prefix}.kv_a_proj_with_mqa"));
    let latent: Vec<_> = down.iter().map(|row| row[..LATENT_DIM].to_vec()).collect();
    let latent = norm_with(fixture, &latent, &format!("{prefix}.kv_a_layernorm"), 1e-6);
    let up = linear(fixture, &latent, &format!("{prefix}.kv_b_proj"));
    let turned = |part: &[f64], position: usize| -> Vec<f64> {
        let turn = |pair: usize| {
            let angle = position as f64 * 100_f64.powf(-(2.0 * pair as f64) / ROTARY_DIM as f64);
            let (a, b) = (part[2 * pair], part[2 * pair + 1]);
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        };
        (0..ROTARY_DIM / 2).flat_map(turn).collect()
    };
    let mut out = vec![Vec::new(); x.len()];
    for (position, out) in out.iter_mut().enumerate() {
        for head in 0..fixture.num_heads {
            let query = &queries[position][head * (PLAIN_DIM + ROTARY_DIM)..][..PLAIN_DIM + ROTARY_DIM];
            let (plain, rotary) = query.split_at(PLAIN_DIM);
            let rotary = turned(rotary, position);
            let part = |other: usize| {
                up[other][head * (PLAIN_DIM + VALUE_DIM)..][..PLAIN_DIM + VALUE_DIM].split_at(PLAIN_DIM)
            };
            let score = |other: usize| {
                let shared = turned(&down[other][LATENT_DIM..], other);
                (dot(plain, part(other).0) + dot(&rotary, &shared)) / ((PLAIN_DIM + ROTARY_DIM) as f64).sqrt()
            };
            let weights: Vec<f64> = (0..=position).map(|other| score(other).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..VALUE_DIM).map(|index| {
                let values =
                    weights.iter().enumerate().map(|(other, weight)| weight / total * part(other).1[index]);
                values.sum::<f64>()
            }));
        }
    }
    linear(fixture, &out, &format!("{prefix}.o_proj"))
}

/// All experts on all tokens, and of their results what the router chose.
pub(crate) fn experts(fixture: &Fixture, x: &[Vec<f64>], prefix: &str) -> Vec<Vec<f64>> {
    let logits = linear(fixture, x, &format!("{prefix}.gate"));
    let results: Vec<_> =
        (0..NUM_EXPERTS).map(|expert| mlp(fixture, x, &format!("{prefix}.experts.{expert}"))).collect();
    let sigmoid = |logit: f64| 1.0 / (1.0 + (-logit).exp());
    let shared = if fixture.kind == Kind::Latent {
        mlp(fixture, x, &format!("{prefix}.shared_experts"))
    } else {
        let gates = linear(fixture, x, &format!("{prefix}.shared_expert_gate"));
        let mut shared = mlp(fixture, x, &format!("{prefix}.shared_expert"));
        for (row, gate) in shared.iter_mut().zip(&gates) {
            row.iter_mut().for_each(|value| *value *= sigmoid(gate[0]));
        }
        shared
    };
    let choose = |logits: &[f64]| -> Vec<(usize, f64)> {
        if fixture.kind == Kind::Latent {
            let correction = fixture.values(&format!("{prefix}.gate.e_score_correction_bias")).unwrap();
            let scores: Vec<f64> = logits.iter().map(|&logit| sigmoid(logit)).collect();
            let mut ranks: Vec<f64> = scores.iter().zip(correction).map(|(s, &c)| s + f64::from(c)).collect();
            // Groups of two: their best two are all of them.
            let groups: Vec<f64> = ranks.chunks(2).map(|group| group.iter().sum()).collect();
            let best = top(&groups, 2);
            ranks
                .iter_mut()
                .enumerate()
                .filter(|(index, _)| !best.contains(&(index / 2)))
                .for_each(|(_, r)| *r = 0.0);
            let chosen = top(&ranks, 3);
            let total: f64 = chosen.iter().map(|&index| scores[index]).sum();
            chosen.into_iter().map(|index| (index, scores[index] / total * 1.5)).collect()
        } else {
            let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
            top(logits, 2).into_iter().map(|index| (index, logits[index].exp() / total)).collect()
        }
    };
    let mut out = shared;
    for (token, out) in out.iter_mut().enumerate() {
        for (expert, weight) in choose(&logits[token]) {
            out.iter_mut().zip(&results[expert][token]).for_each(|(out, value)| *out += weight * value);
        }
    }
    out
}

fn top(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

fn fixtures(stored: Stored) -> impl Iterator<Item = Fixture> {
    let kinds = [(Kind::Experts, true), (Kind::Latent, false), (Kind::Latent, true)];
    kinds.into_iter().map(move |(kind, has_biases)| Fixture::of(kind, stored, has_biases))
}

#[test]
fn experts_and_latent_vectors_equal_the_reference() {
    for (stored, weights) in [(Stored::F32, DType::F32), (Stored::Bf16, DType::BF16)] {
        for fixture in fixtures(stored) {
            let tokens = fixture.tokens(37, 5);
            let expected = reference::logits(&fixture, &tokens);
            let spread = expected.iter().flatten().map(|logit| logit.abs()).fold(0.0, f64::max);
            assert!((0.5..20.0).contains(&spread), "logits up to {spread} hide or invent differences");
            let options =
                models::LoadOptions { kv_dtype: Some(DType::F32.into()), dtype: Some(weights), ..options() };
            alone(&fixture, &options, |decoder| {
                for sizes in [&[37][..], &[20], &[5, 1, 16, 15], &[]] {
                    let found = in_pieces(decoder, &tokens, sizes);
                    let tolerance = tolerance_in_pieces(decoder, sizes, weights, DType::F32);
                    assert_close(&found, &expected, tolerance);
                }
            });
        }
    }
}

#[test]
fn ranks_share_experts_and_heads() {
    for fixture in fixtures(Stored::F32) {
        let tokens = fixture.tokens(17, 9);
        let expected = reference::logits(&fixture, &tokens);
        for world_size in 1..=6 {
            let all =
                on_ranks(&fixture, world_size, &options(), |decoder| in_pieces(decoder, &tokens, &[9, 4]));
            assert_close(&all[0], &expected, tolerance(DType::F32, DType::F32));
            assert!(all.iter().all(|logits| *logits == all[0]), "{world_size} ranks are not bitwise equal");
        }
    }
}

/// Layers after the last, which guess further tokens, are not loaded.
#[test]
fn layers_that_guess_further_tokens_are_passed_over() {
    let mut fixture = Fixture::of(Kind::Latent, Stored::F32, false);
    let tokens = fixture.tokens(3, 2);
    let run = |fixture: &Fixture| alone(fixture, &options(), |decoder| in_pieces(decoder, &tokens, &[3]));
    let expected = run(&fixture);
    fixture.add("model.layers.2.eh_proj.weight", &[4, 8]);
    fixture.add("model.layers.2.mlp.experts.0.gate_proj.weight", &[4, 8]);
    fixture.write();
    assert!(run(&fixture) == expected);
}
