//! KV cache blocks: who holds which.
//!
//! A block holds `block_size` tokens of every layer's keys and values. Block 0 is never handed out: the shards
//! use it for the liveness check and for padding. A [`BlockAllocation`] gives its blocks back when it is
//! dropped, so a request cannot keep them whichever way it ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The free list. Cloning is cheap: clones share it.
#[derive(Clone, Debug)]
pub struct BlockAllocator {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    free: Mutex<Vec<u32>>,
    capacity: usize,
    block_size: u32,
    window_size: Option<u32>,
}

impl Shared {
    /// A panic while the list was locked cannot leave it half-changed: it is only pushed to and split.
    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockAllocator {
    /// An allocator over a cache of `max_batch_total_tokens` token slots.
    ///
    /// `window_size`: models with sliding-window attention keep only so many tokens; their slots repeat.
    pub fn new(max_batch_total_tokens: u32, block_size: u32, window_size: Option<u32>) -> Self {
        let block_size = block_size.max(1);
        let blocks = max_batch_total_tokens / block_size;
        let free: Vec<u32> = (1..blocks).collect();
        let capacity = free.len();
        Self { shared: Arc::new(Shared { free: Mutex::new(free), capacity, block_size, window_size }) }
    }

    /// An allocator of the same kind over another cache. Blocks of this one are of no use to it.
    pub fn renewed(&self, max_batch_total_tokens: u32) -> Self {
        Self::new(max_batch_total_tokens, self.shared.block_size, self.shared.window_size)
    }

    /// Takes blocks for `tokens` token slots; `None` when too few are free, and then nothing changes.
    pub fn allocate(&self, tokens: u32) -> Option<BlockAllocation> {
        let needed = self.blocks_for(tokens);
        let mut free = self.shared.free();
        let rest = free.len().checked_sub(needed)?;
        let blocks = free.split_off(rest);
        drop(free);
        Some(BlockAllocation { blocks, tokens, shared: Arc::clone(&self.shared) })
    }

    /// Whether an idle cache has room for `tokens` token slots.
    pub fn can_ever_hold(&self, tokens: u32) -> bool {
        self.blocks_for(tokens) <= self.shared.capacity
    }

    /// Blocks nobody holds.
    pub fn free_blocks(&self) -> usize {
        self.shared.free().len()
    }

    /// Token slots of all blocks that can be handed out.
    pub fn capacity_tokens(&self) -> u32 {
        u32::try_from(self.shared.capacity).unwrap_or(u32::MAX).saturating_mul(self.shared.block_size)
    }

    fn blocks_for(&self, tokens: u32) -> usize {
        let tokens = self.shared.window_size.map_or(tokens, |window| tokens.min(window));
        tokens.div_ceil(self.shared.block_size) as usize
    }
}

/// Blocks of one request, given back on drop.
#[derive(Debug)]
pub struct BlockAllocation {
    blocks: Vec<u32>,
    tokens: u32,
    shared: Arc<Shared>,
}

impl BlockAllocation {
    /// The blocks, in the order in which tokens fill them.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// One slot a token: `block * block_size + offset`. With a window the blocks are used again from the start.
    pub fn slots(&self) -> Vec<u32> {
        let block_size = self.shared.block_size;
        self.blocks
            .iter()
            .flat_map(|block| block * block_size..(block + 1) * block_size)
            .cycle()
            .take(self.tokens as usize)
            .collect()
    }
}

impl Drop for BlockAllocation {
    fn drop(&mut self) {
        self.shared.free().append(&mut self.blocks);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn never_hands_out_block_zero() {
        let allocator = BlockAllocator::new(64, 16, None);
        assert_eq!(allocator.free_blocks(), 3);
        let all = allocator.allocate(48).unwrap();
        assert!(!all.blocks().contains(&0));
        assert!(allocator.allocate(1).is_none());
        assert_eq!(allocator.capacity_tokens(), 48);
        assert!(allocator.can_ever_hold(48) && !allocator.can_ever_hold(49));
    }

    #[test]
    fn slots_follow_the_blocks_and_stop_at_the_token_count() {
        let allocator = BlockAllocator::new(16, 4, None);
        let allocation = allocator.allocate(6).unwrap();
        let [a, b] = *allocation.blocks() else { panic!("two blocks") };
        assert_eq!(allocation.slots(), [4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * b + 1]);
    }

    #[test]
    fn a_window_reuses_its_blocks() {
        let allocator = BlockAllocator::new(64, 4, Some(8));
        let allocation = allocator.allocate(19).unwrap();
        assert_eq!(allocation.blocks().len(), 2);
        let slots = allocation.slots();
        assert_eq!(slots.len(), 19);
        assert_eq!(slots[0], slots[8]);
        assert_eq!(slots[2], slots[18]);
    }

    #[test]
    fn random_rounds_keep_every_block_in_exactly_one_place() {
        let mut rng = StdRng::seed_from_u64(7);
        let allocator = BlockAllocator::new(32 * 4, 4, None);
        let mut held: Vec<BlockAllocation> = Vec::new();
        for _ in 0..5_000 {
            if rng.random_bool(0.55) {
                let tokens = rng.random_range(1..40);
                let before = allocator.free_blocks();
                match allocator.allocate(tokens) {
                    Some(allocation) => held.push(allocation),
                    None => {
                        assert!(before < (tokens as usize).div_ceil(4));
                        assert_eq!(allocator.free_blocks(), before);
                    }
                }
            } else if !held.is_empty() {
                held.swap_remove(rng.random_range(0..held.len()));
            }
            let mut seen: HashSet<u32> = allocator.shared.free().iter().copied().collect();
            let mut count = seen.len();
            for allocation in &held {
                count += allocation.blocks().len();
                seen.extend(allocation.blocks());
                assert_eq!(allocation.slots().len(), allocation.tokens as usize);
            }
            assert_eq!((count, seen.len()), (31, 31));
            assert!(!seen.contains(&0));
        }
        drop(held);
        assert_eq!(allocator.free_blocks(), 31);
    }
}
