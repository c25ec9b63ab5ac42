//! Who is let in: as many requests as the flags allow, at any time.
//!
//! The rule is the same while the shards are being replaced: a request that gets a permit waits and is answered late,
//! one that gets none is told when to come back. The permits bound what can wait.
//!
//! A server that is asked to stop closes them: nobody is let in any more, and once all are back nothing runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

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
    returned: Arc<Notify>,
    health: HealthFlag,
}

/// One request's right to be served; it is given back when this is dropped.
#[derive(Debug)]
pub struct Permit {
    /// Some until it is given back.
    permit: Option<OwnedSemaphorePermit>,
    returned: Arc<Notify>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.returned.notify_waiters();
    }
}

impl Permits {
    /// Serves at most `max_concurrent_requests` sequences at once.
    pub fn new(max_concurrent_requests: usize, health: HealthFlag) -> Self {
        // More than can ever be connected, and as many as can be asked for at once.
        let total = u32::try_from(max_concurrent_requests).unwrap_or(u32::MAX);
        let semaphore = Arc::new(Semaphore::new((total as usize).min(Semaphore::MAX_PERMITS)));
        Self { semaphore, total, is_closed: Arc::default(), returned: Arc::default(), health }
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
        // Not by asking the semaphore for all of them: it sets aside what it has for whoever waits, and every permit counts as
        // taken from then on.
        loop {
            let returned = self.returned.notified();
            if self.num_taken() == 0 {
                return;
            }
            returned.await;
        }
    }

    /// Never waits: a full server says so at once.
    ///
    /// # Errors
    /// [`InferError::Overloaded`], [`InferError::Recovering`] while the shards are being replaced, [`InferError::Stopping`]
    /// once they are closed.
    pub(crate) fn take(&self) -> Result<Permit, InferError> {
        if self.is_closed() {
            return Err(InferError::Stopping);
        }
        // The semaphore is never closed.
        match Arc::clone(&self.semaphore).try_acquire_owned() {
            Ok(permit) => Ok(Permit { permit: Some(permit), returned: Arc::clone(&self.returned) }),
            Err(_) => Err(match self.health.retry_after() {
                Some(retry_after) => InferError::Recovering { retry_after },
                None => InferError::Overloaded { retry_after: BUSY },
            }),
        }
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
        let permits = Permits::new(3, HealthFlag::default());
        let (first, second) = (permits.take().unwrap(), permits.take().unwrap());
        permits.close();
        assert!(matches!(permits.take(), Err(InferError::Stopping)));
        let all = permits.all_returned();
        tokio::pin!(all);
        assert!(futures::poll!(&mut all).is_pending());
        assert_eq!(permits.num_taken(), 2, "whoever waits takes none");
        drop(first);
        assert!(futures::poll!(&mut all).is_pending());
        assert_eq!(permits.num_taken(), 1);
        drop(second);
        all.await;
        assert!(permits.take().is_err() && permits.num_taken() == 0);
    }
}
