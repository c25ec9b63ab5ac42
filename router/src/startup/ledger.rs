//! Where the time of the start went: the launcher's part, which it writes to our standard input, and ours.
//!
//! The phases of the whole follow one another without gaps, the launcher's and then the router's; their sum is the wall time
//! from the launcher's start to the first connection that is accepted. What each rank did, and what this router did while it
//! waited for them, went on at the same time as some of them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use crate::types::{Phase, RankPhases, Startup};

/// What the launcher says: see its `startup_ledger`.
#[derive(Debug, Deserialize)]
struct LauncherReport {
    started_unix_nanos: u64,
    phases: Vec<Phase>,
    ranks: Vec<RankPhases>,
}

/// The router's clock.
#[derive(Debug)]
pub(super) struct Ledger {
    began: Instant,
    began_unix: SystemTime,
    launcher: Option<LauncherReport>,
    /// What is done while the shards load.
    preparation: Vec<Phase>,
    /// When the router might go to them.
    released: Instant,
    last: Instant,
    phases: Vec<Phase>,
}

impl Ledger {
    /// Begins to count.
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            began_unix: SystemTime::now(),
            launcher: None,
            preparation: Vec::new(),
            released: now,
            last: now,
            phases: Vec::new(),
        }
    }

    /// Takes what the launcher wrote, at the moment when the router might go to the shards. Text that is no report is
    /// somebody else's business.
    pub(super) fn release(&mut self, input: &str, at: Instant) {
        self.launcher = serde_json::from_str(input).ok();
        // From the end of the launcher's last phase until this process was woken is the first of ours: it is nobody else's.
        let hand_over =
            self.launcher.as_ref().map(|report| self.since_end_of(report, at)).unwrap_or_default();
        (self.released, self.last) = (at, at.checked_sub(hand_over).unwrap_or(at));
    }

    /// How long before `at` the launcher's phases ended, by the wall clock that both processes share.
    fn since_end_of(&self, report: &LauncherReport, at: Instant) -> Duration {
        let counted: f64 = report.phases.iter().map(|phase| phase.ms / 1e3).sum();
        let counted = Duration::try_from_secs_f64(counted).unwrap_or_default();
        let started = UNIX_EPOCH + Duration::from_nanos(report.started_unix_nanos);
        let now = self.began_unix + at.saturating_duration_since(self.began);
        now.duration_since(started).unwrap_or_default().saturating_sub(counted)
    }

    /// Something that was done beside the rest, from the beginning up to `until`.
    pub(super) fn prepared(&mut self, name: &str, until: Instant) {
        self.preparation.push(phase(name, until - self.began));
    }

    /// Ends a phase at `at`: everything since the end of the one before belongs to it.
    pub(super) fn end_phase(&mut self, name: &str, at: Instant) {
        self.phases.push(phase(name, at.saturating_duration_since(self.last)));
        self.last = self.last.max(at);
    }

    /// The whole, now that the router listens. The total is measured by another clock than the phases.
    pub(super) fn finish(mut self) -> Startup {
        let own_wait = phase("wait for the launcher", self.released - self.began);
        let (started, mut phases, ranks) = match self.launcher.take() {
            Some(report) => {
                self.preparation.push(own_wait);
                let started = UNIX_EPOCH + Duration::from_nanos(report.started_unix_nanos);
                (started, report.phases, report.ranks)
            }
            // Started by hand, or again: the start of this process is the start of everything.
            None => (self.began_unix, vec![own_wait], Vec::new()),
        };
        phases.extend(self.phases.iter().cloned());
        let total = SystemTime::now().duration_since(started).unwrap_or_default();
        Startup {
            total_ms: milliseconds(total),
            phases,
            ranks,
            router: self.phases,
            router_preparation: self.preparation,
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn phase(name: &str, took: Duration) -> Phase {
    Phase { phase: name.to_string(), ms: milliseconds(took) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(phases: &[Phase]) -> f64 {
        phases.iter().map(|phase| phase.ms).sum()
    }

    #[test]
    fn the_launchers_phases_and_ours_are_one_line() {
        let mut ledger = Ledger::new();
        let began = ledger.began;
        let since_1970 = ledger.began_unix.duration_since(UNIX_EPOCH).unwrap();
        let started = (since_1970 - Duration::from_millis(300)).as_nanos();
        let report = format!(
            r#"{{"started_unix_nanos":{started},"phases":[{{"phase":"shards","ms":300.0}}],
                "ranks":[{{"rank":0,"phases":[{{"phase":"weights","ms":290.0}}]}}]}}"#
        );
        ledger.prepared("tokenizer", began);
        ledger.release(&report, began);
        std::thread::sleep(Duration::from_millis(100));
        ledger.end_phase("warm-up", Instant::now());
        let startup = ledger.finish();
        let names: Vec<&str> = startup.phases.iter().map(|phase| phase.phase.as_str()).collect();
        assert_eq!((names, startup.ranks.len()), (vec!["shards", "warm-up"], 1));
        let difference = (startup.total_ms - sum(&startup.phases)).abs();
        assert!(difference < 0.05 * startup.total_ms, "{startup:?}");
        assert_eq!(startup.router_preparation.len(), 2);
    }

    #[test]
    fn what_passes_between_the_launchers_last_phase_and_the_release_is_ours() {
        let mut ledger = Ledger::new();
        let since_1970 = ledger.began_unix.duration_since(UNIX_EPOCH).unwrap();
        let started = (since_1970 - Duration::from_millis(300)).as_nanos();
        let report = format!(
            r#"{{"started_unix_nanos":{started},"phases":[{{"phase":"shards","ms":200.0}}],"ranks":[]}}"#
        );
        let at = ledger.began;
        ledger.release(&report, at);
        ledger.end_phase("warm-up", at);
        let startup = ledger.finish();
        assert!((startup.phases[1].ms - 100.0).abs() < 1.0, "{startup:?}");
    }

    #[test]
    fn without_a_launcher_it_begins_with_this_process() {
        let mut ledger = Ledger::new();
        ledger.release("", Instant::now());
        ledger.end_phase("warm-up", Instant::now());
        let startup = ledger.finish();
        assert_eq!((startup.phases.len(), startup.ranks.len()), (2, 0));
        assert!(startup.total_ms < 10_000.0);
    }
}
