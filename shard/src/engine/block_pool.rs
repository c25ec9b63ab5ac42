//! Who owns which block of the KV cache.
//!
//! A router brings its own blocks with every request; then the pool only keeps count of them. A caller that brings none
//! (a benchmark, a warm-up) gets blocks from here, never one that a request of a router holds. Block 0 is reserved for
//! liveness probes and is never handed out.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The blocks of one KV cache. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct BlockPool(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// How many leases hold each block; several when prompts share a prefix.
    holders: Vec<u32>,
    /// Blocks other than 0 with at least one holder.
    used: usize,
    /// Where the search for free blocks goes on: blocks are reused as late as possible, so a search is short.
    next: usize,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, block 0 included.
    pub(super) fn new(num_blocks: usize) -> Self {
        Self(Arc::new(Mutex::new(State { holders: vec![0; num_blocks], used: 0, next: 1 })))
    }

    /// Blocks in all, block 0 included.
    pub(super) fn num_blocks(&self) -> usize {
        self.state().holders.len()
    }

    /// Blocks that are held, block 0 not counted.
    pub(super) fn num_used(&self) -> usize {
        self.state().used
    }

    /// Takes `count` blocks that nobody holds; `None` when fewer are free, and then nothing changes.
    pub(super) fn allocate(&self, count: usize) -> Option<BlockLease> {
        let mut state = self.state();
        let num_blocks = state.holders.len();
        if count > num_blocks.saturating_sub(1 + state.used) {
            return None;
        }
        let mut blocks = Vec::with_capacity(count);
        while blocks.len() < count {
            let block = state.next;
            state.next = if block + 1 < num_blocks { block + 1 } else { 1 };
            if state.holders[block] == 0 {
                state.holders[block] = 1;
                // A pool of 2^32 blocks would be larger than any memory.
                blocks.push(block as u32);
            }
        }
        state.used += count;
        drop(state);
        Some(BlockLease { pool: self.clone(), blocks })
    }

    /// Holds blocks that somebody else has chosen, possibly blocks that are held already.
    ///
    /// # Errors
    /// The first block that this pool does not have.
    pub(super) fn adopt(&self, blocks: Vec<u32>) -> Result<BlockLease, u32> {
        let mut state = self.state();
        if let Some(&unknown) = blocks.iter().find(|&&block| block as usize >= state.holders.len()) {
            return Err(unknown);
        }
        for &block in &blocks {
            state.holders[block as usize] += 1;
            if state.holders[block as usize] == 1 && block != 0 {
                state.used += 1;
            }
        }
        drop(state);
        Ok(BlockLease { pool: self.clone(), blocks })
    }

    /// The state is whole between any two statements that can panic, so a poisoned lock is as good as another.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks of one sequence, in the order of its tokens; given back when dropped.
#[derive(Debug)]
pub(super) struct BlockLease {
    pool: BlockPool,
    blocks: Vec<u32>,
}

impl Deref for BlockLease {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.blocks
    }
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        for &block in &self.blocks {
            state.holders[block as usize] -= 1;
            if state.holders[block as usize] == 0 && block != 0 {
                state.used -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_every_block_but_the_first_and_takes_them_back() {
        let pool = BlockPool::new(5);
        let lease = pool.allocate(4).unwrap();
        let mut blocks = lease.to_vec();
        blocks.sort_unstable();
        assert_eq!(blocks, [1, 2, 3, 4]);
        assert!(pool.allocate(1).is_none());
        drop(lease);
        assert_eq!((pool.num_used(), pool.num_blocks()), (0, 5));
        assert!(pool.allocate(5).is_none());
    }

    #[test]
    fn never_hands_out_what_a_router_has_chosen() {
        let pool = BlockPool::new(4);
        let adopted = pool.adopt(vec![1, 3]).unwrap();
        let again = pool.adopt(vec![1]).unwrap();
        assert_eq!(*pool.allocate(1).unwrap(), [2]);
        drop(adopted);
        assert_eq!(pool.num_used(), 1, "block 1 has another holder");
        drop(again);
        assert_eq!(pool.num_used(), 0);
    }

    #[test]
    fn the_reserved_block_can_be_adopted_by_everybody() {
        let pool = BlockPool::new(2);
        let (_first, _second) = (pool.adopt(vec![0]).unwrap(), pool.adopt(vec![0]).unwrap());
        assert_eq!(pool.num_used(), 0);
        assert!(pool.allocate(1).is_some());
        assert_eq!(pool.adopt(vec![0, 2]).unwrap_err(), 2);
    }
}
