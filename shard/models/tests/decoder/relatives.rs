//! Relatives of families that none of the published tiny models shows: their tensors, their plain reference, and the tests.

use backend::DType;
use serde_json::{Value, json};

use crate::fixture::{Fixture, Kind, Stored};
use crate::reference::{self, add, dot, linear, matrix, mlp, norm};
use crate::{alone, assert_close, in_pieces, on_ranks, options, tolerance, tolerance_in_pieces};

/// Of the embedding of [`Kind::NormedSums`].
const NARROW: usize = 24;
/// Elements of a head that [`Kind::HeadNorms`] turns.
const ROTARY_DIM: usize = 6;
const POSITIONS: usize = 128;
const EPS: f64 = 1e-5;

pub(crate) fn is_relative(kind: Kind) -> bool {
    !matches!(kind, Kind::Llama | Kind::Experts | Kind::Latent)
}

/// The sizes by which Baichuan's models are told apart, and a KV head for each query head where there is no other choice.
pub(crate) fn resize(fixture: &mut Fixture) {
    match fixture.kind {
        Kind::NormedSums => (fixture.num_kv_heads, fixture.hidden_size) = (6, 72),
        Kind::LinearBiases => (fixture.num_kv_heads, fixture.hidden_size) = (6, 5120),
        Kind::NormedHead => (fixture.num_kv_heads, fixture.vocab_size) = (6, 125_696),
        _ => {}
    }
}

