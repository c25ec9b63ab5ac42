//! A few threads that run one function together, many thousand times a second.
//!
//! The caller is thread 0. The others spin for a moment after each run, since the next operation of a forward pass comes
//! within microseconds, and then park: an idle shard costs nothing. [`cores`] says where they are pinned.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, ThreadId};

use super::cores;
use crate::BackendError;

/// Spins of a waiting thread before it lets others run: about 50 microseconds. Longer than any gap between two operations
/// of one pass, much shorter than a step.
const SPINS: u32 = 2000;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that run a function together.
pub(super) struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The caller's processor, where threads are pinned.
    caller_cpu: Option<usize>,
    /// The caller that was pinned.
    pinned_caller: Option<ThreadId>,
}

struct Shared {
    /// Valid while `pending` is not zero.
    task: UnsafeCell<Option<*const Task<'static>>>,
    /// Number of runs begun.
    epoch: AtomicU32,
    /// Workers that have not finished the run.
    pending: AtomicUsize,
    is_parked: Vec<AtomicBool>,
    is_stopping: AtomicBool,
    has_panicked: AtomicBool,
    arrived: AtomicUsize,
    barriers: AtomicUsize,
}

// SAFETY: `task` is written by the caller before it raises `epoch` and read by workers after they saw that; all else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `task` is to something `Sync`.
unsafe impl Send for Shared {}

impl Threads {
    /// Starts `count - 1` workers. `cpus`: the processor of each thread, the caller's first; none: no thread is pinned.
    pub(super) fn start(count: usize, cpus: Option<&[usize]>) -> Result<Self, BackendError> {
        let workers = count.saturating_sub(1);
        let shared = Arc::new(Shared {
            task: UnsafeCell::new(None),
            epoch: AtomicU32::new(0),
            pending: AtomicUsize::new(0),
            is_parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            is_stopping: AtomicBool::new(false),
            has_panicked: AtomicBool::new(false),
            arrived: AtomicUsize::new(0),
            barriers: AtomicUsize::new(0),
        });
        let cpu_of = |thread: usize| cpus.and_then(|cpus| cpus.get(thread).copied());
        let mut threads = Threads {
            shared,
            workers: Vec::with_capacity(workers),
            caller_cpu: cpu_of(0),
            pinned_caller: None,
        };
        for worker in 0..workers {
            let shared = Arc::clone(&threads.shared);
            let cpu = cpu_of(worker + 1);
            let work = move || {
                if let Some(cpu) = cpu {
                    cores::pin_thread(cpu);
                }
                shared.work(worker);
            };
            let handle = thread::Builder::new()
                .name(format!("cpu-worker-{}", worker + 1))
                .spawn(work)
                .map_err(|error| BackendError::Device {
                    operation: format!("starting CPU thread {} of {count}", worker + 2),
                    reason: format!("{error}; --threads sets their number"),
                })?;
            threads.workers.push(handle);
        }
        Ok(threads)
    }

    /// Number of threads, the caller's included.
    pub(super) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Pins the calling thread as thread 0. Not part of [`Threads::run`]: weights are loaded by a thread that goes on to start
    /// others, which would inherit its place.
    pub(super) fn pin_caller(&mut self) {
        let Some(cpu) = self.caller_cpu else { return };
        let caller = Some(thread::current().id());
        if self.pinned_caller != caller {
            cores::pin_thread(cpu);
            self.pinned_caller = caller;
        }
    }

    /// Runs `task` with each thread's index and returns when all are done. Not to be called from within a task.
    ///
    /// # Panics
    /// When the task panicked in some thread.
    pub(super) fn run(&mut self, task: &Task<'_>) {
        if self.workers.is_empty() {
            task(0);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker is in a task now, and none will be in this one after `run`.
        let erased = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: no worker reads `task` until `epoch` rises.
        unsafe { *shared.task.get() = Some(erased) };
        shared.pending.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (handle, is_parked) in self.workers.iter().zip(&shared.is_parked) {
            if is_parked.load(Ordering::SeqCst) {
                handle.thread().unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        if own.is_err() {
            shared.has_panicked.store(true, Ordering::Relaxed);
        }
        spin_until(|| shared.pending.load(Ordering::Acquire) == 0);
        match own {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => assert!(!shared.has_panicked.load(Ordering::Relaxed), "a CPU worker thread panicked"),
        }
    }

    /// What tasks of the next run may wait at.
    pub(super) fn barrier(&self) -> Barrier {
        Barrier { shared: Arc::clone(&self.shared), count: self.count() }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                if spins < SPINS {
                    spin_loop();
                } else {
                    self.is_parked[worker].store(true, Ordering::SeqCst);
                    if self.epoch.load(Ordering::SeqCst) == seen {
                        thread::park();
                    }
                    self.is_parked[worker].store(false, Ordering::SeqCst);
                }
            }
            seen = seen.wrapping_add(1);
            if self.is_stopping.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: written before `epoch` rose; the caller waits for `pending`, so what it points to lives.
            if let Some(task) = unsafe { *self.task.get() } {
                // SAFETY: as above.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| task(worker + 1))).is_err() {
                    self.has_panicked.store(true, Ordering::Relaxed);
                }
            }
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }
}

/// A meeting point of all threads of a run.
pub(super) struct Barrier {
    shared: Arc<Shared>,
    count: usize,
}

impl Barrier {
    /// Waits until every thread of the run is here; what each wrote before is then visible to all.
    ///
    /// # Panics
    /// When another thread has panicked and so will not come.
    pub(super) fn wait(&self) {
        if self.count == 1 {
            return;
        }
        let turn = self.shared.barriers.load(Ordering::Acquire);
        if self.shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            self.shared.arrived.store(0, Ordering::Relaxed);
            self.shared.barriers.fetch_add(1, Ordering::Release);
        } else {
            spin_until(|| {
                assert!(!self.shared.has_panicked.load(Ordering::Relaxed), "another CPU thread panicked");
                self.shared.barriers.load(Ordering::Acquire) != turn
            });
        }
    }
}

