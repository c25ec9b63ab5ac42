//! Whether two answers part at a near-tie, by the reference's own distribution at the step where they part.
//!
//! A greedy step is a near-tie when the two best log-probabilities are. A sampled step inverts the distribution function at a number
//! that seed and position decide, so it is one when that number lies at the border of two tokens.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::golden::{FLOAT32, Token, tokens_of};
use crate::http;
use crate::workload::Answer;

/// Tokens of a distribution that are asked for; a server that is to be asked needs `--max-top-n-tokens` as high. What has
/// less than all of the mass in them cannot be judged, and is no near-tie.
pub const CHOICES: usize = 512;

/// Logits that move by the near-tie bound move the distribution function by a quarter of it at most.
const BORDER: f64 = FLOAT32.near_tie / 4.0;

/// The step at which a request's answer is the reference's for the last time, and what could be said there.
#[derive(Debug, Clone)]
pub struct Fork {
    /// The reference's choice.
    pub chosen: u32,
    /// Ids and log-probabilities, best first.
    pub choices: Vec<(u32, f64)>,
    /// The number in [0, 1) that decides; none of a greedy request.
    pub uniform: Option<f64>,
}

/// Whether `answer` says what `undisturbed` says up to a near-tie of `request`, which is asked for once more.
///
/// # Errors
/// The server does not answer, or not as it did.
pub fn parts_answers(port: u16, request: &Value, answer: &Answer, undisturbed: &Answer) -> Result<bool> {
    let mut pairs = answer.tokens.iter().zip(&undisturbed.tokens);
    let Some(step) = pairs.position(|(ours, expected)| ours.id != expected.id) else {
        // Other texts, log-probabilities or ends of the same tokens have no such excuse.
        return Ok(false);
    };
    let common = answer.tokens[..step].iter().zip(&undisturbed.tokens);
    if !common.into_iter().all(|(ours, expected)| is_same(ours, expected)) {
        return Ok(false);
    }
    let fork = fork(port, request, step)?;
    ensure!(
        fork.chosen == undisturbed.tokens[step].id,
        "token {step} of {request} is {} when it is asked for again, and was {}",
        fork.chosen,
        undisturbed.tokens[step].id
    );
    Ok(fork.is_near_tie(answer.tokens[step].id))
}

fn is_same(ours: &Token, expected: &Token) -> bool {
    ours.text == expected.text && (ours.logprob - expected.logprob).abs() <= FLOAT32.logprob
}

/// What `request`, asked for alone, could say at `step`.
///
/// # Errors
/// There is no answer, or it is shorter.
pub fn fork(port: u16, request: &Value, step: usize) -> Result<Fork> {
    let mut request = request.clone();
    let parameters = &mut request["parameters"];
    (parameters["details"], parameters["max_new_tokens"]) = (json!(true), json!(step + 1));
    parameters["top_n_tokens"] = json!(CHOICES);
    let is_greedy = parameters["do_sample"] != true;
    let answer = http::post(port, "/generate", &request)?.json()?;
    let chosen = tokens_of(&answer)?.get(step).with_context(|| format!("no token {step} in {answer}"))?.id;
    let top: Vec<Token> = serde_json::from_value(answer["details"]["top_tokens"][step].clone())?;
    let choices = top.iter().map(|token| (token.id, token.logprob)).collect();
    let uniform = if is_greedy {
        None
    } else {
        let prompt = http::post(port, "/tokenize", &json!({"inputs": request["inputs"]}))?.json()?;
        let prompt = prompt.as_array().context("the tokens of the prompt")?.len();
        let seed = request["parameters"]["seed"].as_u64().context("a seed")?;
        Some(uniform(seed, (prompt + step) as u64))
    };
    Ok(Fork { chosen, choices, uniform })
}

