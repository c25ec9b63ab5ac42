//! Where the time between the command and the first answer went.
//!
//! The phases of the whole follow one another without gaps: `checks`, `model files and plan`, `shards`, and what the router
//! does when it may go to the shards. Those of each rank are a closer look at `shards`, and those of the router before that
//! go on at the same time. The launcher hands its part to the router, which completes it and shows it in `/info` and
//! `/metrics`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A name and a time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub phase: String,
    /// How long that took, in milliseconds.
    pub ms: f64,
}

impl Phase {
    fn new(name: &str, took: Duration) -> Self {
        Self { phase: name.to_owned(), ms: took.as_secs_f64() * 1e3 }
    }
}

/// What one rank did from its start until its handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankPhases {
    /// Which.
    pub rank: usize,
    /// Without gaps.
    pub phases: Vec<Phase>,
}

/// What a rank tells of its start, and when the launcher started it and heard from it.
#[derive(Clone, Debug)]
pub struct RankStart {
    /// When the launcher started the process.
    pub spawned: SystemTime,
    /// When the shard began to count, if it says so.
    pub began: Option<SystemTime>,
    /// What it counted.
    pub phases: Vec<(String, Duration)>,
    /// When it had answered.
    pub ready: SystemTime,
}

impl RankStart {
    /// The rank's own phases between the start of its process and its handshake.
    fn complete(&self) -> Vec<Phase> {
        let between = |from: SystemTime, to: SystemTime| to.duration_since(from).unwrap_or_default();
        let counted: Duration = self.phases.iter().map(|(_, took)| *took).sum();
        let began = self.began.unwrap_or(self.spawned).max(self.spawned);
        let process = Phase::new("process", between(self.spawned, began));
        let handshake = Phase::new("handshake", between(began, self.ready).saturating_sub(counted));
        let own = self.phases.iter().map(|(name, took)| Phase::new(name, *took));
        std::iter::once(process).chain(own).chain([handshake]).collect()
    }
}

/// The launcher's part: phases one after another, without gaps, and the ranks' part in them.
#[derive(Clone, Debug)]
pub struct StartupLedger {
    start: Instant,
    start_unix: SystemTime,
    last: Instant,
    phases: Vec<Phase>,
    ranks: BTreeMap<usize, Vec<Phase>>,
}

/// What the router is told; one line of JSON on its standard input.
#[derive(Clone, Debug, Serialize)]
pub struct StartupReport {
    /// When the launcher started, in nanoseconds since 1970.
    pub started_unix_nanos: u64,
    /// The launcher's phases.
    pub phases: Vec<Phase>,
    /// The ranks'.
    pub ranks: Vec<RankPhases>,
}

impl StartupLedger {
    /// A ledger of a process that started at `start`, which is now.
    pub fn new(start: Instant) -> Self {
        let start_unix = SystemTime::now();
        Self { start, start_unix, last: start, phases: Vec::new(), ranks: BTreeMap::new() }
    }

    /// Ends a phase at `now`: everything since the end of the one before belongs to it.
    pub fn end_phase(&mut self, name: &'static str, now: Instant) {
        self.phases.push(Phase::new(name, now.saturating_duration_since(self.last)));
        self.last = now;
    }

    /// Notes how a rank came to be ready.
    pub fn note_rank(&mut self, rank: usize, start: &RankStart) {
        self.ranks.insert(rank, start.complete());
    }

    /// Wall time up to the end of the last phase.
    pub fn total(&self) -> Duration {
        self.last.saturating_duration_since(self.start)
    }

    /// What there is so far.
    pub fn report(&self) -> StartupReport {
        let since_1970 = self.start_unix.duration_since(UNIX_EPOCH).unwrap_or_default();
        let ranks = self.ranks.iter();
        StartupReport {
            started_unix_nanos: since_1970.as_nanos() as u64,
            phases: self.phases.clone(),
            ranks: ranks.map(|(&rank, phases)| RankPhases { rank, phases: phases.clone() }).collect(),
        }
    }
}

impl fmt::Display for StartupLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&listed(&self.phases))
    }
}

/// Phases in one line.
pub fn listed(phases: &[Phase]) -> String {
    let phases: Vec<String> =
        phases.iter().map(|phase| format!("{} {:.1} ms", phase.phase, phase.ms)).collect();
    phases.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_sum_to_the_total() {
        let start = Instant::now();
        let mut ledger = StartupLedger::new(start);
        ledger.end_phase("plan", start + Duration::from_millis(2));
        ledger.end_phase("shards", start + Duration::from_millis(502));
        assert_eq!(ledger.total(), Duration::from_millis(502));
        assert_eq!(ledger.to_string(), "plan 2.0 ms, shards 500.0 ms");
    }

    #[test]
    fn a_rank_is_counted_from_its_start_to_its_handshake() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        let mut ledger = StartupLedger::new(Instant::now());
        let mut start = RankStart {
            spawned: at(1000),
            began: Some(at(1003)),
            phases: vec![("weights".to_owned(), Duration::from_millis(40))],
            ready: at(1050),
        };
        ledger.note_rank(1, &start);
        let ranks = ledger.report().ranks;
        assert_eq!(
            (ranks[0].rank, listed(&ranks[0].phases).as_str()),
            (1, "process 3.0 ms, weights 40.0 ms, handshake 7.0 ms")
        );
        start.began = None;
        assert_eq!(listed(&start.complete()), "process 0.0 ms, weights 40.0 ms, handshake 10.0 ms");
    }
}
