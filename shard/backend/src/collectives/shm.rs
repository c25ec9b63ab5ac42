//! Collectives between processes of one machine through shared memory.
//!
//! Every rank sums all parts itself, in rank order: the results are bitwise equal, and a vector as short as one token's
//! takes a single barrier.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Communicator;
use super::rendezvous::Peer;
pub use super::rendezvous::Rendezvous;
use super::shared_region::{SLOT_LEN, SharedRegion};
use crate::BackendError;

/// Ranks on cores of their own finish a layer within microseconds of one another; a sleep costs more than that.
const SPIN: Duration = Duration::from_micros(30);
/// Then others on the same core may run.
const YIELD: Duration = Duration::from_micros(200);
/// How often a sleeping rank looks at clock and connections.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Meets the other ranks; blocks until all are there.
///
/// # Errors
/// [`BackendError::RankMismatch`] on every rank when they do not agree, [`BackendError::PeerLost`] when one does not come in
/// time, [`BackendError::Device`] when the socket cannot be used.
pub fn join(rendezvous: &Rendezvous) -> Result<ShmCommunicator, BackendError> {
    rendezvous.check()?;
    let &Rendezvous { rank, world_size, timeout, .. } = rendezvous;
    let device = |error: std::io::Error| BackendError::Device {
        operation: "shared memory between ranks".to_owned(),
        reason: error.to_string(),
    };
    let (peers, memory) = if rank == 0 {
        let memory = SharedRegion::create(world_size).map_err(device)?;
        let peers = if world_size > 1 { rendezvous.host(&memory)? } else { Vec::new() };
        (peers, memory)
    } else {
        let (peer, memory) = rendezvous.attend()?;
        (vec![peer], memory)
    };
    let region = SharedRegion::map(&memory, world_size).map_err(device)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(ShmCommunicator {
        rank,
        world_size,
        region,
        peers,
        exchange: 0,
        sequence: 0,
        timeout,
        // Whoever spins keeps another rank from running when there are not enough cores.
        spin: if cores >= world_size { SPIN } else { Duration::ZERO },
    })
}

/// A group of processes with shared memory. Dropping it tells the others that this rank is gone.
pub struct ShmCommunicator {
    rank: usize,
    world_size: usize,
    region: SharedRegion,
    /// Rank 0 has a connection to every rank, the others have one to rank 0.
    peers: Vec<Peer>,
    /// Number of slots exchanged, modulo 2^32.
    exchange: u32,
    /// Number of collectives begun.
    sequence: u64,
    timeout: Duration,
    spin: Duration,
}

impl std::fmt::Debug for ShmCommunicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShmCommunicator")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

/// One call of a collective: what all ranks must agree on.
#[derive(Debug, Clone, Copy)]
struct Call {
    operation: &'static str,
    /// Operation and size in one number.
    id: u64,
}

impl Call {
    fn new(operation: &'static str, kind: u64, len: usize) -> Self {
        Self { operation, id: kind << 56 | len as u64 & ((1 << 56) - 1) }
    }
}

impl Communicator for ShmCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), BackendError> {
        self.sequence += 1;
        let call = Call::new("all_reduce", 1, data.len());
        if self.world_size == 1 {
            return Ok(());
        }
        for part in data.chunks_mut(SLOT_LEN) {
            let exchange = self.exchange(call, part)?;
            part.copy_from_slice(self.region.read(0, exchange, part.len()));
            for rank in 1..self.world_size {
                let other = self.region.read(rank, exchange, part.len());
                for (sum, value) in part.iter_mut().zip(other) {
                    *sum += value;
                }
            }
        }
        Ok(())
    }

    fn all_gather(
        &mut self,
        local: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), BackendError> {
        self.sequence += 1;
        let row_width: usize = widths.iter().sum();
        let fits = widths.len() == self.world_size
            && local.len() == rows * widths[self.rank]
            && out.len() == rows * row_width;
        if !fits {
            return Err(BackendError::Device {
                operation: "all_gather".to_owned(),
                reason: format!(
                    "{} elements in, {} out, expected {rows} rows of {widths:?} over {} ranks",
                    local.len(),
                    out.len(),
                    self.world_size
                ),
            });
        }
        let call = Call::new("all_gather", 2, out.len());
        let longest = rows * widths.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(SLOT_LEN) {
            let window = |len: usize| start.min(len)..(start + SLOT_LEN).min(len);
            let exchange = self.exchange(call, &local[window(local.len())])?;
            let mut column = 0;
            for (rank, &width) in widths.iter().enumerate() {
                let window = window(rows * width);
                let data = self.region.read(rank, exchange, window.len());
                scatter_rows(data, window.start, width, &mut out[column..], row_width);
                column += width;
            }
        }
        Ok(())
    }
}