/// What differs from llama's configuration.
pub(crate) fn change(config: &mut Value, fixture: &Fixture) {
    let changes = match fixture.kind {
        Kind::NormedSums => json!({
            "architectures": ["OPTForCausalLM"], "model_type": "opt", "do_layer_norm_before": false,
            "word_embed_proj_dim": NARROW, "ffn_dim": fixture.intermediate_size, "tie_word_embeddings": true,
            "activation_function": "relu", "head_dim": null,
        }),
        Kind::HeadNorms => json!({
            "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "use_qkv_bias": false,
            "qk_layernorm": true, "use_parallel_residual": true, "layer_norm_eps": EPS,
            "partial_rotary_factor": ROTARY_DIM as f64 / fixture.head_dim as f64,
        }),
        Kind::LinearBiases => json!({
            "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "model_max_length": POSITIONS,
            "max_position_embeddings": null, "rope_theta": null,
        }),
        Kind::NormedHead => json!({"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}),
        _ => return,
    };
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
}

/// Adds all tensors.
pub(crate) fn fill(fixture: &mut Fixture) {
    let (hidden, inner, vocabulary) = (fixture.hidden_size, fixture.intermediate_size, fixture.vocab_size);
    let (heads, kv_heads, head_dim) = (fixture.num_heads, fixture.num_kv_heads, fixture.head_dim);
    let layer_norm = |fixture: &mut Fixture, name: &str| {
        fixture.add(&format!("{name}.weight"), &[hidden]);
        fixture.add(&format!("{name}.bias"), &[hidden]);
    };
    if fixture.kind == Kind::NormedSums {
        fixture.add("model.decoder.embed_tokens.weight", &[vocabulary, NARROW]);
        fixture.add("model.decoder.embed_positions.weight", &[POSITIONS + 2, hidden]);
        fixture.add("model.decoder.project_in.weight", &[hidden, NARROW]);
        fixture.add("model.decoder.project_out.weight", &[NARROW, hidden]);
    } else {
        fixture.add("model.embed_tokens.weight", &[vocabulary, hidden]);
        fixture.add("lm_head.weight", &[vocabulary, hidden]);
    }
    for layer in 0..fixture.num_layers {
        if fixture.kind == Kind::NormedSums {
            let prefix = format!("model.decoder.layers.{layer}");
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                fixture.add_linear(&format!("{prefix}.self_attn.{name}"), [hidden, hidden], true);
            }
            fixture.add_linear(&format!("{prefix}.fc1"), [inner, hidden], true);
            fixture.add_linear(&format!("{prefix}.fc2"), [hidden, inner], true);
            layer_norm(fixture, &format!("{prefix}.self_attn_layer_norm"));
            layer_norm(fixture, &format!("{prefix}.final_layer_norm"));
            continue;
        }
        let prefix = format!("model.layers.{layer}");
        let linears = [
            ("self_attn.o_proj", [hidden, heads * head_dim]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ];
        for (name, shape) in linears {
            fixture.add_linear(&format!("{prefix}.{name}"), shape, false);
        }
        if fixture.kind == Kind::HeadNorms {
            for (name, heads) in [("q", heads), ("k", kv_heads), ("v", kv_heads)] {
                let shape = [heads * head_dim, hidden];
                fixture.add_linear(&format!("{prefix}.self_attn.{name}_proj"), shape, false);
                for head in 0..if name == "v" { 0 } else { heads } {
                    let name = format!("{prefix}.self_attn.{name}_layernorm.norms.{head}.weight");
                    fixture.add(&name, &[head_dim]);
                }
            }
            layer_norm(fixture, &format!("{prefix}.input_layernorm"));
        } else {
            let shape = [3 * heads * head_dim, hidden];
            fixture.add_linear(&format!("{prefix}.self_attn.W_pack"), shape, false);
            fixture.add(&format!("{prefix}.input_layernorm.weight"), &[hidden]);
            fixture.add(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden]);
        }
    }
    match fixture.kind {
        Kind::NormedSums => {}
        Kind::HeadNorms => layer_norm(fixture, "model.norm"),
        _ => fixture.add("model.norm.weight", &[hidden]),
    }
}

/// The logits after every token.
pub(crate) fn logits(fixture: &Fixture, tokens: &[u32]) -> Vec<Vec<f64>> {
    match fixture.kind {
        Kind::NormedSums => opt(fixture, tokens),
        Kind::HeadNorms => stablelm(fixture, tokens),
        _ => baichuan(fixture, tokens),
    }
}

fn opt(fixture: &Fixture, tokens: &[u32]) -> Vec<Vec<f64>> {
    let rows = embedded(fixture, "model.decoder.embed_tokens.weight", tokens);
    let mut x = linear(fixture, &rows, "model.decoder.project_in");
    let positions = matrix(fixture, "model.decoder.embed_positions.weight", POSITIONS + 2);
    add(&mut x, &positions[2..2 + tokens.len()]);
    for layer in 0..fixture.num_layers {
        let prefix = format!("model.decoder.layers.{layer}");
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"]
            .map(|name| linear(fixture, &x, &format!("{prefix}.self_attn.{name}")));
        let mixed = attention(fixture, [&q, &k, &v], |_, _| 0.0);
        add(&mut x, &linear(fixture, &mixed, &format!("{prefix}.self_attn.out_proj")));
        x = layer_norm(fixture, &x, &format!("{prefix}.self_attn_layer_norm"));
        let mut inner = linear(fixture, &x, &format!("{prefix}.fc1"));
        inner.iter_mut().flatten().for_each(|value| *value = value.max(0.0));
        add(&mut x, &linear(fixture, &inner, &format!("{prefix}.fc2")));
        x = layer_norm(fixture, &x, &format!("{prefix}.final_layer_norm"));
    }
    let narrow = linear(fixture, &x, "model.decoder.project_out");
    linear(fixture, &narrow, "model.decoder.embed_tokens")
}

fn stablelm(fixture: &Fixture, tokens: &[u32]) -> Vec<Vec<f64>> {
    let mut x = embedded(fixture, "model.embed_tokens.weight", tokens);
    for layer in 0..fixture.num_layers {
        let prefix = format!("model.layers.{layer}");
        let normed = layer_norm(fixture, &x, &format!("{prefix}.input_layernorm"));
        let project = |name: &str| linear(fixture, &normed, &format!("{prefix}.self_attn.{name}_proj"));
        let [q, k] = ["q", "k"].map(|name| {
            let mut rows = project(name);
            for (position, row) in rows.iter_mut().enumerate() {
                for (index, head) in row.chunks_exact_mut(fixture.head_dim).enumerate() {
                    let weight = format!("{prefix}.self_attn.{name}_layernorm.norms.{index}.weight");
                    normalise(head, fixture.values(&weight).unwrap(), None);
                    rotate(&mut head[..ROTARY_DIM], position);
                }
            }
            rows
        });
        let mixed = attention(fixture, [&q, &k, &project("v")], |_, _| 0.0);
        add(&mut x, &linear(fixture, &mixed, &format!("{prefix}.self_attn.o_proj")));
        add(&mut x, &mlp(fixture, &normed, &format!("{prefix}.mlp")));
    }
    linear(fixture, &layer_norm(fixture, &x, "model.norm"), "lm_head")
}

fn baichuan(fixture: &Fixture, tokens: &[u32]) -> Vec<Vec<f64>> {
    let has_biases = fixture.kind == Kind::LinearBiases;
    // The paper's slopes: of four heads 2^-2 to 2^-8, then every other one of eight heads.
    let slopes = [0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125];
    let mut x = embedded(fixture, "model.embed_tokens.weight", tokens);
    for layer in 0..fixture.num_layers {
        let prefix = format!("model.layers.{layer}");
        let normed = norm(fixture, &x, &format!("{prefix}.input_layernorm"));
        let packed = linear(fixture, &normed, &format!("{prefix}.self_attn.W_pack"));
        let width = fixture.num_heads * fixture.head_dim;
        let [mut q, mut k, v] = [0, 1, 2].map(|part| {
            packed.iter().map(|row| row[part * width..(part + 1) * width].to_vec()).collect::<Vec<_>>()
        });
        for (position, row) in q.iter_mut().enumerate().chain(k.iter_mut().enumerate()) {
            if !has_biases {
                row.chunks_exact_mut(fixture.head_dim).for_each(|head| rotate(head, position));
            }
        }
        let bias = |head: usize, distance| if has_biases { -slopes[head] * distance } else { 0.0 };
        let mixed = attention(fixture, [&q, &k, &v], bias);
        add(&mut x, &linear(fixture, &mixed, &format!("{prefix}.self_attn.o_proj")));
        let normed = norm(fixture, &x, &format!("{prefix}.post_attention_layernorm"));
        add(&mut x, &mlp(fixture, &normed, &format!("{prefix}.mlp")));
    }
    let mut head = matrix(fixture, "lm_head.weight", fixture.vocab_size);
    if fixture.kind == Kind::NormedHead {
        for row in &mut head {
            let length = dot(row, row).sqrt();
            row.iter_mut().for_each(|value| *value /= length);
        }
    }
    let normed = norm(fixture, &x, "model.norm");
    normed.iter().map(|x| head.iter().map(|row| dot(row, x)).collect()).collect()
}

fn embedded(fixture: &Fixture, name: &str, tokens: &[u32]) -> Vec<Vec<f64>> {
    let table = matrix(fixture, name, fixture.vocab_size);
    tokens.iter().map(|&id| table[id as usize].clone()).collect()
}

/// Causal attention; `bias` is of a head and a distance.
fn attention(
    fixture: &Fixture,
    [q, k, v]: [&[Vec<f64>]; 3],
    bias: impl Fn(usize, f64) -> f64,
) -> Vec<Vec<f64>> {
    let head_dim = fixture.head_dim;
    let group = fixture.num_heads / fixture.num_kv_heads;
    let mix = |position: usize| {
        let of_head = |head: usize| {
            let part = |row: &[f64], head: usize| row[head * head_dim..(head + 1) * head_dim].to_vec();
            let query = part(&q[position], head);
            let score = |other: usize| {
                let product = dot(&query, &part(&k[other], head / group)) / (head_dim as f64).sqrt();
                (product + bias(head, (position - other) as f64)).exp()
            };
            let weights: Vec<f64> = (0..=position).map(score).collect();
            let total: f64 = weights.iter().sum();
            let values: Vec<_> = (0..=position).map(|other| part(&v[other], head / group)).collect();
            let element =
                |index: usize| values.iter().zip(&weights).map(|(value, w)| value[index] * w / total).sum();
            (0..head_dim).map(element).collect::<Vec<f64>>()
        };
        (0..fixture.num_heads).flat_map(of_head).collect()
    };
    (0..q.len()).map(mix).collect()
}

fn layer_norm(fixture: &Fixture, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
    let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
    let mut x = x.to_vec();
    let (weight, bias) = (fixture.values(&weight).unwrap(), fixture.values(&bias));
    x.iter_mut().for_each(|row| normalise(row, weight, bias));
    x
}

fn normalise(x: &mut [f64], weight: &[f32], bias: Option<&[f32]>) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / x.len() as f64;
    for (index, value) in x.iter_mut().enumerate() {
        let bias = bias.map_or(0.0, |bias| f64::from(bias[index]));
        *value = (*value - mean) / (variance + EPS).sqrt() * f64::from(weight[index]) + bias;
    }
}

