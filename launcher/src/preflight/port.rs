//! Whether the router will be able to listen, and who is in the way.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

/// Whether the router will be able to listen on `bind`.
///
/// # Errors
/// The port is in use, or this user may not bind it, or the address is not of this machine.
pub fn check_port(bind: SocketAddr) -> Result<(), String> {
    let port = bind.port();
    match TcpListener::bind(bind) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let holder = holder(port).unwrap_or_else(|| "another process".to_owned());
            Err(format!(
                "port {port} of {} is in use by {holder}; expected a free port: choose another with --port or stop that \
                 process (`ss -ltnp 'sport = :{port}'` names it)",
                bind.ip()
            ))
        }
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

/// The process that listens on `port`, as far as this user can see.
fn holder(port: u16) -> Option<String> {
    let tables = ["tcp", "tcp6"].map(|table| format!("/proc/net/{table}"));
    let sockets: Vec<String> = tables
        .iter()
        .flat_map(|table| listening(&std::fs::read_to_string(table).unwrap_or_default(), port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if holds(&process.path(), &sockets) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

/// Whether one of the open files of the process at `path` is one of `sockets`.
fn holds(path: &Path, sockets: &[String]) -> bool {
    let Ok(files) = std::fs::read_dir(path.join("fd")) else { return false };
    files.flatten().any(|file| {
        std::fs::read_link(file.path()).is_ok_and(|target| {
            target.to_str().is_some_and(|target| sockets.iter().any(|socket| socket == target))
        })
    })
}

/// Inodes of the sockets in a table of the kernel's that listen on `port`.
fn listening(table: &str, port: u16) -> Vec<String> {
    /// The kernel's number of the state.
    const LISTEN: &str = "0A";
    let local_port = format!(":{port:04X}");
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() > 9 && row[1].ends_with(&local_port) && row[3] == LISTEN)
        .map(|row| row[9].to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_the_flag_and_its_holder() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bind = listener.local_addr().unwrap();
        let reason = check_port(bind).unwrap_err();
        let holder = format!("by process {} (", std::process::id());
        for part in [&bind.port().to_string(), "--port", &holder] {
            assert!(reason.contains(part), "{reason}");
        }
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
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode\n\
                     0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4242 1\n\
                     1: 0100007F:0BB8 0100007F:9C40 01 00000000:00000000 00:00000000 00000000 0 0 4243 1\n\
                     2: 0100007F:0BB9 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4244 1\n";
        assert_eq!(listening(table, 3000), ["4242"]);
        assert_eq!(listening("", 3000), Vec::<String>::new());
    }
}