impl Fork {
    /// Whether rounding may choose `other` as well as the reference's choice.
    pub fn is_near_tie(&self, other: u32) -> bool {
        match self.uniform {
            None => {
                // A second that is further away than the bound decides for all below it.
                let best = self.choices.first().map(|&(_, logprob)| logprob);
                let of_other = self.choices.iter().find(|(id, _)| *id == other).map(|&(_, logprob)| logprob);
                best.zip(of_other).is_some_and(|(best, other)| best - other < FLOAT32.near_tie)
            }
            Some(uniform) => {
                let at = |id| self.interval(id);
                let is_near = |(from, to): (f64, f64)| uniform >= from - BORDER && uniform < to + BORDER;
                self.is_whole() && at(self.chosen).is_some_and(is_near) && at(other).is_some_and(is_near)
            }
        }
    }

    /// Whether the choices have all of the mass.
    fn is_whole(&self) -> bool {
        let mass: f64 = self.choices.iter().map(|(_, logprob)| logprob.exp()).sum();
        (mass - 1.0).abs() < BORDER
    }

    /// Where a token lies in the distribution function, which runs through the ids upwards.
    fn interval(&self, id: u32) -> Option<(f64, f64)> {
        let below =
            self.choices.iter().filter(|(lower, _)| *lower < id).map(|(_, logprob)| logprob.exp()).sum();
        let own = self.choices.iter().find(|(own, _)| *own == id)?.1.exp();
        Some((below, below + own))
    }
}

/// The number in [0, 1) that decides at a position: Philox4x32-10 with the seed as key and the position as counter, as the shard's
/// sampling documents it. Written a second time, so that a shard that draws another number is not believed.
fn uniform(seed: u64, position: u64) -> f64 {
    const MULTIPLIERS: (u64, u64) = (0xD251_1F53, 0xCD9E_8D57);
    let low_half = |wide: u64| wide & 0xFFFF_FFFF;
    let mut counter = [low_half(position), position >> 32, 0, 0];
    let mut key = (low_half(seed), seed >> 32);
    for _ in 0..10 {
        let (first, second) = (MULTIPLIERS.0 * counter[0], MULTIPLIERS.1 * counter[2]);
        counter = [
            (second >> 32) ^ counter[1] ^ key.0,
            low_half(second),
            (first >> 32) ^ counter[3] ^ key.1,
            low_half(first),
        ];
        key = (low_half(key.0 + 0x9E37_79B9), low_half(key.1 + 0xBB67_AE85));
    }
    let bits = (counter[0] << 32 | counter[1]) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fork(choices: &[(u32, f64)], uniform: Option<f64>) -> Fork {
        let choices: Vec<_> = choices.iter().map(|&(id, probability)| (id, probability.ln())).collect();
        Fork { chosen: choices[0].0, choices, uniform }
    }

    #[test]
    fn numbers_are_those_of_the_generators_authors() {
        let bits = (0x6627_E8D5_u64 << 32 | 0xE169_C58D) >> 11;
        assert_eq!(uniform(0, 0), bits as f64 / (1u64 << 53) as f64);
    }

    #[test]
    fn greedy_answers_part_only_where_the_best_two_are_near() {
        let near = fork(&[(5, 0.4001), (9, 0.4), (1, 0.1999)], None);
        assert!(near.is_near_tie(9));
        assert!(!near.is_near_tie(1) && !near.is_near_tie(7), "the third, and one that is not there");
        assert!(!fork(&[(5, 0.41), (9, 0.4), (1, 0.19)], None).is_near_tie(9));
    }

    #[test]
    fn sampled_answers_part_only_where_the_number_lies_at_a_border() {
        let choices = [(5, 0.5), (2, 0.3), (9, 0.2)];
        // In order of ids: 2 up to 0.3, 5 up to 0.8, 9 up to 1.
        assert!(fork(&choices, Some(0.7999)).is_near_tie(9));
        assert!(fork(&choices, Some(0.3001)).is_near_tie(2));
        assert!(!fork(&choices, Some(0.3001)).is_near_tie(9));
        assert!(!fork(&choices, Some(0.5)).is_near_tie(9), "another number was drawn");
        assert!(!fork(&choices, Some(0.9)).is_near_tie(9), "the choice does not belong to the number");
        assert!(
            !fork(&choices[..2], Some(0.3001)).is_near_tie(2),
            "a part of the distribution proves nothing"
        );
    }
}
