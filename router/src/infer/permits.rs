//! Who is let in: as many requests as the flags allow, at any time.
//!
//! The rule is the same while the shards are being replaced: a request that gets a permit waits and is answered late,
//! one that gets none is told when to come back. The permits bound what can wait.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::InferError;
use crate::scheduler::HealthFlag;

/// When to come back to a server that is merely busy: a request ends any moment.
const BUSY: Duration = Duration::from_secs(1);

/// The right to be served. Cloning is cheap: clones share the permits.
#[derive(Clone, Debug)]
pub struct Permits {
    semaphore: Arc<Semaphore>,
    health: HealthFlag,
}

impl Permits {
    /// Serves at most `max_concurrent_requests` sequences at once.
    pub fn new(max_concurrent_requests: usize, health: HealthFlag) -> Self {
        let semaphore = Arc::new(Semaphore::new(max_concurrent_requests.min(Semaphore::MAX_PERMITS)));
        Self { semaphore, health }
    }

    /// Never waits: a full server says so at once.
    ///
    /// # Errors
    /// [`InferError::Overloaded`], or [`InferError::Recovering`] while the shards are being replaced.
    pub(super) fn take(&self) -> Result<OwnedSemaphorePermit, InferError> {
        // The semaphore is never closed.
        Arc::clone(&self.semaphore).try_acquire_owned().map_err(|_| match self.health.retry_after() {
            Some(retry_after) => InferError::Recovering { retry_after },
            None => InferError::Overloaded { retry_after: BUSY },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_changes_the_answer_and_not_the_number() {
        let health = HealthFlag::default();
        let permits = Permits::new(1, health.clone());
        health.begin_recovery();
        let held = permits.take().unwrap();
        assert!(matches!(permits.take(), Err(InferError::Recovering { .. })));
        health.end_recovery();
        assert!(matches!(permits.take(), Err(InferError::Overloaded { .. })));
        drop(held);
        assert!(permits.take().is_ok());
    }
}
