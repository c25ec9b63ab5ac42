//! A launcher with its shards and router, started for one test.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use proto::ShardClient;
use tempfile::TempDir;

use crate::{http, process_tree};

/// Generous: the machine may be compiling beside the tests. Nothing is timed here.
const START_DEADLINE: Duration = Duration::from_secs(60);
const EXIT_DEADLINE: Duration = Duration::from_secs(30);

/// Path of one of our programs, built in the same profile as this test.
///
/// # Panics
/// When it was not built: `make test` builds all of them first.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps or examples");
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --release` first", path.display());
    path
}

/// A TCP port nobody listens on.
///
/// # Panics
/// When the machine has none left.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

/// What to start.
#[derive(Debug)]
pub struct ServerBuilder {
    model: PathBuf,
    port: u16,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

/// How a launcher ended.
#[derive(Debug)]
pub struct Exit {
    /// Its status.
    pub status: ExitStatus,
    /// Everything it wrote to standard output and standard error.
    pub log: String,
}

impl ServerBuilder {
    /// Adds launcher arguments.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the launcher's environment.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_string(), value.into()));
        self
    }

    /// Listens on `port` instead of a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Starts the launcher and does not wait.
    ///
    /// # Errors
    /// When the program cannot be started at all.
    pub fn spawn(self) -> Result<Server> {
        let folder = tempfile::Builder::new().prefix("quartet-test-").tempdir()?;
        let log = folder.path().join("log");
        let out = File::create(&log)?;
        let child = Command::new(program("launcher"))
            .arg("--model-id")
            .arg(&self.model)
            .args(["--port", &self.port.to_string(), "--hostname", "127.0.0.1"])
            .arg("--shard-uds-path")
            .arg(folder.path().join("shard"))
            .args(&self.args)
            .env("HF_HUB_OFFLINE", "1")
            .env("QUARTET_STATUS_DIR", folder.path().join("status"))
            .envs(self.env)
            .stdin(Stdio::null())
            .stderr(out.try_clone()?)
            .stdout(out)
            .spawn()
            .context("start launcher")?;
        Ok(Server { child, port: self.port, folder })
    }

    /// Starts the launcher and waits until `/health` answers 200.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the message has its log.
    pub fn start(self) -> Result<Server> {
        let mut server = self.spawn()?;
        server.wait_ready()?;
        Ok(server)
    }

    /// Runs the launcher to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run_to_exit(self) -> Result<Exit> {
        self.spawn()?.wait()
    }
}

/// A running launcher; ended in `Drop`.
#[derive(Debug)]
pub struct Server {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Server {
    /// A server of the model at `model` (a directory or a GGUF file).
    pub fn of(model: impl Into<PathBuf>) -> ServerBuilder {
        ServerBuilder { model: model.into(), port: free_port(), args: Vec::new(), env: Vec::new() }
    }

    /// The router's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The launcher's process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The socket of rank `rank`.
    pub fn socket(&self, rank: usize) -> PathBuf {
        self.folder.path().join(format!("shard-{rank}"))
    }

    /// The launcher's children whose name is `name` (`shard` or `router`), by process id.
    pub fn children(&self, name: &str) -> Vec<i32> {
        let found = process_tree::children(self.child.id());
        found.into_iter().filter(|process| process.name == name).map(|process| process.pid).collect()
    }

    /// The launcher and all its children, by process id.
    pub fn family(&self) -> Vec<i32> {
        let children = process_tree::children(self.child.id()).into_iter().map(|process| process.pid);
        children.chain([self.pid()]).collect()
    }

    /// What `launcher status` says: exit code, standard output.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn status(&self, args: &[&str]) -> Result<(Option<i32>, String)> {
        let output = Command::new(program("launcher"))
            .arg("status")
            .args(args)
            .env("QUARTET_STATUS_DIR", self.folder.path().join("status"))
            .output()?;
        Ok((output.status.code(), String::from_utf8(output.stdout)?))
    }

    /// Whether the launcher has ended, and how.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// KV blocks that cached batches hold, all ranks together.
    ///
    /// # Errors
    /// When a shard does not answer.
    pub fn blocks_used(&self) -> Result<u64> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut used = 0;
            for rank in 0..self.children("shard").len() {
                used += ShardClient::connect(self.socket(rank)).await?.status().await?.blocks_used;
            }
            Ok(used)
        })
    }

    /// What was logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Waits until `/health` answers 200.
    ///
    /// # Errors
    /// When the launcher ends before, or the deadline passes.
    pub fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + START_DEADLINE;
        loop {
            if http::get(self.port, "/health").is_ok_and(|response| response.status == 200) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the launcher ended with {status} before it was ready:\n{}", self.log());
            }
            if Instant::now() > end {
                bail!("not ready after {START_DEADLINE:?}:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends the launcher a signal.
    pub fn signal(&self, signal: Signal) {
        process_tree::send(self.pid(), signal);
    }

    /// Waits for the launcher's end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(mut self) -> Result<Exit> {
        let end = Instant::now() + EXIT_DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Exit { status, log: self.log() });
            }
            if Instant::now() > end {
                bail!("still running after {EXIT_DEADLINE:?}:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let family: Vec<i32> =
            process_tree::children(self.child.id()).iter().map(|process| process.pid).collect();
        process_tree::send(self.pid(), Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        for pid in family.into_iter().chain([self.pid()]) {
            process_tree::send(pid, Signal::SIGKILL);
        }
        // The process was killed just now: nothing to learn from its status.
        let _ = self.child.wait();
    }
}
