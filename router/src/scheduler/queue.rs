//! The queue: which requests run next. A plain struct; the batching task owns it.
//!
//! First come, first served: nobody overtakes a request that does not fit yet. With room for `n` more tokens a short
//! request behind a long one waits, but no request starves.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use proto::v3::{Batch, Request};

use super::SchedulerError;
use super::block_allocator::BlockAllocator;
use super::entry::Entry;
use super::wire;

/// A request that was there each time when engines failed so often in a row, and got no token in between, is taken for
/// the cause: it is answered with an error before it uses up everybody's restarts.
const MAX_LOSSES: u32 = 3;

/// What the shards died of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LossCause {
    /// An engine failed at what it was given.
    Engine,
    /// They were killed, or nobody knows: no request can be blamed.
    Outside,
}

/// What the shards are, as far as batching goes.
#[derive(Clone, Debug)]
pub struct QueueSettings {
    /// Where KV blocks come from. Absent for padding models, whose shards allocate by themselves.
    pub allocator: Option<BlockAllocator>,
    /// Tokens of a KV block; prefill budgets are rounded up to it.
    pub block_size: u32,
    /// Extra tokens a speculating shard computes in a step.
    pub speculate: u32,
    /// Whether a prompt may be computed in pieces.
    pub supports_chunking: bool,
    /// Whether a request can go on behind tokens that other shards have generated.
    pub supports_resume: bool,
}

/// What the next batch may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Form no batch of fewer requests.
    pub min_size: Option<usize>,
    /// Form no batch of more requests.
    pub max_size: Option<usize>,
    /// Prompt tokens to compute.
    pub prefill_budget: u32,
    /// Tokens of prompts and answers together.
    pub token_budget: u32,
}

/// A batch that left the queue.
#[derive(Debug)]
pub struct NewBatch {
    /// The message for the shards.
    pub batch: Batch,
    /// Its entries by request id.
    pub entries: HashMap<u64, Entry>,
}

/// Why a candidate was or was not taken.
enum Verdict {
    Taken(u32, u32),
    /// Taken with only so many prompt tokens in this step; the budget is used up.
    TakenInPart(u32),
    Refused,
}

/// Requests that wait.
#[derive(Debug)]
pub struct Queue {
    settings: QueueSettings,
    waiting: VecDeque<(u64, Entry)>,
    next_request_id: u64,
    next_batch_id: u64,
    dropped: u64,
}

impl Queue {
    /// An empty queue.
    pub fn new(settings: QueueSettings) -> Self {
        Self { settings, waiting: VecDeque::new(), next_request_id: 0, next_batch_id: 0, dropped: 0 }
    }

    /// What it was made with.
    pub fn settings(&self) -> &QueueSettings {
        &self.settings
    }

    /// Adds a request at the end. One that no idle cache could hold is answered with an error at once, because
    /// it would block everybody behind it for ever.
    pub fn append(&mut self, entry: Entry) {
        let Some(entry) = self.refuse_what_never_fits(entry) else { return };
        self.waiting.push_back((self.next_request_id, entry));
        self.next_request_id += 1;
    }

    /// Answers a request that no idle cache could hold.
    fn refuse_what_never_fits(&self, entry: Entry) -> Option<Entry> {
        let tokens = self.slots_needed(&entry);
        if let Some(allocator) = &self.settings.allocator
            && !allocator.can_ever_hold(tokens)
        {
            let capacity = allocator.capacity_tokens();
            let text = format!("the request needs {tokens} token slots, the KV cache has {capacity}");
            // An error here only says that the client has left.
            let _ = entry.events.send(Err(SchedulerError::Step(text)));
            return None;
        }
        Some(entry)
    }

