//! Random orders of calls against one sequence at a time.

use std::collections::VecDeque;

use super::super::detokenizer::{Detokenizer, generated_text};
use super::super::stopping::Stopping;
use super::caller::{Caller, Reference};
use super::*;

/// The reference: everything a request is told, computed alone and straight ahead.
pub(super) fn alone(request: &NewRequest, vocabulary: &Vocabulary) -> VecDeque<Generation> {
    let Prompt::Ids(mut ids) = request.prompt.clone() else { panic!("tests give ids") };
    if request.truncate > 0 && ids.len() > request.truncate {
        ids.drain(..ids.len() - request.truncate);
    }
    let prompt_len = ids.len();
    let mut stopping = Stopping::new(request.stopping.clone());
    let mut detokenizer = Detokenizer::new(prompt_len);
    let mut told = VecDeque::new();
    loop {
        let token = next_token(&ids, &request.sampling);
        let prompt_tokens = (request.prefill_logprobs && ids.len() == prompt_len).then(|| {
            let later = (1..prompt_len).map(|index| target_logprob(&ids[..index], ids[index]));
            // NaN is not equal to itself: the first entry is compared as 0 on both sides.
            Tokens::prompt(&ids, [0.0].into_iter().chain(later).collect(), vocabulary).unwrap()
        });
        ids.push(token.id);
        let text = detokenizer.next_text(&ids, vocabulary).unwrap();
        let reason = stopping.push(token.id, &text, &[EOS]);
        told.push_back(Generation {
            request_id: request.id,
            prompt_tokens,
            tokens: Tokens {
                ids: vec![token.id],
                logprobs: vec![token.logprob],
                texts: vec![text],
                is_special: vec![token.id == EOS],
            },
            generated_text: reason.map(|finish_reason| GeneratedText {
                text: generated_text(&ids, prompt_len, vocabulary).unwrap(),
                generated_tokens: stopping.generated(),
                finish_reason,
                seed: (!request.sampling.is_greedy()).then_some(request.sampling.seed),
            }),
            top_tokens: Vec::new(),
        });
        if reason.is_some() {
            return told;
        }
    }
}

pub(super) fn random_request(id: u64, lots: &mut Lots) -> NewRequest {
    let mut request = request(id, 1 + lots.below(60));
    request.stopping.max_new_tokens = 1 + lots.below(30) as u32;
    request.stopping.ignore_eos = lots.once_in(2);
    if lots.once_in(3) {
        request.stopping.stop_sequences = vec!["e".to_string(), "\u{e4}".to_string()];
    }
    if lots.once_in(4) {
        request.sampling.do_sample = true;
        request.sampling.seed = lots.below(1000) as u64;
    }
    if lots.once_in(4) {
        request.chunk_len = Some(1 + lots.below(40));
    }
    if lots.once_in(5) {
        request.truncate = 1 + lots.below(20);
    }
    request.prefill_logprobs = lots.once_in(6);
    request
}

/// When steps are computed.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// When they are asked for.
    OnDemand,
    /// After the answer to the one before.
    Ahead,
    /// Launched before the texts of the one before are made.
    Asynchronous,
}

/// Requests of all kinds, which must be told to the last bit what they are told alone.
struct Alone(Vocabulary);

impl Reference for Alone {
    type ToCome = VecDeque<Generation>;

    fn request(&mut self, id: u64, lots: &mut Lots) -> (NewRequest, Self::ToCome) {
        let request = random_request(id, lots);
        let to_come = alone(&request, &self.0);
        (request, to_come)
    }

    fn compare(&mut self, to_come: &mut Self::ToCome, mut told: Generation) -> bool {
        if let Some(prompt) = &mut told.prompt_tokens {
            assert!(prompt.logprobs[0].is_nan());
            prompt.logprobs[0] = 0.0;
        }
        assert_eq!(Some(told), to_come.pop_front());
        to_come.is_empty()
    }
}

fn run(seed: u64, mode: Mode, calls: usize) {
    let options = EngineOptions { run_ahead: mode != Mode::OnDemand, ..options() };
    let harness = match mode {
        Mode::Asynchronous => Harness::asynchronous(options, 400),
        Mode::OnDemand | Mode::Ahead => Harness::new(options, 400),
    };
    Caller::new(seed, harness, Alone(byte_vocabulary(&["<end>"]))).run(calls);
}

#[test]
fn any_order_of_calls_gives_every_request_what_it_gets_alone() {
    for seed in 0..10 {
        run(seed, Mode::Ahead, 1000);
        run(seed, Mode::Asynchronous, 1000);
    }
}

#[test]
fn running_ahead_changes_nothing_but_the_time() {
    for seed in 0..5 {
        run(seed, Mode::OnDemand, 1000);
    }
}
