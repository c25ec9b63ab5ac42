//! Zeroed memory on huge pages, and how much memory there is.

use std::fs;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::{BackendError, MemoryInfo};

/// A huge page of x86-64 and of arm64 with 4 KiB pages.
const HUGE_PAGE: usize = 2 << 20;

/// A zeroed anonymous mapping, touched lazily. From 2 MiB on it is aligned to huge pages and asks for them: a streamed
/// weight reads up to twice as fast from them as from small pages.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    len: usize,
    mapping: NonNull<u8>,
    mapped_len: usize,
}

// SAFETY: it owns its mapping, as a boxed slice would.
unsafe impl Send for Memory {}
// SAFETY: shared references only read.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes for `what`.
    pub(super) fn zeroed(len: usize, what: &str) -> Result<Self, BackendError> {
        let is_huge = len >= HUGE_PAGE;
        // Whole huge pages, so that the last bytes lie on one too, and one more to align the first.
        let advised = if is_huge { len.checked_next_multiple_of(HUGE_PAGE).unwrap_or(len) } else { 0 };
        let mapped_len = if is_huge { advised.saturating_add(HUGE_PAGE) } else { len.max(1) };
        let out_of_memory = || BackendError::OutOfMemory {
            what: what.to_owned(),
            needed_bytes: len,
            available_bytes: machine_memory().map_or(0, |info| info.available_bytes),
        };
        let size = NonZeroUsize::new(mapped_len).ok_or_else(out_of_memory)?;
        // Without swap reserved: a KV cache is sized by what is available and touched as it fills.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
        let mapping =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }
                .map_err(|_| out_of_memory())?
                .cast::<u8>();
        let padding =
            if is_huge { mapping.addr().get().next_multiple_of(HUGE_PAGE) - mapping.addr().get() } else { 0 };
        // SAFETY: `padding` is below HUGE_PAGE, by which the mapping is longer than `advised`, which is at least `len`.
        let start = unsafe { mapping.add(padding) };
        if is_huge {
            // SAFETY: the range lies in the mapping made above. A refusal (no such feature) only costs speed.
            let _ = unsafe { madvise(start.cast(), advised, MmapAdvise::MADV_HUGEPAGE) };
        }
        Ok(Memory { start, len, mapping, mapped_len })
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// As elements; a rest smaller than one is left out.
    pub(super) fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: zeroed or written by us, aligned to a page, any bits are a `Pod`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// As elements; a rest smaller than one is left out.
    pub(super) fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / size_of::<T>()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `zeroed`, which nothing borrows any more. It fails only for wrong arguments.
        let _ = unsafe { munmap(self.mapping.cast(), self.mapped_len) };
    }
}

/// Memory of the machine, or of the control group where that allows less.
pub(super) fn machine_memory() -> Result<MemoryInfo, BackendError> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(|error| BackendError::Device {
        operation: format!("reading {path}"),
        reason: error.to_string(),
    })?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()?.checked_mul(1024)
    };
    let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
        return Err(BackendError::Device {
            operation: format!("reading {path}"),
            reason: "no MemTotal and MemAvailable in it".to_owned(),
        });
    };
    let mut info = MemoryInfo { total_bytes: total, available_bytes: available };
    for (limit, usage) in control_groups() {
        info.total_bytes = info.total_bytes.min(limit);
        info.available_bytes = info.available_bytes.min(limit.saturating_sub(usage));
    }
    Ok(info)
}

/// Limit and usage of this process's memory control groups, of version 2 and 1, where they have a limit.
fn control_groups() -> Vec<(usize, usize)> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit_file, usage_file) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max", "memory.current")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        // A container often sees its own group at the root, whatever path its line says; groups above may limit too.
        let mut group = Some(std::path::Path::new(path.trim_start_matches('/')));
        while let Some(relative) = group {
            let directory = std::path::Path::new(root).join(relative);
            let read =
                |file: &str| fs::read_to_string(directory.join(file)).ok()?.trim().parse::<usize>().ok();
            if let (Some(limit), Some(usage)) = (read(limit_file), read(usage_file)) {
                found.push((limit, usage));
            }
            group = relative.parent();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_zeroed_aligned_and_writable() {
        let mut memory = Memory::zeroed(HUGE_PAGE + 12, "a test").unwrap();
        assert_eq!(memory.as_ptr().addr() % HUGE_PAGE, 0);
        assert_eq!(memory.len(), HUGE_PAGE + 12);
        assert!(memory.as_slice::<u32>().iter().all(|&x| x == 0));
        memory.as_mut_slice::<f32>().fill(1.0);
        assert_eq!(memory.as_slice::<f32>().last(), Some(&1.0));
    }

    #[test]
    fn impossible_sizes_name_what_was_wanted() {
        let message = Memory::zeroed(usize::MAX / 2, "the KV cache").unwrap_err().to_string();
        assert!(message.contains("the KV cache"), "{message}");
    }

    #[test]
    fn machine_has_memory() {
        let info = machine_memory().unwrap();
        assert!(info.available_bytes > 0 && info.available_bytes <= info.total_bytes);
    }
}
