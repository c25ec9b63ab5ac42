//! Where the shards' sockets live: one launcher at a time, nothing of another one's deleted.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Upstream's default prefix; tools that attach to a running server look there.
pub const DEFAULT_PREFIX: &str = "/tmp/text-generation-server";

/// `sun_path` holds 108 bytes, the last of which is a zero.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// The shards of a launcher that was killed need this long at most to notice and end.
const DYING_SHARDS_GRACE: Duration = Duration::from_secs(2);

/// A claimed socket prefix. Dropping it removes the sockets, the lock and, if it made one, the directory.
#[derive(Debug)]
pub struct RuntimeDir {
    prefix: String,
    num_shard: usize,
    lock_path: PathBuf,
    /// Made by us; removed at the end.
    private_dir: Option<PathBuf>,
    /// Holds the lock for as long as it is open.
    _lock: File,
}

/// Why a prefix cannot be claimed.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Somebody else uses it: another prefix will do.
    Taken(String),
    /// No other launcher can help it.
    Unusable(String),
}

impl RuntimeDir {
    /// Claims `requested`, or the default prefix, or, when that one is taken, a prefix in a fresh directory that only
    /// this user can enter.
    ///
    /// # Errors
    /// One line for people: the prefix is too long, in use by a running server, or cannot be written.
    pub fn claim(requested: Option<&str>, num_shard: usize) -> Result<Self, String> {
        if let Some(prefix) = requested {
            return claim_patiently(prefix, num_shard).map_err(
                |(Refusal::Taken(why) | Refusal::Unusable(why))| format!("--shard-uds-path {prefix}: {why}"),
            );
        }
        match claim_prefix(DEFAULT_PREFIX, num_shard, None) {
            Ok(claimed) => Ok(claimed),
            Err(Refusal::Taken(why) | Refusal::Unusable(why)) => {
                tracing::info!(
                    "{DEFAULT_PREFIX} is not free ({why}); using a private directory for the sockets"
                );
                claim_private(num_shard)
            }
        }
    }

