//! Where the time of the start went.

use std::time::{Duration, Instant};

/// Where the time of the start went.
pub(crate) struct Ledger {
    phases: Vec<(String, Duration)>,
    phase_started: Instant,
}

impl Ledger {
    /// The first phase began when the process did.
    pub(crate) fn new(process_started: Instant) -> Self {
        Self { phases: Vec::new(), phase_started: process_started }
    }

    /// Ends the phase that began when the previous one ended.
    pub(crate) fn end_phase(&mut self, name: &str) {
        let now = Instant::now();
        self.phases.push((name.to_string(), now - self.phase_started));
        self.phase_started = now;
    }

    /// One line.
    pub(crate) fn log(&self) {
        let phases: Vec<String> =
            self.phases.iter().map(|(name, duration)| format!("{name} {duration:.1?}")).collect();
        let total: Duration = self.phases.iter().map(|(_, duration)| *duration).sum();
        tracing::info!("started in {total:.1?}: {}", phases.join(", "));
    }

    /// Name and duration of each phase.
    pub(crate) fn into_phases(self) -> Vec<(String, Duration)> {
        self.phases
    }
}
