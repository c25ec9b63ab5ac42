//! Whether shards that live also move: a step that was begun must end, and a question must be answered.
//!
//! A long prefill is many steps, so it moves; an idle shard has no step under way. What remains is a process that was
//! stopped, a device that hangs, a rank that waits for another one that does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::join_all;
use proto::ShardClient;
use tokio::time::Instant;

/// How often to look: the counters cost a shard some microseconds.
const LONGEST_PERIOD: Duration = Duration::from_secs(1);

/// Steps begun and ended, as a shard tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Steps {
    started: u64,
    finished: u64,
}

/// What is known of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pulse {
    last: Option<Steps>,
    /// Time without progress, as far as this process was there to see it.
    still: Duration,
    /// Time without an answer, likewise.
    silent: Duration,
}

impl Pulse {
    /// Takes an answer, or that there was none, `elapsed` after the one before.
    fn observe(&mut self, answer: Option<Steps>, elapsed: Duration) {
        match answer {
            Some(steps) => {
                let moves = steps.started == steps.finished || self.last.is_some_and(|last| last != steps);
                self.still = if moves { Duration::ZERO } else { self.still + elapsed };
                self.silent = Duration::ZERO;
                self.last = Some(steps);
            }
            None => {
                self.still += elapsed;
                self.silent += elapsed;
            }
        }
    }
}

/// The rank to blame once one has been still for `timeout`: one that does not even answer, else the one that is behind
/// the others, who wait for it.
fn culprit(pulses: &[Pulse], timeout: Duration) -> Option<usize> {
    if pulses.iter().all(|pulse| pulse.still < timeout) {
        return None;
    }
    let silent = pulses.iter().enumerate().filter(|(_, pulse)| pulse.silent * 2 >= timeout);
    let behind = pulses.iter().enumerate().filter(|(_, pulse)| pulse.still >= timeout);
    silent
        .max_by_key(|(_, pulse)| pulse.silent)
        .or_else(|| behind.min_by_key(|(_, pulse)| pulse.last.map_or(0, |steps| steps.finished)))
        .map(|(rank, _)| rank)
}

fn describe(rank: usize, pulse: &Pulse) -> String {
    let seconds = pulse.still.as_secs_f64();
    match pulse.last.filter(|_| pulse.silent.is_zero()) {
        Some(steps) => format!(
            "shard rank {rank} stalled: step {} has not ended for {seconds:.1} s (--stall-timeout)",
            steps.started
        ),
        None => format!(
            "shard rank {rank} stalled: it has not answered for {:.1} s (--stall-timeout)",
            pulse.silent.as_secs_f64()
        ),
    }
}

/// Watches the shards on `sockets`, in rank order. Returns one line when one of them has stalled, and `None` when one has
/// gone, which is noticed elsewhere.
pub async fn stalled(sockets: &[PathBuf], timeout: Duration) -> Option<String> {
    let period = (timeout / 8).min(LONGEST_PERIOD);
    let mut clients = Vec::new();
    for socket in sockets {
        clients.push(connect(socket, period).await);
    }
    let mut pulses = vec![Pulse::default(); clients.len()];
    let mut seen = Instant::now();
    loop {
        tokio::time::sleep(period).await;
        let answers = join_all(clients.iter_mut().map(|client| ask(client, period))).await;
        // When this process itself was stopped, or had no time, it has seen nothing meanwhile.
        let elapsed = seen.elapsed().min(period * 3);
        seen = Instant::now();
        for (pulse, answer) in pulses.iter_mut().zip(answers) {
            match answer {
                Answer::Steps(steps) => pulse.observe(Some(steps), elapsed),
                Answer::None => pulse.observe(None, elapsed),
                Answer::Gone => return None,
            }
        }
        if let Some(rank) = culprit(&pulses, timeout) {
            return Some(describe(rank, &pulses[rank]));
        }
    }
}

/// Waits until the shard listens, however long it loads.
async fn connect(socket: &Path, pause: Duration) -> ShardClient {
    loop {
        match ShardClient::connect(socket).await {
            Ok(client) => return client,
            Err(_) => tokio::time::sleep(pause).await,
        }
    }
}

enum Answer {
    Steps(Steps),
    None,
    Gone,
}

async fn ask(client: &mut ShardClient, patience: Duration) -> Answer {
    match tokio::time::timeout(patience, client.status()).await {
        Ok(Ok(status)) => {
            Answer::Steps(Steps { started: status.steps_started, finished: status.steps_finished })
        }
        Ok(Err(_)) => Answer::Gone,
        Err(_) => Answer::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const TIMEOUT: Duration = Duration::from_secs(4);

    fn pulse(answers: &[Option<(u64, u64)>]) -> Pulse {
        let mut pulse = Pulse::default();
        for answer in answers {
            pulse.observe(answer.map(|(started, finished)| Steps { started, finished }), SECOND);
        }
        pulse
    }

    #[test]
    fn idle_and_moving_shards_are_alive_for_ever() {
        assert_eq!(pulse(&[Some((7, 7)); 100]).still, Duration::ZERO);
        let moving: Vec<_> = (0..100).map(|step| Some((step + 1, step))).collect();
        assert_eq!(pulse(&moving).still, Duration::ZERO);
    }

    #[test]
    fn a_step_that_does_not_end_and_a_question_without_answer_are_stalls() {
        let hangs =
            pulse(&[Some((5, 5)), Some((6, 5)), Some((6, 5)), Some((6, 5)), Some((6, 5)), Some((6, 5))]);
        assert_eq!(culprit(&[hangs], TIMEOUT), Some(0));
        assert_eq!(
            describe(1, &hangs),
            "shard rank 1 stalled: step 6 has not ended for 4.0 s (--stall-timeout)"
        );
        let silent = pulse(&[Some((5, 5)), None, None, None, None]);
        assert_eq!(culprit(&[silent], TIMEOUT), Some(0));
        assert!(describe(0, &silent).contains("it has not answered for 4.0 s"));
        assert_eq!(culprit(&[pulse(&[None, None, None, Some((5, 5)), None])], TIMEOUT), None);
    }

    #[test]
    fn the_rank_that_others_wait_for_is_blamed() {
        let waits = pulse(&[Some((6, 5)); 6]);
        let stopped = pulse(&[Some((6, 5)), None, None, None, None]);
        assert_eq!(culprit(&[waits, stopped], TIMEOUT), Some(1), "it does not even answer");
        let behind = pulse(&[Some((5, 4)); 6]);
        assert_eq!(culprit(&[waits, behind, waits], TIMEOUT), Some(1));
    }
}