    /// Takes requests back whose shards are lost, to where they were before: ahead of everybody who came later. Without
    /// their blocks, which stand for nothing any more. Answers how many were taken back.
    ///
    /// Those that cannot go on get `error`.
    pub(super) fn resume(
        &mut self,
        lost: HashMap<u64, Entry>,
        cause: LossCause,
        error: &SchedulerError,
    ) -> usize {
        let mut resumed = 0;
        for (id, mut entry) in lost {
            entry.allocation = None;
            entry.trace.queue();
            entry.losses += u32::from(cause == LossCause::Engine);
            let text = if entry.losses >= MAX_LOSSES {
                format!(
                    "the engine failed {MAX_LOSSES} times in a row while it computed this request: {error}"
                )
            } else if !entry.generated.is_empty() && !self.settings.supports_resume {
                error.to_string()
            } else {
                self.waiting.push_back((id, entry));
                resumed += 1;
                continue;
            };
            let _ = entry.events.send(Err(SchedulerError::Step(text)));
        }
        self.waiting.make_contiguous().sort_by_key(|(id, _)| *id);
        resumed
    }

    /// The cache of the shards is a new one with room for `max_batch_total_tokens`. Nobody may hold blocks of the old one.
    pub fn renew_cache(&mut self, max_batch_total_tokens: u32) {
        let Some(allocator) = &self.settings.allocator else { return };
        self.settings.allocator = Some(allocator.renewed(max_batch_total_tokens));
        for (id, entry) in std::mem::take(&mut self.waiting) {
            self.waiting.extend(self.refuse_what_never_fits(entry).map(|entry| (id, entry)));
        }
    }

    /// Answers everybody with the same error, if there is one.
    pub fn fail_all_if(&mut self, error: Option<&SchedulerError>) {
        let Some(error) = error else { return };
        for (_, entry) in self.waiting.drain(..) {
            let _ = entry.events.send(Err(error.clone()));
        }
    }

