//! Who is let in: as many requests as the flags allow, at any time.
//!
//! The rule is the same while the shards are being replaced: a request that gets a permit waits and is answered late,
//! one that gets none is told when to come back. The permits bound what can wait.
//!
//! A server that is asked to stop closes them: nobody is let in any more, and once all are back nothing runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
    total: u32,
    is_closed: Arc<AtomicBool>,
    health: HealthFlag,
}

impl Permits {
    /// Serves at most `max_concurrent_requests` sequences at once.
    pub fn new(max_concurrent_requests: usize, health: HealthFlag) -> Self {
        // More than can ever be connected, and as many as can be asked for at once.
        let total = u32::try_from(max_concurrent_requests).unwrap_or(u32::MAX);
        let semaphore = Arc::new(Semaphore::new((total as usize).min(Semaphore::MAX_PERMITS)));
        Self { semaphore, total, is_closed: Arc::default(), health }
    }

    /// From now on nobody is let in. `/ready` knows of it before the first refusal does, because both read the same flag.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// How many are taken.
    pub fn num_taken(&self) -> usize {
        (self.total as usize).saturating_sub(self.semaphore.available_permits())
    }

    /// Resolves when every permit is back. Of use only after [`Self::close`].
    pub async fn all_returned(&self) {
        // The semaphore is never closed, so the only answer is that they are there; they are given back at once.
        drop(self.semaphore.acquire_many(self.total).await);
    }

    /// Never waits: a full server says so at once.
    ///
    /// # Errors
    /// [`InferError::Overloaded`], [`InferError::Recovering`] while the shards are being replaced, [`InferError::Stopping`]
    /// once they are closed.
    pub(super) fn take(&self) -> Result<OwnedSemaphorePermit, InferError> {
        if self.is_closed() {
            return Err(InferError::Stopping);
        }
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

    #[tokio::test]
    async fn closed_permits_are_given_to_nobody_and_awaited() {
        let permits = Permits::new(2, HealthFlag::default());
        let held = permits.take().unwrap();
        assert_eq!(permits.num_taken(), 1);
        permits.close();
        assert!(matches!(permits.take(), Err(InferError::Stopping)));
        let all = permits.all_returned();
        tokio::pin!(all);
        assert!(futures::poll!(&mut all).is_pending());
        drop(held);
        all.await;
        assert!(permits.take().is_err() && permits.num_taken() == 0);
    }
}
