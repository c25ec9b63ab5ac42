//! How often and how soon children are started again.

use std::collections::VecDeque;
use std::time::Duration;

/// The wait before the second start in a row; each further one waits twice as long.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// A service that could be back is never kept down for longer.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Failures within the window that are answered by a restart; 0: the first one ends the service.
    pub max_restarts: usize,
    /// For how long a failure counts.
    pub window: Duration,
}

/// The failures that still count. A pure value: times are given, as durations since some start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restarts {
    policy: RestartPolicy,
    failures: VecDeque<Duration>,
    /// Failures since the service was last whole.
    in_a_row: u32,
}

impl Restarts {
    /// Nothing has failed yet.
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, failures: VecDeque::new(), in_a_row: 0 }
    }

    /// Counts a failure at `now`. Answers how long to wait before the restart.
    ///
    /// # Errors
    /// One clause: there have been too many for another one.
    pub fn count(&mut self, now: Duration) -> Result<Duration, String> {
        let window = self.policy.window;
        self.failures.retain(|&failure| now.saturating_sub(failure) < window);
        self.failures.push_back(now);
        if self.failures.len() > self.policy.max_restarts {
            return Err(format!(
                "it is failure {} within {} s and --max-restarts is {}",
                self.failures.len(),
                window.as_secs(),
                self.policy.max_restarts
            ));
        }
        let wait = match self.in_a_row {
            // The first restart is the one that somebody waits for.
            0 => Duration::ZERO,
            n => FIRST_BACKOFF.saturating_mul(1 << (n - 1).min(16)).min(LONGEST_BACKOFF),
        };
        self.in_a_row += 1;
        Ok(wait)
    }

    /// How many failures count at `now`, and what is allowed.
    pub fn used(&self, now: Duration) -> (usize, RestartPolicy) {
        let counts = |failure: &&Duration| now.saturating_sub(**failure) < self.policy.window;
        (self.failures.iter().filter(counts).count(), self.policy)
    }

    /// Everything is up again: the next failure is not the previous one's continuation.
    pub fn recovered(&mut self) {
        self.in_a_row = 0;
    }

    /// Whether children are ever started again.
    pub fn are_allowed(&self) -> bool {
        self.policy.max_restarts > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restarts(max_restarts: usize) -> Restarts {
        Restarts::new(RestartPolicy { max_restarts, window: Duration::from_secs(60) })
    }

    #[test]
    fn waits_grow_while_nothing_works_and_start_again_when_it_does() {
        let mut restarts = restarts(100);
        let mut wait = || restarts.count(Duration::ZERO).unwrap().as_millis();
        assert_eq!([wait(), wait(), wait(), wait()], [0, 250, 500, 1000]);
        let waits: Vec<u128> = (0..40).map(|_| wait()).collect();
        assert_eq!(waits.last(), Some(&10_000));
        restarts.recovered();
        assert_eq!(restarts.count(Duration::ZERO), Ok(Duration::ZERO));
    }

    #[test]
    fn the_budget_is_per_window() {
        let mut restarts = restarts(2);
        let mut at = |seconds| restarts.count(Duration::from_secs(seconds)).is_ok();
        assert!(at(0) && at(30));
        assert!(at(60), "the first one counts no more");
        assert!(!at(61));
        assert_eq!([30, 61, 95].map(|at| restarts.used(Duration::from_secs(at)).0), [3, 3, 2]);
        let spent = restarts.count(Duration::from_secs(62)).unwrap_err();
        assert!(spent.contains("within 60 s and --max-restarts is 2"), "{spent}");
    }

    #[test]
    fn no_restarts_means_none() {
        assert!(restarts(0).count(Duration::ZERO).is_err() && !restarts(0).are_allowed());
    }
}
