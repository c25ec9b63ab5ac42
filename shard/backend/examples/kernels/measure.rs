//! Medians, their table, and the plain loop to compare with.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Whether [`seconds_now`] counts the processor time of this thread: with one thread, what else runs then disturbs less.
pub(crate) static COUNTS_CPU_TIME: AtomicBool = AtomicBool::new(false);

fn seconds_now() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    if !COUNTS_CPU_TIME.load(Ordering::Relaxed) {
        return START.get_or_init(Instant::now).elapsed().as_secs_f64();
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes `time` only; this clock exists wherever Linux runs.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// One measured figure.
pub(crate) struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Figure { name: name.into(), value, unit }
    }

    /// As a JSON object.
    pub(crate) fn json(&self) -> String {
        format!("{{\"name\":\"{}\",\"value\":{},\"unit\":\"{}\"}}", self.name, self.value, self.unit)
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<36} {:>10.1} {}", self.name, self.value, self.unit)
    }
}

/// The median time of `runs` calls, after two that do not count.
pub(crate) fn median_seconds(runs: usize, mut call: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..runs + 2)
        .map(|_| {
            let start = seconds_now();
            call();
            seconds_now() - start
        })
        .skip(2)
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// Adds up what the parts of a step take, once it is started.
#[derive(Default)]
pub(crate) struct PartsClock {
    is_running: bool,
    /// Of each part its name, and its seconds in each step.
    parts: Vec<(&'static str, Vec<f64>)>,
    steps: usize,
}

impl PartsClock {
    pub(crate) fn start(&mut self) {
        *self = PartsClock { is_running: true, ..PartsClock::default() };
    }

    pub(crate) fn end_step(&mut self) {
        self.steps += 1;
    }

    /// Calls `call`, whose time counts as part `name` of this step.
    pub(crate) fn time<T>(&mut self, name: &'static str, call: impl FnOnce() -> T) -> T {
        if !self.is_running {
            return call();
        }
        let start = seconds_now();
        let result = call();
        let seconds = seconds_now() - start;
        if self.parts.iter().all(|part| part.0 != name) {
            self.parts.push((name, Vec::new()));
        }
        for (_, times) in self.parts.iter_mut().filter(|part| part.0 == name) {
            times.resize(self.steps + 1, 0.0);
            times[self.steps] += seconds;
        }
        result
    }

    /// The medians over the steps; stops the clock.
    pub(crate) fn medians(&mut self) -> Vec<(&'static str, f64)> {
        self.is_running = false;
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        self.parts.drain(..).map(|(name, times)| (name, median(times))).collect()
    }
}

/// Bytes each thread reads: far more than any cache.
const READ_BYTES: usize = 256 << 20;
const HUGE_PAGE: usize = 2 << 20;

/// GB/s of `threads` threads that each add up memory of their own on huge pages.
pub(crate) fn memory_read(threads: usize) -> f64 {
    let memories: Vec<Vec<u64>> = (0..threads)
        .map(|_| {
            let mut memory: Vec<u64> = Vec::with_capacity((READ_BYTES + HUGE_PAGE) / 8);
            let start = memory.as_ptr().addr().next_multiple_of(HUGE_PAGE);
            // SAFETY: the range lies within the vector's memory, which stays mapped; the call only advises.
            unsafe { libc::madvise(start as *mut libc::c_void, READ_BYTES, libc::MADV_HUGEPAGE) };
            memory.resize((READ_BYTES + HUGE_PAGE) / 8, 1);
            memory
        })
        .collect();
    let seconds = median_seconds(7, || {
        std::thread::scope(|scope| {
            for memory in &memories[1..] {
                scope.spawn(|| std::hint::black_box(sum(memory)));
            }
            std::hint::black_box(sum(&memories[0]));
        });
    });
    (threads * memories[0].len() * 8) as f64 / seconds / 1e9
}

fn sum(memory: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { sum_avx2(memory) };
    }
    plain_sum(memory)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(memory: &[u64]) -> u64 {
    plain_sum(memory)
}

#[inline(always)]
fn plain_sum(memory: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in memory.as_chunks::<32>().0 {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(x);
        }
    }
    sums.iter().fold(0, |a, &b| a.wrapping_add(b))
}