    #[cfg(test)]
    pub(super) fn forget_resume(&mut self) {
        self.settings.supports_resume = false;
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many requests were dropped because their client had left, since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Answers the first request with an error; for one that fits into no batch even alone.
    pub fn reject_first(&mut self, text: &str) {
        if let Some((_, entry)) = self.waiting.pop_front() {
            let _ = entry.events.send(Err(SchedulerError::Step(text.to_string())));
        }
    }

    /// Forms the next batch, or none when the limits allow none. Requests whose client has left are dropped.
    pub fn next_batch(&mut self, limits: BatchLimits) -> Option<NewBatch> {
        if limits.prefill_budget == 0
            || limits.token_budget == 0
            || limits.max_size == Some(0)
            || limits.min_size.is_some_and(|min_size| self.waiting.len() < min_size)
        {
            return None;
        }
        let block_size = self.settings.block_size.max(1);
        let prefill_budget = limits.prefill_budget.div_ceil(block_size).saturating_mul(block_size);
        let mut draft = Draft { prefill_budget, ..Draft::new(limits) };
        while limits.max_size.is_none_or(|max_size| draft.taken.len() < max_size) {
            let Some((id, mut entry)) = self.waiting.pop_front() else { break };
            if entry.is_abandoned() {
                self.dropped += 1;
                continue;
            }
            match self.consider(&mut entry, &draft) {
                Verdict::Taken(prefill, decode) => {
                    draft.prefill_tokens = prefill;
                    draft.decode_tokens = decode;
                    draft.longest_input = draft.longest_input.max(entry.prefill_length());
                    draft.taken.push((id, entry, None));
                }
                Verdict::TakenInPart(chunk_len) => {
                    draft.prefill_tokens += chunk_len;
                    draft.taken.push((id, entry, Some(chunk_len)));
                    break;
                }
                Verdict::Refused => {
                    // Its blocks, if it got any, go back: others may need them before its turn comes.
                    entry.allocation = None;
                    self.waiting.push_front((id, entry));
                    break;
                }
            }
        }
        if draft.taken.is_empty() || limits.min_size.is_some_and(|min_size| draft.taken.len() < min_size) {
            self.put_back(draft);
            return None;
        }
        Some(self.finish(draft))
    }

    /// Token slots a request occupies from its first to its last step.
    ///
    /// The last generated token is never fed back, hence the minus one.
    fn slots_needed(&self, entry: &Entry) -> u32 {
        let max_new_tokens = entry.request.stopping_parameters.max_new_tokens;
        (entry.request.input_length())
            .saturating_add(max_new_tokens)
            .saturating_add(self.settings.speculate)
            .saturating_sub(1)
    }

    fn consider(&self, entry: &mut Entry, draft: &Draft) -> Verdict {
        let Some(allocator) = &self.settings.allocator else {
            return self.consider_padded(entry, draft);
        };
        let prefill = draft.prefill_tokens.saturating_add(entry.prefill_length());
        let remaining = draft.prefill_budget.saturating_sub(draft.prefill_tokens);
        // Prompt and answer so far may be longer than any prompt; where they cannot be cut, they go alone.
        let must_go_alone =
            !self.settings.supports_chunking && draft.taken.is_empty() && !entry.generated.is_empty();
        let fits = prefill <= draft.prefill_budget || must_go_alone;
        let fits_in_part = self.settings.supports_chunking && remaining > 0;
        if !fits && !fits_in_part {
            return Verdict::Refused;
        }
        let Some(allocation) = allocator.allocate(self.slots_needed(entry)) else {
            return Verdict::Refused;
        };
        entry.allocation = Some(allocation);
        if fits { Verdict::Taken(prefill, draft.decode_tokens) } else { Verdict::TakenInPart(remaining) }
    }

    /// Padding models compute and keep every row at the length of the longest.
    fn consider_padded(&self, entry: &Entry, draft: &Draft) -> Verdict {
        let longest = draft.longest_input.max(entry.prefill_length());
        let rows = u32::try_from(draft.taken.len() + 1).unwrap_or(u32::MAX);
        let prefill = rows.saturating_mul(longest);
        let max_new_tokens = entry.request.stopping_parameters.max_new_tokens;
        let decode = draft.decode_tokens.saturating_add(max_new_tokens);
        let total = prefill.saturating_add(decode).saturating_add(self.settings.speculate);
        if prefill > draft.prefill_budget || total > draft.limits.token_budget {
            Verdict::Refused
        } else {
            Verdict::Taken(prefill, decode)
        }
    }

    fn put_back(&mut self, draft: Draft) {
        for (id, mut entry, _) in draft.taken.into_iter().rev() {
            entry.allocation = None;
            self.waiting.push_front((id, entry));
        }
    }

    fn finish(&mut self, draft: Draft) -> NewBatch {
        let started = Instant::now();
        let mut requests: Vec<Request> = Vec::with_capacity(draft.taken.len());
        let mut entries = HashMap::with_capacity(draft.taken.len());
        for (id, mut entry, chunk_len) in draft.taken {
            entry.started.get_or_insert(started);
            entry.trace.run();
            requests.push(wire::request(id, &entry, chunk_len));
            entries.insert(id, entry);
        }
        let max_blocks = requests.iter().map(|request| request.blocks.len()).max().unwrap_or(0);
        let batch = Batch {
            id: self.next_batch_id,
            size: u32::try_from(requests.len()).unwrap_or(u32::MAX),
            requests,
            max_tokens: draft.prefill_tokens.saturating_add(draft.decode_tokens),
            max_blocks: u32::try_from(max_blocks).unwrap_or(u32::MAX),
        };
        self.next_batch_id += 1;
        NewBatch { batch, entries }
    }
}

/// A batch while it is put together.
struct Draft {
    limits: BatchLimits,
    prefill_budget: u32,
    taken: Vec<(u64, Entry, Option<u32>)>,
    prefill_tokens: u32,
    decode_tokens: u32,
    longest_input: u32,
}

impl Draft {
    fn new(limits: BatchLimits) -> Self {
        Self {
            limits,
            prefill_budget: 0,
            taken: Vec::new(),
            prefill_tokens: 0,
            decode_tokens: 0,
            longest_input: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::scheduler::testing::{TestClient, entry};

    fn limits(prefill_budget: u32) -> BatchLimits {
        BatchLimits { min_size: None, max_size: None, prefill_budget, token_budget: 1_000 }
    }

    fn paged(total_tokens: u32, supports_chunking: bool) -> Queue {
        let allocator = Some(BlockAllocator::new(total_tokens, 4, None));
        Queue::new(QueueSettings {
            allocator,
            block_size: 4,
            speculate: 0,
            supports_chunking,
            supports_resume: true,
        })
    }

    fn padding() -> Queue {
        Queue::new(QueueSettings {
            allocator: None,
            block_size: 1,
            speculate: 0,
            supports_chunking: false,
            supports_resume: false,
        })
    }

    fn append(queue: &mut Queue, input_length: usize, max_new_tokens: u32) -> TestClient {
        let (entry, client) = entry(input_length, max_new_tokens);
        queue.append(entry);
        client
    }

    fn ids(batch: &NewBatch) -> Vec<u64> {
        batch.batch.requests.iter().map(|request| request.id).collect()
    }

    #[test]
    fn gives_out_requests_in_order_with_blocks_and_slots() {
        let mut queue = paged(100, false);
        let _clients = [append(&mut queue, 3, 4), append(&mut queue, 5, 2)];
        let batch = queue.next_batch(limits(100)).unwrap();
        assert_eq!(ids(&batch), [0, 1]);
        assert_eq!((batch.batch.id, batch.batch.size, batch.batch.max_tokens), (0, 2, 8));
        assert_eq!(batch.batch.max_blocks, 2);
        assert_eq!(batch.batch.requests[0].slots.len(), 6);
        assert_eq!(batch.batch.requests[1].input_ids.len(), 5);
        assert!(batch.entries[&0].started.is_some());
        assert!(queue.next_batch(limits(100)).is_none());
    }

    #[test]
    fn nothing_is_formed_without_budget_or_room() {
        let mut queue = paged(100, true);
        let _client = append(&mut queue, 3, 4);
        assert!(queue.next_batch(limits(0)).is_none());
        assert!(queue.next_batch(BatchLimits { token_budget: 0, ..limits(10) }).is_none());
        assert!(queue.next_batch(BatchLimits { max_size: Some(0), ..limits(10) }).is_none());
        assert!(queue.next_batch(BatchLimits { min_size: Some(2), ..limits(10) }).is_none());
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn max_size_leaves_the_rest() {
        let mut queue = paged(100, false);
        let _clients = [append(&mut queue, 1, 1), append(&mut queue, 1, 1), append(&mut queue, 1, 1)];
        let batch = queue.next_batch(BatchLimits { max_size: Some(2), ..limits(100) }).unwrap();
        assert_eq!((ids(&batch), queue.len()), (vec![0, 1], 1));
    }

    #[test]
    fn too_few_collected_go_back_in_order_with_their_blocks() {
        let mut queue = paged(100, false);
        let clients = [append(&mut queue, 4, 1), append(&mut queue, 4, 1), append(&mut queue, 4, 1)];
        assert!(queue.next_batch(BatchLimits { min_size: Some(3), ..limits(8) }).is_none());
        assert_eq!(queue.settings().allocator.as_ref().unwrap().free_blocks(), 24);
        assert_eq!(ids(&queue.next_batch(limits(12)).unwrap()), [0, 1, 2]);
        drop(clients);
    }

    #[test]
    fn the_prefill_budget_is_rounded_up_to_a_block() {
        let mut queue = paged(100, false);
        let _clients = [append(&mut queue, 4, 1), append(&mut queue, 4, 1)];
        assert_eq!(ids(&queue.next_batch(limits(5)).unwrap()), [0, 1]);
    }

    #[test]
    fn chunking_takes_the_part_that_fits() {
        let mut queue = paged(200, true);
        let _clients = [append(&mut queue, 6, 1), append(&mut queue, 50, 1), append(&mut queue, 1, 1)];
        let batch = queue.next_batch(limits(16)).unwrap();
        assert_eq!(ids(&batch), [0, 1]);
        assert_eq!(batch.batch.requests[0].chunk_len, None);
        assert_eq!(batch.batch.requests[1].chunk_len, Some(10));
        assert_eq!(batch.batch.requests[1].slots.len(), 50, "slots for all of it");
        assert_eq!(batch.batch.max_tokens, 16);
    }

    #[test]
    fn without_chunking_the_part_waits_and_keeps_no_blocks() {
        let mut queue = paged(200, false);
        let _clients = [append(&mut queue, 6, 1), append(&mut queue, 50, 1)];
        let batch = queue.next_batch(limits(16)).unwrap();
        assert_eq!((ids(&batch), queue.len()), (vec![0], 1));
        assert_eq!(queue.settings().allocator.as_ref().unwrap().free_blocks(), 49 - 2);
    }

    #[test]
    fn nobody_overtakes_a_request_without_blocks() {
        let mut queue = paged(44, true);
        let _clients = [append(&mut queue, 20, 12), append(&mut queue, 20, 12), append(&mut queue, 1, 1)];
        let first = queue.next_batch(limits(100)).unwrap();
        assert_eq!(ids(&first), [0]);
        assert!(queue.next_batch(limits(100)).is_none());
        drop(first);
        assert_eq!(ids(&queue.next_batch(limits(100)).unwrap()), [1, 2]);
    }

    #[test]
    fn abandoned_requests_are_dropped_and_counted() {
        let mut queue = paged(100, false);
        drop(append(&mut queue, 3, 4));
        let _client = append(&mut queue, 3, 4);
        assert_eq!(ids(&queue.next_batch(limits(100)).unwrap()), [1]);
        assert_eq!((queue.take_dropped(), queue.take_dropped()), (1, 0));
    }

    #[test]
    fn a_request_no_cache_could_hold_is_refused_at_once() {
        let mut queue = paged(40, true);
        let mut client = append(&mut queue, 30, 8);
        assert!(queue.is_empty());
        let error = client.events.try_recv().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the request needs 37 token slots, the KV cache has 36");
    }

    #[test]
    fn padding_counts_every_row_at_the_longest() {
        let mut queue = padding();
        let _clients = [append(&mut queue, 2, 3), append(&mut queue, 10, 3), append(&mut queue, 1, 3)];
        let batch = queue.next_batch(limits(25)).unwrap();
        assert_eq!((ids(&batch), batch.batch.max_tokens), (vec![0, 1], 26));
        assert!(batch.batch.requests[0].blocks.is_empty());
        let tight = BatchLimits { token_budget: 3, ..limits(25) };
        assert!(queue.next_batch(tight).is_none(), "1 + 3 > 3");
        queue.reject_first("does not fit");
        assert!(queue.is_empty());
    }

    #[test]
    fn random_rounds_lose_nobody_and_leak_no_block() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut queue = paged(4 * 65, true);
        let mut clients = Vec::new();
        let mut running: Vec<NewBatch> = Vec::new();
        let (mut appended, mut seen, mut dropped) = (0_u64, Vec::new(), 0);
        for _ in 0..3_000 {
            match rng.random_range(0..4) {
                0 | 1 => {
                    clients.push(append(&mut queue, rng.random_range(1..40), rng.random_range(1..30)));
                    appended += 1;
                }
                2 if !clients.is_empty() => drop(clients.swap_remove(rng.random_range(0..clients.len()))),
                _ => {
                    if rng.random_bool(0.6) && !running.is_empty() {
                        running.swap_remove(rng.random_range(0..running.len()));
                    }
                    let round = BatchLimits { token_budget: 260, ..limits(rng.random_range(0..64)) };
                    if let Some(batch) = queue.next_batch(round) {
                        let computed: u32 = (batch.batch.requests.iter())
                            .map(|request| request.chunk_len.unwrap_or(request.input_ids.len() as u32))
                            .sum();
                        assert!(computed <= round.prefill_budget.div_ceil(4) * 4);
                        seen.extend(ids(&batch));
                        running.push(batch);
                    }
                    dropped += queue.take_dropped();
                }
            }
            let held: usize = running
                .iter()
                .flat_map(|batch| batch.entries.values())
                .map(|entry| entry.allocation.as_ref().unwrap().blocks().len())
                .sum();
            assert_eq!(held + queue.settings().allocator.as_ref().unwrap().free_blocks(), 64);
            assert!(seen.is_sorted(), "first come, first served");
            assert_eq!(seen.len() as u64 + dropped + queue.len() as u64, appended);
        }
    }
}
