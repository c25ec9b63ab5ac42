//! Which processes live, read from `/proc`.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process found in `/proc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its name, at most 15 characters.
    pub name: String,
    /// Peak resident memory in KiB, 0 when unknown.
    pub peak_kib: u64,
}

/// The children of `parent` (not their children).
pub fn children(parent: u32) -> Vec<Process> {
    all().into_iter().filter(|process| process.parent as u32 == parent).collect()
}

/// Whether a process is there and no zombie.
pub fn is_alive(pid: i32) -> bool {
    all().iter().any(|process| process.pid == pid)
}

/// Open file descriptors of a process, 0 when it is gone.
pub fn num_descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Resident memory of a process in KiB, 0 when it is gone.
pub fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Seconds of processor time that all threads of a process have used, to the nanosecond.
pub fn cpu_seconds(pid: i32) -> f64 {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let of_thread = |path: std::path::PathBuf| -> Option<f64> {
        std::fs::read_to_string(path.join("schedstat")).ok()?.split(' ').next()?.parse().ok()
    };
    threads.flatten().filter_map(|thread| of_thread(thread.path())).sum::<f64>() / 1e9
}

/// Sends `signal`; a process that is gone already is fine.
pub fn send(pid: i32, signal: Signal) {
    // ESRCH means it has ended, which is what every caller is after.
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Waits until none of `pids` lives; returns those that still do at the deadline.
pub fn wait_gone(pids: &[i32], deadline: Duration) -> Vec<i32> {
    let end = Instant::now() + deadline;
    loop {
        let left: Vec<i32> = pids.iter().copied().filter(|&pid| is_alive(pid)).collect();
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(read).collect()
}

fn read(pid: i32) -> Option<Process> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if field("State:")?.starts_with('Z') {
        return None;
    }
    Some(Process {
        pid,
        parent: field("PPid:")?.parse().ok()?,
        name: field("Name:")?.to_string(),
        peak_kib: field("VmHWM:").and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(0),
    })
}
