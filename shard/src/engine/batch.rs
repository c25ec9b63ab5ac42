//! A batch as a plain value: joining, filtering, what the next step computes. Nothing here touches a model.

use super::forward_input::Row;
use super::generation::{CachedBatch, Generation};
use super::request::NewBatch;
use super::sequence::{Sequence, SequenceContext};
use super::vocabulary::Vocabulary;

/// Requests that are computed together.
#[derive(Debug)]
pub(super) struct Batch {
    /// Its name: after a join, the first one's.
    pub id: u64,
    /// Its requests, finished ones included until it is filtered.
    pub sequences: Vec<Sequence>,
}

impl Batch {
    /// Checks the requests of a new batch and finds them a place in the cache.
    ///
    /// # Errors
    /// One line about the first request that cannot be served.
    pub(super) fn new(batch: NewBatch, context: &SequenceContext<'_>) -> Result<Self, String> {
        if batch.requests.is_empty() {
            return Err(format!("batch {} has no requests, expected at least one", batch.id));
        }
        let sequences = batch
            .requests
            .into_iter()
            .map(|request| Sequence::new(request, context))
            .collect::<Result<_, _>>()?;
        Ok(Self { id: batch.id, sequences })
    }

    /// Puts the requests of `other` after its own.
    pub(super) fn append(&mut self, mut other: Batch) {
        self.sequences.append(&mut other.sequences);
    }

    /// Keeps the given requests in the given order. When there are as many as before, nothing changes.
    ///
    /// # Errors
    /// The list is empty, or names a request twice or one that is not there; the batch is as before.
    pub(super) fn filter(&mut self, request_ids: &[u64]) -> Result<(), String> {
        if request_ids.is_empty() {
            return Err(format!("batch {} would keep no request, expected at least one", self.id));
        }
        let mut places = Vec::with_capacity(request_ids.len());
        for id in request_ids {
            let place = self.sequences.iter().position(|sequence| sequence.request_id == *id);
            match place {
                Some(place) if !places.contains(&place) => places.push(place),
                Some(_) => return Err(format!("request {id} of batch {} is listed twice", self.id)),
                None => return Err(format!("request {id} is not in batch {}", self.id)),
            }
        }
        if places.len() == self.sequences.len() {
            return Ok(());
        }
        let mut sequences: Vec<Option<Sequence>> = self.sequences.drain(..).map(Some).collect();
        self.sequences = places.into_iter().filter_map(|place| sequences[place].take()).collect();
        Ok(())
    }

    /// What the next forward pass has to compute: every unfinished request without a pending result.
    pub(super) fn rows(&self) -> impl Iterator<Item = Row> {
        self.sequences.iter().enumerate().filter_map(|(index, sequence)| {
            (!sequence.is_finished() && sequence.pending.is_none()).then_some(Row {
                sequence: index,
                from: sequence.computed_len,
                len: sequence.next_len,
            })
        })
    }

    /// As [`Batch::rows`], without requests whose next token has no place in the cache.
    pub(super) fn rows_with_slots(&self) -> impl Iterator<Item = Row> {
        self.rows().filter(|row| self.sequences[row.sequence].has_slots())
    }

    /// Checks that everything the next step computes has a place in the cache.
    ///
    /// # Errors
    /// One line about the first request that has not.
    pub(super) fn check_slots(&self) -> Result<(), String> {
        match self.rows().find(|row| !self.sequences[row.sequence].has_slots()) {
            None => Ok(()),
            Some(row) => {
                let sequence = &self.sequences[row.sequence];
                Err(format!(
                    "request {} has {} slots in the KV cache, its next step needs {}",
                    sequence.request_id,
                    sequence.num_slots,
                    row.from + row.len
                ))
            }
        }
    }

    /// Takes the pending results of all requests into them and plans the next step. Their texts are made by
    /// [`Batch::report`]: the next step can be on its way meanwhile.
    pub(super) fn advance(&mut self, max_prefill_tokens: usize) {
        self.sequences.iter_mut().for_each(Sequence::advance);
        self.plan_next_step(max_prefill_tokens);
    }

    /// What the next step computes of the requests that may go on, as far as that is known before [`Batch::report`].
    pub(super) fn rows_before_report(&self, vocabulary: &Vocabulary) -> Vec<Row> {
        self.rows_with_slots().filter(|row| self.sequences[row.sequence].may_go_on(vocabulary)).collect()
    }

    /// Makes the texts of what [`Batch::advance`] took and finds out who has ended. `is_reported` says of a request id
    /// whether this rank reports it.
    ///
    /// # Errors
    /// The tokenizer's own words; the batch is of no use then.
    pub(super) fn report(
        &mut self,
        vocabulary: &Vocabulary,
        is_reported: impl Fn(u64) -> bool,
    ) -> Result<Vec<Generation>, String> {
        let mut generations = Vec::with_capacity(self.sequences.len());
        for sequence in &mut self.sequences {
            let is_reported = is_reported(sequence.request_id);
            generations.extend(sequence.report(vocabulary, is_reported)?);
        }
        Ok(generations)
    }

    /// Prompts that are not done share `max_prefill_tokens`, the oldest first, at least one token each.
    fn plan_next_step(&mut self, max_prefill_tokens: usize) {
        let mut budget = max_prefill_tokens;
        for sequence in self.sequences.iter_mut().filter(|sequence| !sequence.is_finished()) {
            let remaining = sequence.ids.len() - sequence.computed_len;
            if sequence.computed_len < sequence.known_len {
                sequence.next_len = remaining.min(budget.max(1));
                budget = budget.saturating_sub(sequence.next_len);
            } else {
                sequence.next_len = remaining;
            }
        }
    }

    /// Whether every request has ended.
    pub(super) fn is_finished(&self) -> bool {
        self.sequences.iter().all(Sequence::is_finished)
    }

    /// What others are told of it.
    pub(super) fn describe(&self, block_size: usize) -> CachedBatch {
        let unfinished = self.sequences.iter().filter(|sequence| !sequence.is_finished());
        CachedBatch {
            id: self.id,
            request_ids: self.sequences.iter().map(|sequence| sequence.request_id).collect(),
            max_tokens: self.sequences.iter().map(|sequence| sequence.blocks.len() * block_size).sum(),
            current_tokens: unfinished.map(|sequence| sequence.next_len).sum(),
        }
    }
}
