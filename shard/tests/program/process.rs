//! The real program, started and watched.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use proto::ShardClient;

/// Long enough for a loaded machine; nothing waits this long when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A model and a place for sockets.
pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        crate::tiny_model::write(&dir.path().join("model"));
        Self { dir }
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    pub(crate) fn socket(&self, rank: usize) -> PathBuf {
        self.dir.path().join(format!("s-{rank}"))
    }

    /// `shard serve` of the model, without anything of this process's environment that could change it.
    pub(crate) fn command(&self) -> Command {
        self.command_of(1)
    }

    /// The same with so many threads.
    pub(crate) fn command_of(&self, threads: usize) -> Command {
        let mut command = program();
        command.arg("serve").arg(self.model()).arg("--uds-path").arg(self.dir.path().join("s"));
        command.args(["--dtype", "float32", "--threads", &threads.to_string(), "--json-output"]);
        command
    }

    /// Rank `rank` of `world_size`.
    pub(crate) fn rank(&self, rank: usize, world_size: usize) -> Shard {
        let mut command = self.command();
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", world_size.to_string());
        if world_size > 1 {
            command.arg("--sharded");
        }
        Shard::start(command, self.socket(rank))
    }
}

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shard"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running program; ended when dropped.
pub(crate) struct Shard {
    pub(crate) child: Child,
    socket: PathBuf,
}

impl Shard {
    pub(crate) fn start(mut command: Command, socket: PathBuf) -> Self {
        Self { child: command.spawn().unwrap(), socket }
    }

    /// Waits until it serves.
    pub(crate) async fn client(&self) -> ShardClient {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match ShardClient::connect(&self.socket).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "not ready: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Waits for its end; answers exit code, standard output and standard error.
    pub(crate) fn wait(mut self) -> (Option<i32>, String, String) {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "still running");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut texts = [String::new(), String::new()];
        if let Some(mut pipe) = self.child.stdout.take() {
            std::io::Read::read_to_string(&mut pipe, &mut texts[0]).unwrap();
        }
        if let Some(mut pipe) = self.child.stderr.take() {
            std::io::Read::read_to_string(&mut pipe, &mut texts[1]).unwrap();
        }
        let code = self.child.wait().unwrap().code();
        let [stdout, stderr] = texts;
        (code, stdout, stderr)
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command that ends by itself; answers exit code and standard error.
pub(crate) fn run(mut command: Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

pub(crate) fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}
