//! What the rest of the router may know of the shards' state.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a recovery takes that nobody has seen yet. A small model is back sooner, a large one later; whoever comes back
/// too early is told again.
const UNSEEN_RECOVERY: Duration = Duration::from_secs(5);

/// Whether the last thing the shards did went well, whether they are being replaced, and since when they owe an answer.
/// Cloning is cheap.
#[derive(Clone, Debug)]
pub struct HealthFlag(Arc<State>);

#[derive(Debug)]
struct State {
    is_healthy: AtomicBool,
    recovery: Mutex<Recovery>,
    call: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Recovery {
    since: Option<Instant>,
    last: Option<Duration>,
}

impl Default for HealthFlag {
    /// Healthy: the router serves only after a successful warm-up.
    fn default() -> Self {
        Self(Arc::new(State {
            is_healthy: AtomicBool::new(true),
            recovery: Mutex::default(),
            call: Mutex::default(),
        }))
    }
}

impl HealthFlag {
    /// The current state.
    pub fn is_healthy(&self) -> bool {
        self.0.is_healthy.load(Ordering::Relaxed)
    }

    /// Stores how the last step or probe went.
    pub fn set(&self, is_healthy: bool) {
        self.0.is_healthy.store(is_healthy, Ordering::Relaxed);
    }

    /// Awaits the answer of a call to the shards, and lets others know that it is awaited. One task calls, one thing after
    /// another.
    pub(super) async fn owed<T>(&self, call: impl Future<Output = T>) -> T {
        *self.call() = Some(Instant::now());
        let answer = call.await;
        *self.call() = None;
        answer
    }

    /// Since when the shards owe the batching task an answer; `None` when nothing runs.
    pub fn busy_since(&self) -> Option<Instant> {
        *self.call()
    }

    fn call(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shards are lost; from now on requests wait for new ones.
    pub fn begin_recovery(&self) {
        self.set(false);
        self.recovery().since.get_or_insert_with(Instant::now);
    }

    /// New shards are there; how long that took.
    pub fn end_recovery(&self) -> Duration {
        let mut recovery = self.recovery();
        let took = recovery.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        recovery.last = Some(took);
        drop(recovery);
        self.set(true);
        took
    }

    /// While the shards are being replaced: when it is worth coming back, in whole seconds from 1 up, as far as the
    /// recovery before this one can tell.
    pub fn retry_after(&self) -> Option<Duration> {
        let recovery = self.recovery();
        let left = recovery.last.unwrap_or(UNSEEN_RECOVERY).saturating_sub(recovery.since?.elapsed());
        Some(Duration::from_secs(left.as_millis().div_ceil(1000).max(1) as u64))
    }

    /// Every change is a single assignment, so a poisoned lock is as good as another.
    fn recovery(&self) -> MutexGuard<'_, Recovery> {
        self.0.recovery.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_is_unhealthy_and_says_when_to_come_back() {
        let health = HealthFlag::default();
        assert_eq!((health.is_healthy(), health.retry_after()), (true, None));
        health.begin_recovery();
        assert!(!health.is_healthy());
        assert_eq!(health.retry_after(), Some(UNSEEN_RECOVERY), "the first one is a guess");
        assert!(health.end_recovery() < UNSEEN_RECOVERY);
        assert_eq!((health.is_healthy(), health.retry_after()), (true, None));
        health.begin_recovery();
        assert_eq!(health.retry_after(), Some(Duration::from_secs(1)), "the next one is taken to be like it");
    }
}
