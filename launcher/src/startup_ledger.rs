//! Where the time between the command and the first answer went.

use std::fmt;
use std::time::{Duration, Instant};

/// Phases one after another, without gaps: they sum to the wall time.
#[derive(Clone, Debug)]
pub struct StartupLedger {
    start: Instant,
    last: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl StartupLedger {
    /// A ledger of a process that started at `start`.
    pub fn new(start: Instant) -> Self {
        Self { start, last: start, phases: Vec::new() }
    }

    /// Ends a phase at `now`: everything since the end of the one before belongs to it.
    pub fn end_phase(&mut self, name: &'static str, now: Instant) {
        self.phases.push((name, now.saturating_duration_since(self.last)));
        self.last = now;
    }

    /// Wall time up to the end of the last phase.
    pub fn total(&self) -> Duration {
        self.last.saturating_duration_since(self.start)
    }
}

impl fmt::Display for StartupLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, duration)) in self.phases.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {:.1} ms", duration.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
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
}
