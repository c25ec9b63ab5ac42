//! Whether the shards move, for `/live`: a call that is under way for long must at least move every rank's step counter.
//!
//! A full queue is no reason to restart anything, and a long prompt is many steps. What remains is a device that hangs, a
//! process that was stopped and that nobody replaces, a call whose answer got lost.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::{ShardClient, ShardedClient};

/// Shorter than the second that Kubernetes gives a probe.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// What one rank answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Steps begun and ended.
    Steps(u64, u64),
    /// It answers, but counts no steps: it is not Quartet's; or its connection has ended, which the scheduler knows.
    Unknown,
    /// None in time.
    Silence,
}

/// What was seen of one rank.
#[derive(Clone, Copy, Debug)]
struct Rank {
    last: Option<(u64, u64)>,
    moved: Instant,
}

/// What the probes before this one saw. Cloning is cheap: clones share it.
#[derive(Clone, Debug)]
pub(super) struct Pulse {
    timeout: Duration,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// When the call began that the ranks work on.
    busy_since: Option<Instant>,
    ranks: Vec<Rank>,
}

impl Pulse {
    /// Zero: everything is alive for ever.
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, seen: Arc::default() }
    }

    /// Looks at shards that owe an answer since `busy_since`.
    ///
    /// # Errors
    /// One clause: which rank has not moved, and for how long.
    pub(super) async fn check(
        &self,
        busy_since: Option<Instant>,
        shards: ShardedClient,
    ) -> Result<(), String> {
        if self.timeout.is_zero() || busy_since.is_none() {
            return Ok(());
        }
        let answers = join_all(shards.ranks().iter().cloned().map(ask)).await;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.note(busy_since, &answers, Instant::now());
        seen.verdict(self.timeout, Instant::now())
    }
}

impl Seen {
    fn note(&mut self, busy_since: Option<Instant>, answers: &[Answer], now: Instant) {
        // A call that ended and another one that began moved every rank.
        if self.busy_since != busy_since || self.ranks.len() != answers.len() {
            self.busy_since = busy_since;
            self.ranks = vec![Rank { last: None, moved: now }; answers.len()];
        }
        for (rank, answer) in self.ranks.iter_mut().zip(answers) {
            let steps = match *answer {
                Answer::Steps(begun, ended) => Some((begun, ended)),
                Answer::Unknown => None,
                Answer::Silence => continue,
            };
            if steps.is_none() || steps != rank.last {
                *rank = Rank { last: steps, moved: now };
            }
        }
    }

    fn verdict(&self, timeout: Duration, now: Instant) -> Result<(), String> {
        let still = |rank: &Rank| now.saturating_duration_since(rank.moved);
        match self.ranks.iter().enumerate().max_by_key(|(_, rank)| still(rank)) {
            Some((number, rank)) if still(rank) >= timeout => Err(format!(
                "rank {number} has work and has not moved for {:.1} s (--liveness-timeout {})",
                still(rank).as_secs_f64(),
                timeout.as_secs()
            )),
            _ => Ok(()),
        }
    }
}

async fn ask(mut shard: ShardClient) -> Answer {
    match tokio::time::timeout(ANSWER_TIMEOUT, shard.status()).await {
        Ok(Ok(status)) => Answer::Steps(status.steps_started, status.steps_finished),
        Ok(Err(_)) => Answer::Unknown,
        Err(_) => Answer::Silence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Probes a second apart, of a call that began at the first one.
    fn probes(answers: &[[Answer; 2]]) -> Result<(), String> {
        let (start, mut seen) = (Instant::now(), Seen::default());
        let mut verdict = Ok(());
        for (second, answers) in (0..).zip(answers) {
            let now = start + Duration::from_secs(second);
            seen.note(Some(start), answers, now);
            verdict = verdict.and_then(|()| seen.verdict(TIMEOUT, now));
        }
        verdict
    }

    #[test]
    fn a_long_call_whose_steps_move_is_alive() {
        let answers: Vec<_> =
            (0..1000).map(|step| [Answer::Steps(step + 1, step), Answer::Unknown]).collect();
        assert_eq!(probes(&answers), Ok(()));
    }

    #[test]
    fn a_rank_that_stands_still_or_is_silent_is_named() {
        let still: Vec<_> =
            (0..11).map(|step| [Answer::Steps(step + 1, step), Answer::Steps(5, 4)]).collect();
        assert_eq!(probes(&still[..10]), Ok(()), "not yet");
        let reason = probes(&still).unwrap_err();
        assert_eq!(reason, "rank 1 has work and has not moved for 10.0 s (--liveness-timeout 10)");
        let silent = [[Answer::Silence, Answer::Unknown]; 11];
        assert!(probes(&silent).unwrap_err().starts_with("rank 0"));
    }

    #[test]
    fn another_call_is_a_movement() {
        let (start, mut seen) = (Instant::now(), Seen::default());
        for second in 0..100 {
            let now = start + Duration::from_secs(second);
            let call_began = start + Duration::from_secs(second / 9 * 9);
            seen.note(Some(call_began), &[Answer::Steps(1, 0)], now);
            assert_eq!(seen.verdict(TIMEOUT, now), Ok(()));
        }
    }
}
