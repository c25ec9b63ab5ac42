//! How much memory a target takes: an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// No target needs as much at once: whoever asks for more believes a length from a file. The request fails, which ends the
/// process with the number in the message.
const MAX_REQUEST_BYTES: usize = 2 << 30;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count of the bytes in use.
#[derive(Debug)]
pub struct CountingAllocator;

fn add(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged, or fails as an allocator may.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MAX_REQUEST_BYTES {
            return std::ptr::null_mut();
        }
        add(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MAX_REQUEST_BYTES {
            return std::ptr::null_mut();
        }
        add(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from the system's allocator with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if new_size > MAX_REQUEST_BYTES {
            return std::ptr::null_mut();
        }
        add(new_size);
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from the system's allocator with this layout; the caller vouches for the size.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// The most bytes that were in use while `run` ran beyond those before it, all threads together.
pub fn peak_of(run: impl FnOnce()) -> usize {
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    run();
    PEAK.load(Ordering::Relaxed).saturating_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_was_in_use_at_once() {
        let peak = peak_of(|| {
            drop(vec![0_u8; 1 << 20]);
            drop(vec![0_u8; 3 << 20]);
        });
        // Other tests run beside this one.
        assert!(peak >= 3 << 20, "{peak}");
    }
}
