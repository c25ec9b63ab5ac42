//! What can be known to fail before anything starts: each answer says what was found, expected, and what changes it.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use hub::{ModelFiles, WeightFiles};

use crate::memory::{self, Available};

/// Whether the router will be able to listen on `bind`.
///
/// # Errors
/// The port is in use, or this user may not bind it, or the address is not of this machine.
pub fn check_port(bind: SocketAddr) -> Result<(), String> {
    let port = bind.port();
    match TcpListener::bind(bind) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(format!(
            "port {port} of {} is in use by another process; expected a free port: choose another with --port or stop \
             that process (`ss -ltnp 'sport = :{port}'` names it)",
            bind.ip()
        )),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "port {port} may not be bound by this user ({error}); choose one of 1024 or above with --port"
        )),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(format!(
            "address {} is not one of this machine's; change --hostname, 0.0.0.0 means all of them",
            bind.ip()
        )),
        Err(error) => Err(format!("cannot listen on {bind}: {error}; change --hostname or --port")),
    }
}

/// Whether the weights can be in memory at all.
///
/// # Errors
/// The weight files are larger than the memory that is left.
pub fn check_memory(files: &ModelFiles) -> Result<(), String> {
    match memory::available() {
        Some(available) => compare(weight_bytes(&files.weights), &available),
        // A kernel that does not tell is no reason to refuse.
        None => Ok(()),
    }
}

fn compare(weights: u64, available: &Available) -> Result<(), String> {
    if weights <= available.bytes {
        return Ok(());
    }
    Err(format!(
        "the model's weights are {} MiB, but {} leaves {} MiB; free or add memory, or choose a smaller model with \
         --model-id",
        weights >> 20,
        available.bound,
        available.bytes >> 20
    ))
}

fn weight_bytes(weights: &WeightFiles) -> u64 {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    weights.paths().iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_the_flag() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bind = listener.local_addr().unwrap();
        let reason = check_port(bind).unwrap_err();
        assert!(reason.contains(&bind.port().to_string()) && reason.contains("--port"), "{reason}");
        drop(listener);
        check_port(bind).unwrap();
    }

    #[test]
    fn a_foreign_address_is_named_with_the_flag() {
        // 192.0.2.0/24 is reserved for documentation.
        let reason = check_port("192.0.2.1:3000".parse().unwrap()).unwrap_err();
        assert!(reason.contains("--hostname"), "{reason}");
    }

    #[test]
    fn weights_larger_than_memory_are_refused_with_both_sizes() {
        let available = Available { bytes: 100 << 20, bound: "the container's memory limit" };
        compare(100 << 20, &available).unwrap();
        let reason = compare(270 << 20, &available).unwrap_err();
        assert!(
            reason.contains("270 MiB") && reason.contains("100 MiB") && reason.contains("limit"),
            "{reason}"
        );
    }
}
