//! The requests of one call to the shards: handing out tokens, noticing who is done and who has left.

use std::collections::HashMap;
use std::time::Instant;

use proto::v3::{CachedBatch, Generation};

use super::SchedulerError;
use super::entry::{End, Entry, Event};
use super::wire;

/// What remains to be done on the shards after a step was handed out.
#[derive(Debug, PartialEq)]
pub(super) enum Afterwards {
    /// Nothing is cached, nobody runs.
    Idle,
    /// Everybody in the cached batch still runs.
    Unchanged(CachedBatch),
    /// Only these requests of the cached batch still run.
    Filter(u64, Vec<u64>),
    /// Nobody of the cached batch still runs.
    Clear(u64),
}

/// Running entries by request id.
pub(super) type Entries = HashMap<u64, Entry>;

/// Hands out a step's tokens. Entries that are finished or abandoned are removed, which frees their blocks:
/// also those that got no token in this step, because their prompt is computed in pieces.
///
/// `observe` is told how many tokens each request got.
pub(super) fn deliver(entries: &mut Entries, generations: Vec<Generation>, mut observe: impl FnMut(usize)) {
    for mut generation in generations {
        let request_id = generation.request_id;
        let Some(entry) = entries.get_mut(&request_id) else { continue };
        if send(entry, &mut generation, &mut observe).is_break() {
            entries.remove(&request_id);
        }
    }
    entries.retain(|_, entry| !entry.is_abandoned());
}

/// Sends what one request got; breaks when the request is done or its client has left.
fn send(
    entry: &mut Entry,
    generation: &mut Generation,
    observe: &mut impl FnMut(usize),
) -> std::ops::ControlFlow<()> {
    use std::ops::ControlFlow::{Break, Continue};

    let events = &entry.events;
    let deliver = |event| if events.send(Ok(event)).is_ok() { Continue(()) } else { Break(()) };
    if let Some(prompt_tokens) = wire::prompt_tokens(generation) {
        deliver(Event::Prefill(prompt_tokens))?;
    }
    let mut tokens = wire::generated_tokens(generation);
    observe(tokens.len());
    // From here on they count as told: a token is never sent twice.
    entry.generated.extend(tokens.iter().map(|token| token.token.id));
    entry.losses = 0;
    let last = generation.generated_text.take().map(|generated_text| {
        let started = entry.started.unwrap_or_else(Instant::now);
        (tokens.pop().unwrap_or_default(), End { generated_text, queued: entry.queued, started })
    });
    for token in tokens {
        deliver(Event::Token(token))?;
    }
    match last {
        Some((token, end)) => {
            // Whether or not the client is there to see it, the request is done.
            let _ = deliver(Event::Last(token, end));
            Break(())
        }
        None => Continue(()),
    }
}

/// Compares who still runs with what the shards have cached.
///
/// Finished requests stay in a cached batch until it is filtered, so the counts tell.
pub(super) fn afterwards(entries: &Entries, next_batch: Option<CachedBatch>) -> Afterwards {
    let Some(batch) = next_batch else { return Afterwards::Idle };
    if batch.size as usize == entries.len() {
        return Afterwards::Unchanged(batch);
    }
    let kept: Vec<u64> = batch.request_ids.into_iter().filter(|id| entries.contains_key(id)).collect();
    if kept.is_empty() { Afterwards::Clear(batch.id) } else { Afterwards::Filter(batch.id, kept) }
}

/// Ends every entry with the same error and frees its blocks.
pub(super) fn fail_all(entries: &mut Entries, error: &SchedulerError) {
    for (_, entry) in entries.drain() {
        // A client that has left does not need to know.
        let _ = entry.events.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::{TestClient, entry, generation};
    use crate::scheduler::{BlockAllocator, Event};

    fn running(ids: &[u64]) -> (Entries, Vec<TestClient>, BlockAllocator) {
        let allocator = BlockAllocator::new(4 * 100, 4, None);
        let mut entries = Entries::new();
        let mut clients = Vec::new();
        for id in ids {
            let (mut entry, client) = entry(3, 2);
            entry.allocation = allocator.allocate(4);
            entries.insert(*id, entry);
            clients.push(client);
        }
        (entries, clients, allocator)
    }

    fn batch(ids: &[u64]) -> CachedBatch {
        CachedBatch { id: 9, request_ids: ids.to_vec(), size: ids.len() as u32, ..Default::default() }
    }

    #[test]
    fn tokens_reach_their_clients_and_the_last_one_frees_the_blocks() {
        let (mut entries, mut clients, allocator) = running(&[0, 1]);
        let mut counts = Vec::new();
        deliver(&mut entries, vec![generation(1, 7, false), generation(0, 8, true)], |n| counts.push(n));
        assert!(matches!(clients[1].events.try_recv(), Ok(Ok(Event::Token(t))) if t.token.id == 7));
        assert!(matches!(clients[0].events.try_recv(), Ok(Ok(Event::Last(t, _))) if t.token.id == 8));
        assert!(entries.contains_key(&1) && !entries.contains_key(&0));
        assert_eq!((allocator.free_blocks(), counts), (98, vec![1, 1]));
        assert_eq!(afterwards(&entries, Some(batch(&[0, 1]))), Afterwards::Filter(9, vec![1]));
    }

    #[test]
    fn clients_that_left_are_removed_with_or_without_a_token() {
        let (mut entries, clients, allocator) = running(&[0, 1]);
        drop(clients);
        deliver(&mut entries, vec![generation(1, 7, false)], |_| ());
        assert!(entries.is_empty());
        assert_eq!(allocator.free_blocks(), 99);
        assert_eq!(afterwards(&entries, Some(batch(&[0, 1]))), Afterwards::Clear(9));
    }

    #[test]
    fn speculated_tokens_come_one_by_one() {
        let (mut entries, mut clients, _) = running(&[0]);
        let mut generation = generation(0, 1, true);
        let tokens = generation.tokens.as_mut().unwrap();
        tokens.ids.push(2);
        tokens.logprobs.push(-1.0);
        tokens.texts.push("x".to_string());
        tokens.is_special.push(false);
        let mut counts = Vec::new();
        deliver(&mut entries, vec![generation], |n| counts.push(n));
        assert!(matches!(clients[0].events.try_recv(), Ok(Ok(Event::Token(t))) if t.token.id == 1));
        assert!(matches!(clients[0].events.try_recv(), Ok(Ok(Event::Last(t, _))) if t.token.id == 2));
        assert_eq!(counts, [2]);
    }

    #[test]
    fn an_equal_count_needs_no_call() {
        let (entries, _clients, _) = running(&[0, 1]);
        assert_eq!(afterwards(&entries, Some(batch(&[0, 1]))), Afterwards::Unchanged(batch(&[0, 1])));
        assert_eq!(afterwards(&entries, None), Afterwards::Idle);
    }

    #[test]
    fn failing_tells_everybody_and_frees_everything() {
        let (mut entries, mut clients, allocator) = running(&[0, 1]);
        fail_all(&mut entries, &SchedulerError::Step("Server error: x".to_string()));
        for client in &mut clients {
            assert_eq!(client.events.try_recv().unwrap().unwrap_err().to_string(), "Server error: x");
        }
        assert_eq!(allocator.free_blocks(), 99);
    }
}