/// Puts the elements from number `start` on of a matrix of `width` columns into one of `row_width` columns, whose first are
/// at the start of `out`.
fn scatter_rows(mut data: &[f32], start: usize, width: usize, out: &mut [f32], row_width: usize) {
    let mut at = start;
    while !data.is_empty() {
        let (row, column) = (at / width, at % width);
        let (piece, rest) = data.split_at(data.len().min(width - column));
        let target = row * row_width + column;
        out[target..target + piece.len()].copy_from_slice(piece);
        at += piece.len();
        data = rest;
    }
}

impl ShmCommunicator {
    /// Writes this rank's part and waits for the others'; gives the number to read them by.
    fn exchange(&mut self, call: Call, part: &[f32]) -> Result<u32, BackendError> {
        let exchange = self.exchange;
        self.region.publish(self.rank, exchange, call.id, part);
        self.exchange = exchange.wrapping_add(1);
        for rank in (0..self.world_size).filter(|&rank| rank != self.rank) {
            if !self.region.is_published(rank, exchange) {
                self.wait_for(rank, exchange, call)?;
            }
            if self.region.call(rank, exchange) != call.id {
                let reason = "it is in another operation or brings another length".to_owned();
                return Err(self.lost(rank, call, reason));
            }
        }
        Ok(exchange)
    }

    fn wait_for(&self, rank: usize, exchange: u32, call: Call) -> Result<(), BackendError> {
        let begin = Instant::now();
        while begin.elapsed() < self.spin {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            if self.region.is_published(rank, exchange) {
                return Ok(());
            }
        }
        while begin.elapsed() < self.spin + YIELD {
            std::thread::yield_now();
            if self.region.is_published(rank, exchange) {
                return Ok(());
            }
        }
        loop {
            self.region.sleep(rank, exchange, CHECK_INTERVAL);
            let problem = self.problem_with(rank, begin);
            // Asked last: a rank may have done its part and then ended, as all do in the end.
            if self.region.is_published(rank, exchange) {
                return Ok(());
            }
            if let Some((lost, reason)) = problem {
                self.region.report_lost(lost);
                return Err(self.lost(lost, call, reason));
            }
        }
    }

    /// Why `rank` will not come: which rank is missing, and how that is known.
    fn problem_with(&self, rank: usize, begin: Instant) -> Option<(usize, String)> {
        if let Some(lost) = self.region.lost() {
            return Some((lost, "another rank reports it missing".to_owned()));
        }
        // A rank that has no connection to `rank` sees only whether rank 0, which has, is still there.
        let watched = self.peers.iter().find(|peer| peer.rank == rank).or(self.peers.first());
        if let Some(peer) = watched.filter(|peer| is_closed(peer)) {
            return Some((peer.rank, "its process is gone".to_owned()));
        }
        (begin.elapsed() >= self.timeout)
            .then(|| (rank, format!("it did not come within {:?}", self.timeout)))
    }

    fn lost(&self, rank: usize, call: Call, reason: String) -> BackendError {
        BackendError::PeerLost { rank, operation: call.operation, sequence: self.sequence, reason }
    }
}

/// Whether the other end is closed: nobody sends anything after the rendezvous, so readable means the end.
fn is_closed(peer: &Peer) -> bool {
    let mut descriptors = [PollFd::new(peer.stream.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut descriptors, PollTimeout::ZERO), Ok(ready) if ready > 0)
}

#[cfg(test)]
#[path = "shm_tests.rs"]
mod tests;
