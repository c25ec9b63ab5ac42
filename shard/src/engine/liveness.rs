//! Counters that others read while the engine works, so that a long or hanging step can be told from an idle engine.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What the engine tells about itself without being asked. Values are counts for people and watchdogs: no decision of
/// the engine depends on them, hence relaxed ordering.
#[derive(Debug, Default)]
pub struct Liveness {
    steps_started: AtomicU64,
    steps_finished: AtomicU64,
    blocks_total: AtomicU64,
    blocks_used: AtomicU64,
    has_failed: AtomicBool,
    memory: Mutex<Vec<(String, u64)>>,
}

impl Liveness {
    /// For an engine whose memory is distributed as `memory` (name, bytes) says.
    pub fn new(memory: Vec<(String, u64)>) -> Self {
        Self { memory: Mutex::new(memory), ..Self::default() }
    }

    /// A forward pass begins.
    pub fn step_started(&self) {
        self.steps_started.fetch_add(1, Ordering::Relaxed);
    }

    /// The forward pass that began last has ended.
    pub fn step_finished(&self) {
        self.steps_finished.fetch_add(1, Ordering::Relaxed);
    }

    /// Forward passes started and finished.
    pub fn steps(&self) -> (u64, u64) {
        // Finished first: read the other way round, a step that ends in between would look like one too many.
        let finished = self.steps_finished.load(Ordering::Relaxed);
        (self.steps_started.load(Ordering::Relaxed).max(finished), finished)
    }

    /// Blocks of the KV cache, and how many of them are held.
    pub fn set_blocks(&self, total: usize, used: usize) {
        self.blocks_total.store(total as u64, Ordering::Relaxed);
        self.blocks_used.store(used as u64, Ordering::Relaxed);
    }

    /// Blocks of the KV cache (0 before the first warm-up), and how many of them are held.
    pub fn blocks(&self) -> (u64, u64) {
        (self.blocks_total.load(Ordering::Relaxed), self.blocks_used.load(Ordering::Relaxed))
    }

    /// The engine will not answer any more.
    pub fn set_failed(&self) {
        self.has_failed.store(true, Ordering::Relaxed);
    }

    /// Whether the engine has given up.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// Adds or replaces one line of the memory ledger.
    pub fn set_memory(&self, name: &str, bytes: usize) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.retain(|(known, _)| known != name);
        memory.push((name.to_string(), bytes as u64));
    }

    /// The memory ledger: name and bytes.
    pub fn memory(&self) -> Vec<(String, u64)> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