/// Turns the pairs `(i, i + len / 2)` by `position * 100^(-2 i / len)`.
fn rotate(part: &mut [f64], position: usize) {
    let half = part.len() / 2;
    for pair in 0..half {
        let angle = position as f64 * 100_f64.powf(-(pair as f64) / half as f64);
        let (first, second) = (part[pair], part[pair + half]);
        part[pair] = first * angle.cos() - second * angle.sin();
        part[pair + half] = second * angle.cos() + first * angle.sin();
    }
}

fn check(kind: Kind, num_tokens: usize) {
    for (stored, weights) in [(Stored::F32, DType::F32), (Stored::Bf16, DType::BF16)] {
        let fixture = Fixture::of(kind, stored, false);
        let tokens = fixture.tokens(num_tokens, 5);
        let expected = reference::logits(&fixture, &tokens);
        let spread = expected.iter().flatten().map(|logit| logit.abs()).fold(0.0, f64::max);
        assert!((0.5..30.0).contains(&spread), "logits up to {spread} hide or invent differences");
        // A row of length 1 is no bf16 number any more; it is rounded as the library rounds it.
        let rounding = if kind == Kind::NormedHead && weights == DType::BF16 { 0.05 } else { 0.0 };
        // Sums of thousands of products are less exact.
        let factor = if kind == Kind::LinearBiases { 20.0 } else { 3.0 };
        let load =
            models::LoadOptions { kv_dtype: Some(DType::F32.into()), dtype: Some(weights), ..options() };
        for sizes in [&[num_tokens][..], &[5, 1]] {
            alone(&fixture, &load, |decoder| {
                let found = in_pieces(decoder, &tokens, sizes);
                let tolerance = tolerance_in_pieces(decoder, sizes, weights, DType::F32);
                assert_close(&found, &expected, rounding + factor * tolerance);
            });
        }
        if weights == DType::F32 {
            for world_size in [2, 3] {
                let all =
                    on_ranks(&fixture, world_size, &load, |decoder| in_pieces(decoder, &tokens, &[5, 4]));
                assert_close(&all[0], &expected, factor * tolerance(DType::F32, DType::F32));
                assert!(
                    all.iter().all(|logits| *logits == all[0]),
                    "{world_size} ranks are not bitwise equal"
                );
            }
        }
    }
}

#[test]
fn norms_of_sums_and_a_narrow_embedding_equal_the_reference() {
    check(Kind::NormedSums, 19);
}

#[test]
fn norms_of_each_head_and_parallel_parts_equal_the_reference() {
    check(Kind::HeadNorms, 19);
}

#[test]
fn linear_biases_instead_of_a_rotation_equal_the_reference() {
    check(Kind::LinearBiases, 13);
}

#[test]
fn logits_of_rows_of_length_one_equal_the_reference() {
    check(Kind::NormedHead, 9);
}
