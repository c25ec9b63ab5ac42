//! What can go wrong on a device or between ranks.

/// A failed operation. After any of these the engine is not to be used again, except after [`BackendError::OutOfMemory`]
/// at start-up.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// An allocation did not fit.
    #[error(
        "not enough memory for {what}: needs {needed_bytes} bytes, {available_bytes} bytes are free, {}; raise the limit \
         (the container's memory, `ulimit -v`), or use a smaller --dtype or model",
        shortage(*needed_bytes, *available_bytes)
    )]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        needed_bytes: usize,
        /// What the device has left.
        available_bytes: usize,
    },
    /// Another rank did not take part in a collective in time, or its process is gone.
    #[error("rank {rank} lost in {operation} number {sequence}: {reason}")]
    PeerLost {
        /// The rank that is missing.
        rank: usize,
        /// The collective, e.g. `all_reduce`.
        operation: &'static str,
        /// Which call of this process's life it was.
        sequence: u64,
        /// Time-out or closed socket.
        reason: String,
    },
    /// The ranks are not the same program with the same model.
    #[error("ranks do not belong together: rank {rank} has {found}, rank 0 has {expected}")]
    RankMismatch {
        /// The rank that differs.
        rank: usize,
        /// Its description.
        found: String,
        /// Rank 0's description.
        expected: String,
    },
    /// The device is of no use any more: a kernel went wrong, or does not end, or the hardware failed (the kernel log then has
    /// an `NVRM: Xid` line).
    #[error("{device} failed while {operation}: {reason}")]
    DeviceLost {
        /// Which device.
        device: String,
        /// What was waited for, and the kernel that was launched last.
        operation: String,
        /// The driver's words, or how long nothing happened.
        reason: String,
    },
    /// The operating system or the device refused.
    #[error("{operation}: {reason}")]
    Device {
        /// What was tried.
        operation: String,
        /// The answer.
        reason: String,
    },
}

/// By how much, and how many ranks would help.
fn shortage(needed_bytes: usize, available_bytes: usize) -> String {
    let missing = needed_bytes.saturating_sub(available_bytes) as f64 / f64::from(1 << 30);
    match needed_bytes.div_ceil(available_bytes.max(1)) {
        times @ 2..=64 => {
            format!(
                "{missing:.2} GiB too few: {times} times as many ranks (--num-shard, a device each) would share it"
            )
        }
        _ => format!("{missing:.2} GiB too few"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_says_how_much_and_how_many_ranks_would_do() {
        let error = BackendError::OutOfMemory {
            what: "the weights of this rank".to_owned(),
            needed_bytes: 140 << 30,
            available_bytes: 79 << 30,
        };
        let text = error.to_string();
        assert!(text.contains("61.00 GiB too few: 2 times as many ranks (--num-shard"), "{text}");
        assert_eq!(shortage(1 << 30, 0), "1.00 GiB too few");
    }
}