    /// Socket path without `-RANK`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Socket path of one rank.
    pub fn socket(&self, rank: usize) -> PathBuf {
        PathBuf::from(format!("{}-{rank}", self.prefix))
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // Leftovers harm nobody: the next launcher clears them.
        for path in socket_paths(&self.prefix, self.num_shard) {
            let _ = std::fs::remove_file(path);
        }
        // Removed while it is still locked, so nobody can hold a lock on the file that disappears.
        let _ = std::fs::remove_file(&self.lock_path);
        if let Some(dir) = &self.private_dir {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// As `claim_prefix`, but gives the shards of a launcher that was just killed the time to end.
fn claim_patiently(prefix: &str, num_shard: usize) -> Result<RuntimeDir, Refusal> {
    let deadline = Instant::now() + DYING_SHARDS_GRACE;
    loop {
        match claim_prefix(prefix, num_shard, None) {
            Err(Refusal::Taken(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20))
            }
            outcome => return outcome,
        }
    }
}

fn claim_private(num_shard: usize) -> Result<RuntimeDir, String> {
    let name = format!("quartet-{}-{:08x}", std::process::id(), rand::random::<u32>());
    let dir = std::env::temp_dir().join(name);
    DirBuilder::new().mode(0o700).create(&dir).map_err(|error| {
        format!("cannot create {}: {error}; set TMPDIR or --shard-uds-path", dir.display())
    })?;
    let prefix = dir.join("shard").display().to_string();
    claim_prefix(&prefix, num_shard, Some(dir.clone())).map_err(
        |(Refusal::Taken(why) | Refusal::Unusable(why))| {
            let _ = std::fs::remove_dir(&dir);
            format!("{prefix}: {why}; set TMPDIR or --shard-uds-path")
        },
    )
}

fn claim_prefix(prefix: &str, num_shard: usize, private_dir: Option<PathBuf>) -> Result<RuntimeDir, Refusal> {
    check_length(prefix, num_shard).map_err(Refusal::Unusable)?;
    check_parent(prefix).map_err(Refusal::Unusable)?;
    let lock_path = PathBuf::from(format!("{prefix}.lock"));
    let lock = lock_file(&lock_path)?;
    for path in socket_paths(prefix, num_shard) {
        clear_stale(&path)?;
    }
    Ok(RuntimeDir { prefix: prefix.to_owned(), num_shard, lock_path, private_dir, _lock: lock })
}

/// Every socket that this launcher's shards bind.
fn socket_paths(prefix: &str, num_shard: usize) -> impl Iterator<Item = PathBuf> {
    let ranks = (0..num_shard).map(|rank| rank.to_string());
    let rendezvous = (num_shard > 1).then(|| "rendezvous".to_owned());
    ranks.chain(rendezvous).map(move |end| PathBuf::from(format!("{prefix}-{end}")))
}

/// The longest socket path must fit into the kernel's address.
///
/// # Errors
/// By how much it does not.
pub(crate) fn check_length(prefix: &str, num_shard: usize) -> Result<(), String> {
    let longest = socket_paths(prefix, num_shard).map(|path| path.as_os_str().len()).max().unwrap_or(0);
    if longest > MAX_SOCKET_PATH_BYTES {
        return Err(format!(
            "the longest socket path would have {longest} bytes; expected at most {MAX_SOCKET_PATH_BYTES}, so shorten \
             the prefix by {}",
            longest - MAX_SOCKET_PATH_BYTES
        ));
    }
    Ok(())
}

fn check_parent(prefix: &str) -> Result<(), String> {
    let parent = Path::new(prefix).parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if parent.is_dir() {
        Ok(())
    } else {
        Err(format!("{} is no directory; create it first", parent.display()))
    }
}

/// Opens and locks; a file that was removed between the two is opened again.
fn lock_file(path: &Path) -> Result<File, Refusal> {
    let unusable = |error: io::Error| Refusal::Unusable(format!("cannot lock {}: {error}", path.display()));
    loop {
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
            .open(path)
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Refusal::Taken("another launcher that is running uses it".to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        let ours = file.metadata().map_err(unusable)?;
        if std::fs::symlink_metadata(path)
            .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
        {
            return Ok(file);
        }
    }
}

/// Removes a socket nobody listens on. A live one, or a file that is no socket, stays.
fn clear_stale(path: &Path) -> Result<(), Refusal> {
    let shown = path.display();
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Refusal::Unusable(format!(
            "{shown} exists and is no socket; remove it or change the prefix"
        )));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Refusal::Taken(format!("a shard that is running listens on {shown}"))),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|error| Refusal::Unusable(format!("cannot remove the stale socket {shown}: {error}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Refusal::Unusable(format!("cannot tell whether {shown} is in use: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn prefix_in(dir: &tempfile::TempDir) -> String {
        dir.path().join("s").display().to_string()
    }

    #[test]
    fn stale_sockets_are_cleared_and_everything_is_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = prefix_in(&dir);
        drop(UnixListener::bind(format!("{prefix}-0")).unwrap());
        drop(UnixListener::bind(format!("{prefix}-rendezvous")).unwrap());
        let claimed = RuntimeDir::claim(Some(&prefix), 2).unwrap();
        assert!(!claimed.socket(0).exists());
        assert!(!Path::new(&format!("{prefix}-rendezvous")).exists());
        drop(claimed);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_live_socket_is_never_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = prefix_in(&dir);
        let _listener = UnixListener::bind(format!("{prefix}-1")).unwrap();
        let refusal = claim_prefix(&prefix, 2, None).unwrap_err();
        assert!(matches!(&refusal, Refusal::Taken(why) if why.contains("s-1")), "{refusal:?}");
        assert!(Path::new(&format!("{prefix}-1")).exists());
    }

    #[test]
    fn two_launchers_cannot_claim_one_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = prefix_in(&dir);
        let first = RuntimeDir::claim(Some(&prefix), 1).unwrap();
        assert!(matches!(claim_prefix(&prefix, 1, None), Err(Refusal::Taken(_))));
        drop(first);
        claim_prefix(&prefix, 1, None).unwrap();
    }

    #[test]
    fn private_prefix_is_in_a_directory_of_ones_own() {
        let claimed = claim_private(1).unwrap();
        let dir = Path::new(claimed.prefix()).parent().unwrap().to_path_buf();
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        drop(claimed);
        assert!(!dir.exists());
    }

    #[test]
    fn too_long_a_path_and_other_files_are_refused() {
        let prefix_of = |bytes: usize| format!("/{}", "x".repeat(bytes - 1));
        assert!(check_length(&prefix_of(105), 1).is_ok(), "`-0` has 2 bytes");
        assert!(check_length(&prefix_of(106), 1).unwrap_err().contains("108 bytes"));
        assert!(check_length(&prefix_of(96), 2).is_ok(), "`-rendezvous` has 11 bytes");
        assert!(check_length(&prefix_of(97), 2).unwrap_err().contains("shorten"));

        let dir = tempfile::tempdir().unwrap();
        let prefix = prefix_in(&dir);
        std::fs::write(format!("{prefix}-0"), "precious").unwrap();
        assert!(RuntimeDir::claim(Some(&prefix), 1).unwrap_err().contains("no socket"));
        assert!(RuntimeDir::claim(Some("/no/such/dir/s"), 1).unwrap_err().contains("no directory"));
    }
}
