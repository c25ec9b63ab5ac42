//! Random orders of calls, by a caller that knows what every request must be told.

use std::collections::BTreeMap;

use super::*;

/// Where requests come from, and what they must be told.
pub(super) trait Reference {
    /// What a request is still to be told.
    type ToCome;

    /// Any request of this id, and what it must be told.
    fn request(&mut self, id: u64, lots: &mut Lots) -> (NewRequest, Self::ToCome);

    /// Compares what a request is told with what was to come next; whether that was the last.
    fn compare(&mut self, to_come: &mut Self::ToCome, told: Generation) -> bool;
}

pub(super) struct Caller<R: Reference> {
    harness: Harness,
    pub(super) reference: R,
    /// What is still to come, of requests that were started and neither ended nor cancelled.
    to_come: BTreeMap<u64, R::ToCome>,
    /// Requests of every cached batch, ended ones included, as the engine must know them.
    batches: BTreeMap<u64, Vec<u64>>,
    next_id: u64,
    lots: Lots,
    /// Requests that came to their end.
    pub(super) ended: usize,
}

impl<R: Reference> Caller<R> {
    pub(super) fn new(seed: u64, harness: Harness, reference: R) -> Self {
        let (to_come, batches) = (BTreeMap::new(), BTreeMap::new());
        Self { harness, reference, to_come, batches, next_id: 0, lots: Lots(seed), ended: 0 }
    }

    /// Makes so many calls, and clears up. At least one of fifty calls must have ended a request.
    pub(super) fn run(&mut self, calls: usize) {
        for _ in 0..calls {
            self.one_call();
            if self.batches.is_empty() {
                assert_eq!(self.harness.blocks_used(), 0, "no batch, no blocks");
            }
        }
        assert!(self.ended > calls / 50, "only {} requests came to their end", self.ended);
        self.harness.clear(None);
        assert_eq!(self.harness.blocks_used(), 0);
    }

    fn any_batch(&mut self) -> Option<u64> {
        let count = self.batches.len();
        (count > 0).then(|| *self.batches.keys().nth(self.lots.below(count)).unwrap())
    }

    fn one_call(&mut self) {
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
            let (request, to_come) = self.reference.request(self.next_id, &mut self.lots);
            self.to_come.insert(request.id, to_come);
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
        for told in step.generations {
            let request = told.request_id;
            let to_come = self.to_come.get_mut(&request).expect("of a request that still runs");
            if self.reference.compare(to_come, told) {
                self.to_come.remove(&request);
            }
        }
        let running: Vec<u64> = members.iter().copied().filter(|id| self.to_come.contains_key(id)).collect();
        self.ended += members.len() - running.len();
        let Some(batch) = step.batch else {
            assert!(running.is_empty());
            return;
        };
        assert_eq!((batch.id, &batch.request_ids), (id, &members));
        assert!(!running.is_empty(), "a batch without running requests must not be kept");
        self.batches.insert(id, members.clone());
        if running.len() < members.len() && !self.lots.once_in(4) {
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
