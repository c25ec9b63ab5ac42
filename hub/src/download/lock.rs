//! One download of a repository at a time on a machine: a lock that the kernel releases whatever ends its holder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::HubError;

/// How often a lock that another process holds is asked for.
const POLL: Duration = Duration::from_millis(100);
/// How often waiting is mentioned.
const REMIND: Duration = Duration::from_secs(10);

/// A held lock; released when dropped.
#[derive(Debug)]
pub(super) struct DownloadLock {
    _file: File,
    /// Whether another process held it first.
    pub(super) has_waited: bool,
    /// What must be appended to the names of unfinished files: they are nobody else's where nothing can be locked.
    pub(super) part_suffix: String,
}

impl DownloadLock {
    /// Takes the lock at `path`, and says for whom it waits meanwhile.
    ///
    /// # Errors
    /// The file cannot be made.
    pub(super) fn take(path: &Path, repository: &str) -> Result<Self, HubError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(HubError::io("create the lock", path))?;
        let mut said: Option<Instant> = None;
        let mut part_suffix = String::new();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                // Some network file systems have no locks. Two downloads then cost time, not correctness.
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(
                        "cannot lock {}: {error}; this download cannot be continued by another process",
                        path.display()
                    );
                    part_suffix = format!(".{}-{}", host_name(), std::process::id());
                    break;
                }
            }
            if said.is_none_or(|at| at.elapsed() >= REMIND) {
                tracing::info!("Waiting for {}, which downloads {repository}", holder(&mut file));
                said = Some(Instant::now());
            }
            std::thread::sleep(POLL);
        }
        // For those who wait. When it cannot be written, they wait for somebody unknown.
        let _ = write_holder(&mut file);
        Ok(Self { _file: file, has_waited: said.is_some(), part_suffix })
    }
}

fn write_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    write!(file, "{} {}", std::process::id(), host_name())
}

/// Who holds the lock, as it wrote.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let known = file.rewind().and_then(|()| file.take(300).read_to_string(&mut text));
    match (known, text.split_once(' ')) {
        (Ok(_), Some((pid, host))) if pid.parse::<u32>().is_ok() && host == host_name() => {
            format!("process {pid}")
        }
        // A container's process ids mean nothing outside of it, its name does.
        (Ok(_), Some((pid, host))) if pid.parse::<u32>().is_ok() => {
            format!("process {pid} of {}", host.escape_debug())
        }
        _ => "another process".to_owned(),
    }
}

fn host_name() -> String {
    nix::sys::utsname::uname()
        .map(|names| names.nodename().to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_for_the_first_and_knows_who_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = DownloadLock::take(&path, "org/tiny").unwrap();
        assert!(!first.has_waited);
        let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert_eq!(holder(&mut file), format!("process {}", std::process::id()));
        let second = std::thread::spawn({
            let path = path.clone();
            move || DownloadLock::take(&path, "org/tiny").unwrap()
        });
        std::thread::sleep(POLL * 2);
        assert!(!second.is_finished());
        drop(first);
        assert!(second.join().unwrap().has_waited);
    }

    #[test]
    fn a_lock_without_a_name_is_somebodys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        std::fs::write(&path, "1 elsewhere").unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert_eq!(holder(&mut open()), "process 1 of elsewhere");
        std::fs::write(&path, "").unwrap();
        assert_eq!(holder(&mut open()), "another process");
    }
}
