//! How the ranks of one model meet.
//!
//! A [`Communicator`] works on host memory: CPU ranks exchange everything through it, ranks on GPUs what they need to meet there. [`Single`] is the group of one; [`shm`] goes through memory
//! shared between processes (a memfd handed over a Unix socket), so nothing listens on a TCP port.

mod rendezvous;
mod shared_region;
pub mod shm;
mod single;

pub use single::Single;

use crate::BackendError;

/// A group of ranks that call the same collectives in the same order. Results are bitwise equal on all ranks: sums are
/// taken in rank order.
pub trait Communicator: Send {
    /// This process's place in the group, `0..world_size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// `data = sum of data over the ranks`; every rank brings the same length.
    ///
    /// # Errors
    /// [`BackendError::PeerLost`] when a rank does not come in time or its process is gone.
    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), BackendError>;
    /// Rank `r` brings `rows` rows of `widths[r]` elements; `out` becomes `[rows, sum(widths)]`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn all_gather(
        &mut self,
        local: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), BackendError>;

    /// Every rank's `bytes`, of which all bring as many, in rank order: for what ranks tell one another at start.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn exchange(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BackendError> {
        let world_size = self.world_size();
        let local: Vec<f32> = bytes.iter().map(|&byte| f32::from(byte)).collect();
        let mut all = vec![0.0; world_size * bytes.len()];
        self.all_gather(&local, 1, &vec![bytes.len(); world_size], &mut all)?;
        // Whole numbers below 256 are what they were.
        Ok(all.chunks(bytes.len().max(1)).map(|part| part.iter().map(|&byte| byte as u8).collect()).collect())
    }
}
