//! Where launchers are asked for their state: one Unix socket each, in a directory that only this user can enter.
//!
//! Whoever connects gets one line of JSON and the end of the connection. A launcher that was killed leaves its socket;
//! whoever asks next removes it.

use std::fs::DirBuilder;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::join_all;
use nix::unistd::geteuid;
use proto::ShardClient;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::router_http;
use crate::status::{RankStatus, RouterStatus, Status};

/// A child that does not answer for so long is shown without numbers.
const CHILD_ANSWERS_WITHIN: Duration = Duration::from_millis(500);
/// A launcher asks its children at once and answers then.
const LAUNCHER_ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// How the event loop is asked for what it knows by itself.
pub type StatusRequest = oneshot::Sender<Status>;

/// The directory in which this user's launchers are found.
pub fn default_directory() -> PathBuf {
    PathBuf::from(format!("/tmp/quartet-{}", geteuid()))
}

/// A socket that answers; removed when dropped.
#[derive(Debug)]
pub struct StatusSocket {
    path: PathBuf,
}

impl StatusSocket {
    /// Binds a socket in `directory`, makes that when it is missing, and answers from now on with what `ask` and the
    /// children say.
    ///
    /// # Errors
    /// The directory belongs to somebody else or cannot be written.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(directory: &Path, ask: mpsc::Sender<StatusRequest>) -> io::Result<Self> {
        make_private(directory)?;
        // Process ids of two containers that share the directory may be equal.
        let path = directory.join(format!("{}-{:08x}.sock", std::process::id(), rand::random::<u32>()));
        let listener = UnixListener::bind(&path)?;
        tokio::spawn(answer_all(listener, ask));
        Ok(Self { path })
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        // One that stays is removed by whoever finds nobody behind it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes sure that nobody else can put a socket there, or read ours.
fn make_private(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    check_private(directory)
}

fn check_private(directory: &Path) -> io::Result<()> {
    let found = std::fs::symlink_metadata(directory)?;
    if found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::other("it is no directory that this user owns and nobody else can enter"))
}

async fn answer_all(listener: UnixListener, ask: mpsc::Sender<StatusRequest>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let ask = ask.clone();
        tokio::spawn(async move {
            let (request, answer) = oneshot::channel();
            // The event loop has ended, and with it what there would be to tell.
            if ask.send(request).await.is_err() {
                return;
            }
            let Ok(status) = answer.await else { return };
            let line = serde_json::to_string(&complete(status).await).unwrap_or_default() + "\n";
            // Whoever asked may have gone.
            let _ = stream.write_all(line.as_bytes()).await;
        });
    }
}

/// Asks the children for their counters.
async fn complete(status: Status) -> Status {
    let prefix = status.socket_prefix.clone();
    let ranks = join_all(status.ranks.into_iter().map(|rank| ask_rank(rank, prefix.as_deref())));
    let (ranks, router) = tokio::join!(ranks, ask_router(status.router));
    Status { ranks, router, ..status }
}

async fn ask_rank(rank: RankStatus, prefix: Option<&str>) -> RankStatus {
    let Some(prefix) = prefix else { return rank };
    let asked = async {
        let mut shard = ShardClient::connect(format!("{prefix}-{}", rank.rank)).await.ok()?;
        shard.status().await.ok()
    };
    let Ok(Some(counters)) = tokio::time::timeout(CHILD_ANSWERS_WITHIN, asked).await else { return rank };
    RankStatus {
        steps_started: Some(counters.steps_started),
        steps_finished: Some(counters.steps_finished),
        blocks_total: Some(counters.blocks_total),
        blocks_used: Some(counters.blocks_used),
        ..rank
    }
}

async fn ask_router(router: Option<RouterStatus>) -> Option<RouterStatus> {
    let router = router?;
    let asked = router_http::body_of(router.address, "/metrics");
    let metrics = match tokio::time::timeout(CHILD_ANSWERS_WITHIN, asked).await {
        Ok(Ok(metrics)) => metrics,
        _ => return Some(router),
    };
    Some(RouterStatus {
        requests_in_flight: gauge(&metrics, "quartet_requests_in_flight"),
        requests_queued: gauge(&metrics, "tgi_queue_size"),
        ..router
    })
}

/// The value of a series without labels.
fn gauge(metrics: &str, name: &str) -> Option<u64> {
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.parse::<f64>().ok().map(|value| value as u64)
}

/// The state of every launcher that answers in `directory`, by process id. Sockets without a launcher are removed.
///
/// # Errors
/// One line: the directory cannot be trusted or read.
pub fn ask_all(directory: &Path) -> Result<Vec<Status>, String> {
    let unusable = |error: io::Error| format!("{} cannot be used: {error}", directory.display());
    match std::fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        _ => check_private(directory).map_err(unusable)?,
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unusable)?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "sock") {
            found.extend(ask_one(&path));
        }
    }
    found.sort_by_key(|status| status.pid);
    Ok(found)
}

fn ask_one(path: &Path) -> Option<Status> {
    let stream = match std::os::unix::net::UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Its launcher was killed.
            let _ = std::fs::remove_file(path);
            return None;
        }
        Err(_) => return None,
    };
    stream.set_read_timeout(Some(LAUNCHER_ANSWERS_WITHIN)).ok()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::status::RestartStatus;

    fn status() -> Status {
        Status {
            pid: 7,
            version: String::new(),
            uptime_seconds: 1.0,
            phase: "Downloading".to_owned(),
            phase_seconds: 1.0,
            model_id: "m".to_owned(),
            device: None,
            socket_prefix: None,
            restarts: RestartStatus { used: 0, max: 5, window_seconds: 600 },
            router: None,
            ranks: Vec::new(),
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_launcher_answers_and_one_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("status");
        assert_eq!(ask_all(&directory), Ok(vec![]), "nobody made it yet");
        let (ask, mut asked) = mpsc::channel::<StatusRequest>(1);
        let socket = StatusSocket::open(&directory, ask).unwrap();
        tokio::spawn(async move {
            while let Some(request) = asked.recv().await {
                request.send(status()).unwrap();
            }
        });
        drop(std::os::unix::net::UnixListener::bind(directory.join("1-0.sock")).unwrap());
        let asking = directory.clone();
        let answers = tokio::task::spawn_blocking(move || ask_all(&asking)).await.unwrap();
        assert_eq!(answers, Ok(vec![status()]));
        assert!(!directory.join("1-0.sock").exists());
        drop(socket);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(ask_all(dir.path()).unwrap_err().contains("nobody else can enter"));
        assert!(make_private(dir.path()).is_err());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        assert!(make_private(&link).is_err());
    }

    #[test]
    fn gauges_are_found_by_their_whole_name() {
        let metrics = "# TYPE a gauge\na_b 3\na 12\n";
        assert_eq!((gauge(metrics, "a"), gauge(metrics, "c")), (Some(12), None));
    }
}
