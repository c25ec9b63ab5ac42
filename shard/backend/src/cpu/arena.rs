//! Weights side by side on huge pages.
//!
//! Most weights of a small model are smaller than a huge page or end within one. In chunks of their own they would lie on
//! small pages or waste half a page each; in common chunks all of them lie on huge pages.

use std::sync::Arc;

use super::memory::Memory;
use crate::BackendError;

/// Size of a chunk, of which only what is used is ever touched.
const CHUNK_BYTES: usize = 256 << 20;

/// Start of a region: a cache line, which is also a step of a panel.
const ALIGNMENT: usize = 64;

/// Hands out regions of chunks. A chunk goes when the last of its regions goes.
#[derive(Debug, Default)]
pub(super) struct Arena {
    chunk: Option<Arc<Memory>>,
    used: usize,
}

impl Arena {
    /// A zeroed region of `len` bytes for `what`.
    pub(super) fn region(&mut self, len: usize, what: &str) -> Result<Region, BackendError> {
        let chunk = match &self.chunk {
            Some(chunk) if self.used.saturating_add(len) <= chunk.len() => Arc::clone(chunk),
            _ => {
                let chunk = Arc::new(Memory::zeroed(len.max(CHUNK_BYTES), what)?);
                self.chunk = Some(Arc::clone(&chunk));
                self.used = 0;
                chunk
            }
        };
        let start = self.used;
        self.used = (start + len).next_multiple_of(ALIGNMENT);
        Ok(Region { chunk, start, len })
    }

    /// Takes back the region that was handed out last, whatever is written there; of another one nothing is reused.
    pub(super) fn take_back(&mut self, mut region: Region) {
        let is_of_this_chunk = self.chunk.as_ref().is_some_and(|chunk| Arc::ptr_eq(chunk, &region.chunk));
        if is_of_this_chunk && (region.start + region.len).next_multiple_of(ALIGNMENT) == self.used {
            region.as_mut_slice::<u8>().fill(0);
            self.used = region.start;
        }
    }
}

/// Bytes of a chunk that nothing else uses.
#[derive(Debug)]
pub(super) struct Region {
    chunk: Arc<Memory>,
    start: usize,
    len: usize,
}

impl Region {
    /// Size in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// As elements; a rest smaller than one is left out.
    pub(super) fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: within the chunk, aligned to 64 bytes; any bits are a `Pod`, and nobody else has this region.
        unsafe {
            std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start).cast(), self.len / size_of::<T>())
        }
    }

    /// As elements; a rest smaller than one is left out.
    pub(super) fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let start = self.chunk.as_ptr().cast_mut();
        // SAFETY: as in `as_slice`; regions do not overlap, and this one is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start.add(self.start).cast(), self.len / size_of::<T>()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_start_at_cache_lines() {
        let mut arena = Arena::default();
        let mut regions: Vec<Region> = (1..40).map(|i| arena.region(i * 1000, "a test").unwrap()).collect();
        for (index, region) in regions.iter_mut().enumerate() {
            assert_eq!(region.as_slice::<u8>().as_ptr().addr() % ALIGNMENT, 0);
            region.as_mut_slice::<u8>().fill(index as u8 + 1);
        }
        for (index, region) in regions.iter().enumerate() {
            assert!(region.as_slice::<u8>().iter().all(|&x| x == index as u8 + 1));
        }
    }

    #[test]
    fn what_was_taken_back_is_handed_out_again_as_zeros() {
        let mut arena = Arena::default();
        let mut first = arena.region(100, "a test").unwrap();
        first.as_mut_slice::<u8>().fill(1);
        let mut second = arena.region(1000, "a test").unwrap();
        let start = second.as_slice::<u8>().as_ptr();
        second.as_mut_slice::<u8>().fill(2);
        arena.take_back(second);
        let third = arena.region(500, "a test").unwrap();
        assert!(third.as_slice::<u8>().as_ptr() == start && third.as_slice::<u8>().iter().all(|&x| x == 0));
        // Not the last one: it stays as it is.
        arena.take_back(first);
        let fourth = arena.region(10, "a test").unwrap();
        assert!(fourth.as_slice::<u8>().as_ptr() > start);
    }

    #[test]
    fn a_region_larger_than_a_chunk_has_its_own() {
        let mut arena = Arena::default();
        let small = arena.region(10, "a test").unwrap();
        let large = arena.region(CHUNK_BYTES + 1, "a test").unwrap();
        assert_eq!((small.len(), large.len()), (10, CHUNK_BYTES + 1));
    }
}
