//! The batches between two steps, by id.

use std::collections::HashMap;

use super::batch::Batch;

/// Cached batches. Whoever works on one takes it out: when the work fails, it is gone.
#[derive(Debug, Default)]
pub(super) struct BatchStore(HashMap<u64, Batch>);

impl BatchStore {
    /// Keeps a batch; one of the same id is dropped.
    pub(super) fn put(&mut self, batch: Batch) {
        self.0.insert(batch.id, batch);
    }

    /// Takes a batch out.
    ///
    /// # Errors
    /// One line when there is no such batch.
    pub(super) fn take(&mut self, id: u64) -> Result<Batch, String> {
        self.0.remove(&id).ok_or_else(|| format!("batch {id} is not cached"))
    }

    /// A batch that stays where it is.
    ///
    /// # Errors
    /// One line when there is no such batch.
    pub(super) fn get_mut(&mut self, id: u64) -> Result<&mut Batch, String> {
        self.0.get_mut(&id).ok_or_else(|| format!("batch {id} is not cached"))
    }

    /// Drops one batch, or all; one that is not there is as good as dropped.
    pub(super) fn clear(&mut self, id: Option<u64>) {
        match id {
            Some(id) => drop(self.0.remove(&id)),
            None => self.0.clear(),
        }
    }
}
