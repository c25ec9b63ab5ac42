//! Buffers that go from one tensor to the next.

use std::sync::{Mutex, PoisonError};

/// Enough for the matrices that are packed together: queries, keys, values.
const MAX_BUFFERS: usize = 4;
/// Larger ones are rare, such as an embedding, and would sit idle until the end of loading.
const MAX_BYTES: usize = 32 << 20;

/// A few buffers that nobody uses now.
#[derive(Default)]
pub(super) struct SpareBuffers<T>(Mutex<Vec<Vec<T>>>);

impl<T: Copy + Default> SpareBuffers<T> {
    /// A buffer of `len` elements of any content: the smallest spare one that is large enough, else a new one.
    pub(super) fn take(&self, len: usize) -> Vec<T> {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = (0..spare.len()).filter(|&index| spare[index].capacity() >= len);
        match fitting.min_by_key(|&index| spare[index].capacity()) {
            Some(index) => {
                let mut buffer = spare.swap_remove(index);
                buffer.resize(len, T::default());
                buffer
            }
            None => vec![T::default(); len],
        }
    }

    /// Keeps a buffer for later, in place of the smallest when there are many.
    pub(super) fn give(&self, buffer: Vec<T>) {
        if buffer.capacity() * size_of::<T>() > MAX_BYTES {
            return;
        }
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(buffer);
        if spare.len() > MAX_BUFFERS
            && let Some(smallest) = (0..spare.len()).min_by_key(|&index| spare[index].capacity())
        {
            spare.swap_remove(smallest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_that_fits_is_used_again() {
        let spare = SpareBuffers::<u8>::default();
        for size in [300, 100, 200, 50, 400] {
            spare.give(Vec::with_capacity(size));
        }
        assert_eq!(spare.take(150).capacity(), 200);
        assert_eq!(spare.take(150).capacity(), 300);
        let largest = spare.take(400);
        assert_eq!((largest.len(), largest.capacity()), (400, 400));
        assert_eq!(spare.take(101), vec![0; 101], "none is left that is large enough");
        assert_eq!(spare.take(100).capacity(), 100);
        spare.give(vec![0; MAX_BYTES + 1]);
        assert!(spare.take(1).capacity() < 50);
    }
}
