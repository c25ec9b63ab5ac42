//! The launcher as process 1 of a process namespace of its own, as in a container: it reaps whatever is left to it, stops in
//! order, and its exit code is the container's.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Namespaces of users and processes in which the program that follows is process 1 and sees nobody else.
const UNSHARE: &[&str] = &["--user", "--map-root-user", "--pid", "--fork", "--mount-proc"];

/// A process as `/proc` of this machine has it.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    name: String,
    is_zombie: bool,
}

/// The children of `parent`, zombies among them.
fn children(parent: i32) -> Vec<Process> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let read = |pid: i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name stands in brackets and may hold anything.
        let (start, end) = (stat.find('(')?, stat.rfind(')')?);
        let mut fields = stat[end + 1..].split_whitespace();
        let (state, parent_of_it) = (fields.next()?, fields.next()?.parse::<i32>().ok()?);
        let name = stat[start + 1..end].to_owned();
        (parent_of_it == parent).then_some(Process { pid, name, is_zombie: state == "Z" })
    };
    pids.filter_map(read).collect()
}

/// A container: `unshare`, in it the launcher, in it fake children.
struct Container {
    dir: tempfile::TempDir,
    unshare: Child,
}

impl Container {
    /// `None` where this machine does not allow it.
    fn start(flags: &[&str], environment: &[(&str, &str)]) -> Option<Self> {
        let unshare = || {
            let mut command = Command::new("unshare");
            command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(UNSHARE);
            command
        };
        let probe = unshare().arg("true").output();
        if !probe.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: no process namespaces on this machine: {probe:?}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let fake = fake_child();
        for name in ["shard", "router"] {
            std::os::unix::fs::symlink(&fake, dir.path().join(name)).unwrap();
        }
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        std::fs::write(model.join("model.safetensors"), "the fake shard does not look").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let unshare = unshare()
            .env("QUARTET_BIN_DIR", dir.path())
            .env("FAKE_DIR", dir.path())
            .env("QUARTET_STATUS_DIR", dir.path().join("status"))
            .env("LOG_COLORIZE", "1")
            .envs(environment.iter().copied())
            .arg(env!("CARGO_BIN_EXE_launcher"))
            .args(["--hostname", "127.0.0.1", "--port", &port.to_string()])
            .args([Path::new("--model-id"), &model])
            .args([Path::new("--shard-uds-path"), &dir.path().join("s")])
            .args(flags)
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .stdout(log)
            .spawn()
            .unwrap();
        Some(Self { dir, unshare })
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "no {what}:\n{}", self.read("log"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The launcher's number outside.
    fn launcher(&self) -> i32 {
        let found = children(self.unshare.id() as i32);
        let [launcher] = found.as_slice() else { panic!("{found:?}") };
        launcher.pid
    }

    fn child(&self, name: &str) -> Option<i32> {
        let found =
            children(self.launcher()).into_iter().find(|child| child.name == name && !child.is_zombie);
        found.map(|child| child.pid)
    }

    fn signal(&self, pid: i32, signal: Signal) {
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// The exit code, which `unshare` hands on.
    fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.unshare.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "it does not end:\n{}", self.read("log"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // With process 1 the kernel ends all others of its namespace. Both fail for one that has ended.
        for launcher in children(self.unshare.id() as i32) {
            let _ = kill(Pid::from_raw(launcher.pid), Signal::SIGKILL);
        }
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn fake_child() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_launcher")).with_file_name("examples").join("fake_child");
    assert!(path.exists(), "{} is missing: run the tests without --test", path.display());
    path
}

#[test]
fn it_reaps_what_is_left_to_it_and_a_signal_to_it_drains() {
    let Some(mut container) = Container::start(&[], &[("FAKE_SHARD", "has-a-child")]) else { return };
    container.wait_for("announcement", |container| container.read("log").contains("Serving "));
    let launcher = container.launcher();
    let inside = std::fs::read_to_string(format!("/proc/{launcher}/status")).unwrap();
    let numbers = inside.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    assert_eq!(numbers.split_whitespace().last(), Some("1"), "{inside}");
    // The shard has left two processes behind, one of which ends by itself: nobody but process 1 can reap it.
    assert!(!container.read("brief.pid").is_empty());
    let names = || {
        let mut names: Vec<_> = children(launcher).into_iter().map(|child| child.name).collect();
        names.sort_unstable();
        names.join(" ") + if children(launcher).iter().any(|child| child.is_zombie) { " zombies" } else { "" }
    };
    container.wait_for("three children", |_| names() == "router shard sleep");

    // One that dies takes the process that it left behind along, and is replaced.
    let first = container.child("shard").unwrap();
    let orphan = container.child("sleep").unwrap();
    container.signal(first, Signal::SIGKILL);
    container.wait_for("another shard", |container| container.read("log").contains("Serving again"));
    assert!(container.child("shard").is_some_and(|second| second != first));
    let is_gone = |pid: i32| !Path::new(&format!("/proc/{pid}")).exists();
    container.wait_for("end of the orphan", |_| is_gone(orphan) && is_gone(first));
    container.wait_for("three children again", |_| names() == "router shard sleep");

    container.signal(launcher, Signal::SIGTERM);
    assert_eq!(container.ended(), Some(0), "{}", container.read("log"));
    assert_eq!(container.read("ends"), "router\nshard-0\n", "the router first");
    assert!(children(launcher).is_empty() && is_gone(launcher));
}

#[test]
fn its_exit_code_is_the_containers() {
    let Some(mut container) = Container::start(&[], &[("FAKE_SHARD", "crash-at-start")]) else { return };
    assert_eq!(container.ended(), Some(1), "{}", container.read("log"));

    let Some(mut container) = Container::start(&["--no-such-flag"], &[]) else { return };
    assert_eq!(container.ended(), Some(2), "{}", container.read("log"));

    let Some(mut container) =
        Container::start(&["--max-restarts", "1"], &[("FAKE_SHARD", "crash-at-restart")])
    else {
        return;
    };
    container.wait_for("announcement", |container| container.read("log").contains("Serving "));
    std::fs::write(container.dir.path().join("served"), "").unwrap();
    container.signal(container.child("shard").unwrap(), Signal::SIGKILL);
    assert_eq!(container.ended(), Some(16), "{}", container.read("log"));
}

#[test]
fn its_death_is_the_end_of_all() {
    let Some(mut container) = Container::start(&["--num-shard", "2"], &[("FAKE_SHARD", "ignore-term")])
    else {
        return;
    };
    container.wait_for("announcement", |container| container.read("log").contains("Serving "));
    let launcher = container.launcher();
    let family: Vec<i32> = children(launcher).into_iter().map(|child| child.pid).collect();
    assert_eq!(family.len(), 3);
    container.signal(launcher, Signal::SIGKILL);
    container.ended();
    container.wait_for("the end of all", |_| {
        family.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
}
