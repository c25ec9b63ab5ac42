//! The models as their papers have them: one token after the other in f64, no cache, no batch, nothing shared with the executor.

use crate::fixture::{Fixture, Kind};
use crate::{mixtures, relatives};

/// The logits after every token.
pub(crate) fn logits(fixture: &Fixture, tokens: &[u32]) -> Vec<Vec<f64>> {
    if relatives::is_relative(fixture.kind) {
        return relatives::logits(fixture, tokens);
    }
    let embedding = matrix(fixture, "model.embed_tokens.weight", fixture.vocab_size);
    let mut stream: Vec<Vec<f64>> = tokens.iter().map(|&id| embedding[id as usize].clone()).collect();
    for layer in 0..fixture.num_layers {
        let prefix = format!("model.layers.{layer}");
        let normed = norm(fixture, &stream, &format!("{prefix}.input_layernorm"));
        let attention = if fixture.kind == Kind::Latent { mixtures::attention } else { attention };
        add(&mut stream, &attention(fixture, &normed, &format!("{prefix}.self_attn")));
        let normed = norm(fixture, &stream, &format!("{prefix}.post_attention_layernorm"));
        let has_experts = fixture.values(&format!("{prefix}.mlp.gate.weight")).is_some();
        let mlp = if has_experts { mixtures::experts } else { mlp };
        add(&mut stream, &mlp(fixture, &normed, &format!("{prefix}.mlp")));
    }
    let head = if fixture.is_tied { "model.embed_tokens" } else { "lm_head" };
    linear(fixture, &norm(fixture, &stream, "model.norm"), head)
}

fn attention(fixture: &Fixture, x: &[Vec<f64>], prefix: &str) -> Vec<Vec<f64>> {
    let head_dim = fixture.head_dim;
    let mut queries = linear(fixture, x, &format!("{prefix}.q_proj"));
    let mut keys = linear(fixture, x, &format!("{prefix}.k_proj"));
    let values = linear(fixture, x, &format!("{prefix}.v_proj"));
    queries.iter_mut().chain(&mut keys).for_each(|row| assert!(row.len() % head_dim == 0));
    for rows in [&mut queries, &mut keys] {
        for (position, row) in rows.iter_mut().enumerate() {
            row.chunks_exact_mut(head_dim).for_each(|head| rotate(head, position));
        }
    }
    let group = fixture.num_heads / fixture.num_kv_heads;
    let mut out = vec![Vec::new(); x.len()];
    for (position, out) in out.iter_mut().enumerate() {
        for head in 0..fixture.num_heads {
            let part = |row: &[f64], head: usize| row[head * head_dim..(head + 1) * head_dim].to_vec();
            let query = part(&queries[position], head);
            let scores: Vec<f64> = (0..=position)
                .map(|other| dot(&query, &part(&keys[other], head / group)) / (head_dim as f64).sqrt())
                .collect();
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            let mut mixed = vec![0.0; head_dim];
            for (other, score) in scores.iter().enumerate() {
                let value = part(&values[other], head / group);
                mixed.iter_mut().zip(value).for_each(|(mixed, value)| *mixed += score.exp() / sum * value);
            }
            out.extend(mixed);
        }
    }
    linear(fixture, &out, &format!("{prefix}.o_proj"))
}

/// Turns the pairs `(i, i + head_dim / 2)` by `position * 100^(-2 i / head_dim)`.
fn rotate(head: &mut [f64], position: usize) {
    let half = head.len() / 2;
    for pair in 0..half {
        let angle = position as f64 * 100_f64.powf(-(pair as f64) / half as f64);
        let (first, second) = (head[pair], head[pair + half]);
        head[pair] = first * angle.cos() - second * angle.sin();
        head[pair + half] = second * angle.cos() + first * angle.sin();
    }
}

pub(crate) fn mlp(fixture: &Fixture, x: &[Vec<f64>], prefix: &str) -> Vec<Vec<f64>> {
    let mut inner = linear(fixture, x, &format!("{prefix}.gate_proj"));
    let up = linear(fixture, x, &format!("{prefix}.up_proj"));
    for (gate, up) in inner.iter_mut().zip(&up) {
        gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
    }
    linear(fixture, &inner, &format!("{prefix}.down_proj"))
}

pub(crate) fn norm(fixture: &Fixture, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
    norm_with(fixture, x, name, 1e-5)
}

pub(crate) fn norm_with(fixture: &Fixture, x: &[Vec<f64>], name: &str, eps: f64) -> Vec<Vec<f64>> {
    let weight = matrix(fixture, &format!("{name}.weight"), 1).remove(0);
    let norm = |row: &Vec<f64>| {
        let scale = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().zip(&weight).map(|(value, weight)| value * scale * weight).collect()
    };
    x.iter().map(norm).collect()
}

pub(crate) fn linear(fixture: &Fixture, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
    let weight_name = format!("{name}.weight");
    let out_features = fixture.values(&weight_name).unwrap().len() / x[0].len();
    let weight = matrix(fixture, &weight_name, out_features);
    let bias = fixture.values(&format!("{name}.bias"));
    let output = |row: &Vec<f64>| {
        let bias = |index: usize| bias.map_or(0.0, |bias| f64::from(bias[index]));
        weight.iter().enumerate().map(|(index, weight)| dot(row, weight) + bias(index)).collect()
    };
    x.iter().map(output).collect()
}

pub(crate) fn matrix(fixture: &Fixture, name: &str, rows: usize) -> Vec<Vec<f64>> {
    let values: Vec<f64> = fixture.values(name).unwrap().iter().map(|&value| f64::from(value)).collect();
    values.chunks_exact(values.len() / rows).map(<[f64]>::to_vec).collect()
}

pub(crate) fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

pub(crate) fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