/// Spins, and gives way to other processes when it takes long.
fn spin_until(is_done: impl Fn() -> bool) {
    let mut spins = 0;
    while !is_done() {
        spins += 1;
        if spins < SPINS { spin_loop() } else { thread::yield_now() }
    }
}

/// Part `index` of `count` nearly equal consecutive parts of `0..len`.
pub(super) fn part(len: usize, index: usize, count: usize) -> Range<usize> {
    len * index / count..len * (index + 1) / count
}

/// A pointer that threads of a run share, each writing its own part.
pub(super) struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

// SAFETY: only a pointer; each use says why its part is its own.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(super) fn new(slice: &mut [T]) -> Self {
        SharedMut(slice.as_mut_ptr())
    }

    pub(super) fn get(self) -> *mut T {
        self.0
    }

    /// The elements of `range`, to read.
    ///
    /// # Safety
    /// Within the slice it was made of, which is still borrowed, and no thread writes these elements now.
    pub(super) unsafe fn read<'a>(self, range: Range<usize>) -> &'a [T] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts(self.0.add(range.start), range.len()) }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// Within the slice it was made of, which is still borrowed, and no other thread uses these elements now.
    pub(super) unsafe fn slice<'a>(self, range: Range<usize>) -> &'a mut [T] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI32;
    use std::time::Duration;

    use nix::sched::{CpuSet, sched_getaffinity};
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn every_thread_runs_once_and_barriers_hold() {
        for count in [1, 2, 3] {
            let mut threads = Threads::start(count, None).unwrap();
            let barrier = threads.barrier();
            for round in 0..200 {
                let before = AtomicUsize::new(0);
                threads.run(&|_| {
                    before.fetch_add(1, Ordering::Relaxed);
                    barrier.wait();
                    assert_eq!(before.load(Ordering::Relaxed), count);
                });
                if round % 50 == 0 {
                    // Long enough for the workers to park.
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    /// Where the calling thread may run.
    fn own_cpus() -> Vec<usize> {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap()).collect()
    }

    #[test]
    fn threads_stay_where_they_are_put() {
        let all = own_cpus();
        let cpus: Vec<usize> = (0..3).map(|thread| all[thread % all.len()]).collect();
        // In a thread of its own, since the test's own is used again.
        thread::spawn(move || {
            let mut threads = Threads::start(3, Some(&cpus)).unwrap();
            assert_eq!(own_cpus(), all, "starting them leaves the caller alone");
            threads.pin_caller();
            threads.run(&|index| assert_eq!(own_cpus(), [cpus[index]]));
            let others = thread::spawn(own_cpus).join().unwrap();
            assert_eq!(others, [cpus[0]], "what a pinned thread starts inherits its place");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn idle_threads_use_no_processor_time() {
        let mut threads = Threads::start(3, None).unwrap();
        let ids = [const { AtomicI32::new(0) }; 3];
        threads.run(&|index| ids[index].store(nix::unistd::gettid().as_raw(), Ordering::Relaxed));
        // Nanoseconds that a worker has run for so far.
        let used = |worker: usize| {
            let id = ids[worker].load(Ordering::Relaxed);
            let text = std::fs::read_to_string(format!("/proc/self/task/{id}/schedstat")).unwrap();
            Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
        };
        let are_parked = || threads.shared.is_parked.iter().all(|is_parked| is_parked.load(Ordering::SeqCst));
        while !are_parked() {
            thread::sleep(Duration::from_millis(1));
        }
        let before = [1, 2].map(used);
        thread::sleep(Duration::from_millis(300));
        let after = [1, 2].map(used);
        for (before, after) in before.into_iter().zip(after) {
            assert!(after - before < Duration::from_millis(3), "{before:?} {after:?}");
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller() {
        let mut threads = Threads::start(2, None).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| threads.run(&|index| assert_eq!(index, 0))));
        assert!(result.is_err());
    }

    #[test]
    fn parts_cover_everything_once() {
        for (len, count) in [(0, 2), (1, 2), (7, 3), (64, 4)] {
            let all: Vec<usize> = (0..count).flat_map(|index| part(len, index, count)).collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>());
        }
    }
}
