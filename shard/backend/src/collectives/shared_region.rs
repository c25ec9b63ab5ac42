//! Memory that all ranks have mapped: what they exchange, and how far each has come.
//!
//! Layout: a header page with one line a rank, then two slots a rank. Exchange `n` uses slot `n % 2` of every rank: a rank
//! writes its own, announces `n + 1`, and reads all slots once all have announced it. It may write to the same slot again in
//! exchange `n + 2`, since by then every rank has announced `n + 2`, after it had read the slots of `n`. So an exchange costs
//! one barrier.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::rendezvous::{MAX_RANKS, memory_size};

/// Elements of a slot: 256 KiB, so that what a few ranks exchange at a time stays in the second-level cache.
pub(super) const SLOT_LEN: usize = 1 << 16;
/// Two cache lines, since processors fetch neighbours.
const LINE_BYTES: usize = 128;

/// One rank's announcements, on a line of its own.
#[repr(C, align(128))]
struct Line {
    /// Number of exchanges whose slot this rank has written, modulo 2^32.
    announced: AtomicU32,
    /// Ranks that sleep until `announced` changes.
    sleepers: AtomicU32,
    /// What the exchange in each slot is part of, to notice ranks that do different things.
    calls: [AtomicU64; 2],
}

const _: () = assert!(size_of::<Line>() == LINE_BYTES);

/// What comes before the slots.
#[repr(C, align(4096))]
struct Header {
    /// One more than the rank that somebody found missing; 0: none.
    lost: AtomicU32,
    lines: [Line; MAX_RANKS],
}

/// The mapped memory of a group of ranks.
pub(super) struct SharedRegion {
    start: NonNull<Header>,
    world_size: usize,
}

// SAFETY: the region is plain memory that belongs to no thread; its header is atomic and its slots are only reached through
// methods whose contracts order the accesses.
unsafe impl Send for SharedRegion {}

impl SharedRegion {
    const fn bytes(world_size: usize) -> usize {
        size_of::<Header>() + 2 * world_size * SLOT_LEN * size_of::<f32>()
    }

    /// Makes zeroed memory for `world_size` ranks whose size nobody can change any more.
    pub(super) fn create(world_size: usize) -> io::Result<OwnedFd> {
        let memory =
            memfd_create(c"quartet-collectives", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&memory, Self::bytes(world_size) as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(memory)
    }

    /// Maps memory that rank 0 has made with [`SharedRegion::create`].
    pub(super) fn map(memory: &OwnedFd, world_size: usize) -> io::Result<Self> {
        let bytes = Self::bytes(world_size);
        let seals = SealFlag::from_bits_truncate(fcntl(memory, FcntlArg::F_GET_SEALS)?);
        // Access past the end would kill the process.
        if memory_size(memory)? != bytes as u64 || !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::other(format!("expected sealed memory of {bytes} bytes")));
        }
        let length = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, memory, 0) }?;
        Ok(Self { start: start.cast(), world_size })
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping is page-aligned, larger than the header and lives as long as `self`; all ranks reach the
        // header's fields, for which every bit pattern is valid, through atomics only.
        unsafe { self.start.as_ref() }
    }

    fn slot(&self, rank: usize, exchange: u32) -> NonNull<f32> {
        assert!(rank < self.world_size, "rank {rank} of {}", self.world_size);
        let index = 2 * rank + (exchange % 2) as usize;
        // SAFETY: the mapping holds two slots for every rank behind the header.
        unsafe { self.start.byte_add(size_of::<Header>()).cast::<f32>().add(index * SLOT_LEN) }
    }

    /// Writes this rank's part of exchange number `exchange`, then announces it. The caller has seen all ranks announce the
    /// exchange before.
    pub(super) fn publish(&self, rank: usize, exchange: u32, call: u64, data: &[f32]) {
        assert!(data.len() <= SLOT_LEN, "{} elements in a slot of {SLOT_LEN}", data.len());
        // SAFETY: the slot holds as many elements and is not `data`; no rank reads it now, since all have announced the
        // exchange before this one, which they do after they have read the one before that, the slot's last.
        unsafe { self.slot(rank, exchange).as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        let line = &self.header().lines[rank];
        line.calls[(exchange % 2) as usize].store(call, Ordering::Relaxed);
        // Sequentially consistent with a sleeper's entry: either it sees the new number, or we see it sleep.
        line.announced.store(exchange.wrapping_add(1), Ordering::SeqCst);
        if line.sleepers.load(Ordering::SeqCst) > 0 {
            wake(&line.announced);
        }
    }

    /// Whether `rank` has announced `exchange`.
    pub(super) fn is_published(&self, rank: usize, exchange: u32) -> bool {
        let announced = self.header().lines[rank].announced.load(Ordering::Acquire);
        // The numbers wrap; ranks are never more than one apart.
        announced.wrapping_sub(exchange.wrapping_add(1)).cast_signed() >= 0
    }

    /// Sleeps until `rank` announces something or `timeout` has passed; may return early.
    pub(super) fn sleep(&self, rank: usize, exchange: u32, timeout: Duration) {
        let line = &self.header().lines[rank];
        line.sleepers.fetch_add(1, Ordering::SeqCst);
        let announced = line.announced.load(Ordering::SeqCst);
        if announced == exchange {
            wait(&line.announced, announced, timeout);
        }
        line.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// What `rank` said `exchange` is part of; it has announced it.
    pub(super) fn call(&self, rank: usize, exchange: u32) -> u64 {
        self.header().lines[rank].calls[(exchange % 2) as usize].load(Ordering::Relaxed)
    }

    /// The first `len` elements that `rank` wrote in `exchange`, which it has announced and of which this rank has not yet
    /// announced the next but one.
    pub(super) fn read(&self, rank: usize, exchange: u32, len: usize) -> &[f32] {
        assert!(len <= SLOT_LEN, "{len} elements of a slot of {SLOT_LEN}");
        // SAFETY: the slot holds as many elements, which its owner does not write again before this rank has announced the
        // next exchange, and this rank does so only with `&mut` access to the communicator, when no such slice lives.
        unsafe { NonNull::slice_from_raw_parts(self.slot(rank, exchange), len).as_ref() }
    }

    /// Tells everybody that `rank` is missing; the first report stands.
    pub(super) fn report_lost(&self, rank: usize) {
        let _ = self.header().lost.compare_exchange(0, rank as u32 + 1, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The rank that somebody found missing.
    pub(super) fn lost(&self) -> Option<usize> {
        (self.header().lost.load(Ordering::Relaxed) as usize).checked_sub(1)
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and no reference into it outlives `self`. That it can be unmapped was
        // given when it was mapped.
        let _ = unsafe { munmap(self.start.cast(), Self::bytes(self.world_size)) };
    }
}

/// Sleeps while `word` is `value`. Not the private kind of futex: the word is shared between processes.
fn wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().cast_signed(),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: the kernel reads the word, which lives, and the time.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const timeout) };
}

fn wake(word: &AtomicU32) {
    // SAFETY: the kernel uses the address only to find who sleeps on it.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}
