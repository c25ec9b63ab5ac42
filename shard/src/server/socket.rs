//! The file of the Unix socket: whose it is, and that no live one is ever taken away.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};

use crate::error::ShardError;

/// What `sockaddr_un` has room for, without the final zero.
const MAX_PATH_BYTES: usize = 107;

/// The file of a socket that this process has bound.
#[derive(Debug, Clone)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: tells whether the file at `path` is still this one.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, unless somebody has put another one there meanwhile.
    pub fn remove(&self) {
        if identity(&self.path).is_some_and(|found| found == self.identity) {
            // When it cannot be removed, the next shard finds it stale and removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A listening socket that only this user can connect to.
#[derive(Debug)]
pub struct BoundSocket {
    file: SocketFile,
    listener: UnixListener,
}

impl BoundSocket {
    /// Binds the socket; a file that a dead process has left there is removed first.
    ///
    /// # Errors
    /// [`ShardError::Socket`]: a live process listens there, the file is no socket, or the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self, ShardError> {
        Self::try_bind(path).map_err(|problem| ShardError::Socket { path: path.to_path_buf(), problem })
    }

    fn try_bind(path: &Path) -> Result<Self, String> {
        let length = path.as_os_str().len();
        if length > MAX_PATH_BYTES {
            return Err(format!(
                "the path has {length} bytes, expected at most {MAX_PATH_BYTES}; choose a shorter --uds-path"
            ));
        }
        remove_stale(path)?;
        // The file must never exist with other rights, not even for a moment, hence not chmod.
        let previous = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(previous);
        let listener = bound.map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => {
                "another process has just bound it; choose another --uds-path".to_string()
            }
            ErrorKind::NotFound => {
                "its directory does not exist; create it or choose another --uds-path".to_string()
            }
            _ => format!("cannot be bound: {error}; choose another --uds-path"),
        })?;
        listener.set_nonblocking(true).map_err(|error| format!("cannot be used: {error}"))?;
        let identity = identity(path).ok_or_else(|| "was removed right after it was bound".to_string())?;
        Ok(Self { file: SocketFile { path: path.to_path_buf(), identity }, listener })
    }

    /// The file, to remove it when this process ends.
    pub fn file(&self) -> &SocketFile {
        &self.file
    }

    /// File and listener.
    pub(super) fn into_parts(self) -> (SocketFile, UnixListener) {
        (self.file, self.listener)
    }
}

fn remove_stale(path: &Path) -> Result<(), String> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err("exists and is no socket; remove it or choose another --uds-path".to_string());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another process listens there; stop it or choose another --uds-path".to_string()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            tracing::debug!("removing stale socket {}", path.display());
            std::fs::remove_file(path).map_err(|error| format!("is stale but cannot be removed: {error}"))
        }
        Err(error) => Err(format!("exists and cannot be tried: {error}; choose another --uds-path")),
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_this_user_may_connect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s-0");
        let socket = BoundSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        socket.file().remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s-0");
        let live = BoundSocket::bind(&path).unwrap();
        let error = BoundSocket::bind(&path).unwrap_err();
        assert!(error.to_string().contains("another process listens there"), "{error}");
        assert_eq!(error.exit_code(), process::ExitCode::SocketUnusable);
        let old_file = live.file().clone();
        drop(live);
        let new = BoundSocket::bind(&path).unwrap();
        old_file.remove();
        assert!(path.exists() || new.file().identity == old_file.identity, "only the own file is removed");
    }

    #[test]
    fn other_files_and_unusable_paths_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let problem = |path: &Path| BoundSocket::bind(path).unwrap_err().to_string();
        assert!(problem(&file).contains("is no socket"));
        assert!(file.exists());
        assert!(problem(&dir.path().join("no/s-0")).contains("its directory does not exist"));
        assert!(problem(&dir.path().join("x".repeat(120))).contains("expected at most 107"));
    }
}
