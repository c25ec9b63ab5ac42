//! Random orders of calls against one sequence at a time.

use std::collections::{BTreeMap, VecDeque};

use super::super::detokenizer::{Detokenizer, generated_text};
use super::super::stopping::Stopping;
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

/// A caller that knows what every request must be told.
struct Caller {
    harness: Harness,
    vocabulary: Vocabulary,
    /// What is still to come, of requests that were started and neither ended nor cancelled.
    to_come: BTreeMap<u64, VecDeque<Generation>>,
    /// Requests of every cached batch, ended ones included, as the engine must know them.
    batches: BTreeMap<u64, Vec<u64>>,
    next_id: u64,
    lots: Lots,
    ended: usize,
}

impl Caller {
    fn new(seed: u64, mode: Mode) -> Self {
        let options = EngineOptions { run_ahead: mode != Mode::OnDemand, ..options() };
        let harness = match mode {
            Mode::Asynchronous => Harness::asynchronous(options, 400),
            Mode::OnDemand | Mode::Ahead => Harness::new(options, 400),
        };
        Self {
            harness,
            vocabulary: byte_vocabulary(&["<end>"]),
            to_come: BTreeMap::new(),
            batches: BTreeMap::new(),
            next_id: 0,
            lots: Lots(seed),
            ended: 0,
        }
    }

    fn any_batch(&mut self) -> Option<u64> {
        let count = self.batches.len();
        (count > 0).then(|| *self.batches.keys().nth(self.lots.below(count)).unwrap())
    }

    fn one_step(&mut self) {
        match self.lots.below(10) {
            0 | 1 if self.to_come.len() < 24 => self.prefill(),
            2 => self.cancel(),
            3 if self.lots.once_in(8) => self.clear(),
            _ => self.decode(),
        }
    }

    fn prefill(&mut self) {
        let cached = if self.lots.once_in(3) { None } else { self.any_batch() };
        let id = 1000 + self.next_id;
        let count = 1 + self.lots.below(3);
        let mut members = cached.map(|id| self.batches.remove(&id).unwrap()).unwrap_or_default();
        let mut requests = Vec::new();
        for _ in 0..count {
            let request = random_request(self.next_id, &mut self.lots);
            self.to_come.insert(request.id, alone(&request, &self.vocabulary));
            members.push(request.id);
            self.next_id += 1;
            requests.push(request);
        }
        let step = self.harness.prefill(id, requests, cached).unwrap();
        self.check(cached.unwrap_or(id), members, step);
    }

    fn decode(&mut self) {
        let Some(first) = self.any_batch() else { return };
        let mut ids = vec![first];
        let others: Vec<u64> = self.batches.keys().copied().filter(|id| *id != first).collect();
        ids.extend(others.into_iter().filter(|_| self.lots.once_in(3)));
        let members = ids.iter().flat_map(|id| self.batches.remove(id).unwrap()).collect();
        let step = self.harness.decode(&ids).unwrap();
        self.check(first, members, step);
    }

    fn check(&mut self, id: u64, members: Vec<u64>, step: StepReply) {
        for mut generation in step.generations {
            if let Some(prompt) = &mut generation.prompt_tokens {
                assert!(prompt.logprobs[0].is_nan());
                prompt.logprobs[0] = 0.0;
            }
            let to_come = self.to_come.get_mut(&generation.request_id).expect("of a request that still runs");
            assert_eq!(Some(generation), to_come.pop_front());
        }
        self.to_come.retain(|_, to_come| !to_come.is_empty());
        let running: Vec<u64> = members.iter().copied().filter(|id| self.to_come.contains_key(id)).collect();
        self.ended += members.len() - running.len();
        let Some(batch) = step.batch else {
            assert!(running.is_empty());
            return;
        };
        assert_eq!((batch.id, &batch.request_ids), (id, &members));
        self.batches.insert(id, members.clone());
        if running.is_empty() {
            panic!("a batch without running requests must not be kept");
        } else if running.len() < members.len() && !self.lots.once_in(4) {
            self.filter(id, running);
        }
    }

    fn cancel(&mut self) {
        let Some(id) = self.any_batch() else { return };
        let members = self.batches[&id].clone();
        let kept: Vec<u64> = members.iter().copied().filter(|_| !self.lots.once_in(4)).collect();
        if kept.iter().any(|id| self.to_come.contains_key(id)) {
            self.filter(id, kept);
        }
    }

    fn filter(&mut self, id: u64, kept: Vec<u64>) {
        let batch = self.harness.filter(id, &kept).unwrap();
        assert_eq!(batch.request_ids, kept);
        for dropped in self.batches.insert(id, kept.clone()).unwrap() {
            if !kept.contains(&dropped) {
                self.to_come.remove(&dropped);
            }
        }
    }

    fn clear(&mut self) {
        let Some(id) = self.any_batch() else { return };
        self.harness.clear(Some(id));
        for dropped in self.batches.remove(&id).unwrap() {
            self.to_come.remove(&dropped);
        }
    }
}

fn run(seed: u64, mode: Mode, steps: usize) {
    let mut caller = Caller::new(seed, mode);
    for _ in 0..steps {
        caller.one_step();
        if caller.batches.is_empty() {
            assert_eq!(caller.harness.blocks_used(), 0, "no batch, no blocks");
        }
    }
    assert!(caller.ended > steps / 50, "only {} requests came to their end", caller.ended);
    caller.harness.clear(None);
    assert_eq!(caller.harness.blocks_used(), 0);
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
