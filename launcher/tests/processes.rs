//! The real launcher with fake children: starts, deaths, stops, and nothing left behind.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);

/// A launcher in a directory of its own, with fake children.
struct Service {
    dir: tempfile::TempDir,
    launcher: Child,
    port: u16,
}

/// What is left when it has ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn fake_child() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_launcher")).with_file_name("examples").join("fake_child");
    assert!(
        path.exists(),
        "{} is missing: run the tests without --test, or build the examples",
        path.display()
    );
    path
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn fresh_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(fake_child(), dir.path().join("shard")).unwrap();
    std::os::unix::fs::symlink(fake_child(), dir.path().join("router")).unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), r#"{"model_type": "llama", "max_position_embeddings": 128}"#)
        .unwrap();
    std::fs::write(model.join("model.safetensors"), "the fake shard does not look").unwrap();
    dir
}

impl Service {
    fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::start_in(fresh_dir(), arguments, environment)
    }

    fn start_in(dir: tempfile::TempDir, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let port = free_port();
        let output = |name: &str| std::fs::File::create(dir.path().join(name)).unwrap();
        let launcher = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .env_clear()
            .env("QUARTET_BIN_DIR", dir.path())
            .env("FAKE_DIR", dir.path())
            .env("QUARTET_STATUS_DIR", dir.path().join("status"))
            .env("LOG_COLORIZE", "1")
            .envs(environment.iter().copied())
            .args(["--port", &port.to_string(), "--hostname", "127.0.0.1"])
            .args([Path::new("--model-id"), &dir.path().join("model")])
            .args([Path::new("--shard-uds-path"), &dir.path().join("s")])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .spawn()
            .unwrap();
        Self { dir, launcher, port }
    }

    fn read(&self, name: &str) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = std::fs::File::open(self.dir.path().join(name)) {
            file.read_to_end(&mut text).unwrap();
        }
        String::from_utf8(text).unwrap()
    }

    fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(
                start.elapsed() < PATIENCE,
                "no {what}; stdout:\n{}\n{}",
                self.read("stdout"),
                self.read("stderr")
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn wait_until_serving(&self) {
        self.wait_for("announcement", |service| service.read("stdout").contains("Serving "));
    }

    fn wait_for_log(&self, text: &str) {
        self.wait_for(text, |service| service.read("stdout").contains(text));
    }

    fn pid_of(&self, child: &str) -> Pid {
        Pid::from_raw(self.read(&format!("{child}.pid")).parse().unwrap())
    }

    fn has_pid(&self, child: &str) -> bool {
        !self.read(&format!("{child}.pid")).is_empty()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.launcher.id() as i32), signal).unwrap();
    }

    /// Waits for the end and checks that no child is left.
    fn ended(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.launcher.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the launcher does not end; stdout:\n{}",
                self.read("stdout")
            );
            std::thread::sleep(Duration::from_millis(5));
        };
        for child in ["shard-0", "shard-1", "router"] {
            assert!(!self.has_pid(child) || !is_alive(self.pid_of(child)), "{child} is left behind");
        }
        Ended { code: status.code(), stdout: self.read("stdout"), stderr: self.read("stderr") }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // A failed test must leave nothing behind either.
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// Zombies count as dead: their parent is gone and somebody else's init has not reaped them yet.
fn is_alive(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

#[test]
fn serves_then_drains_router_first_and_exits_0() {
    let start = Instant::now();
    let service = Service::start(&["--num-shard", "2"], &[]);
    service.wait_until_serving();
    let took = start.elapsed();
    service.wait_for("shard's ledger", |service| service.read("stdout").contains("Start-up of shard"));
    service.signal(Signal::SIGTERM);
    let dir = service.dir.path().to_path_buf();
    service.wait_for("ends", |service| service.read("ends").lines().count() == 3);
    let ends = service.read("ends");
    let port = service.port;
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    assert_eq!(ended.stderr, "");
    assert!(ends.starts_with("router\n"), "{ends}");
    assert!(took < Duration::from_secs(3), "{took:?}");
    for text in [
        "hello from rank 1",
        "rank=1",
        "\nConnected\n",
        &format!("http://127.0.0.1:{port}"),
        "pretend 1.5 ms",
    ] {
        assert!(ended.stdout.contains(text), "no {text}:\n{}", ended.stdout);
    }
    for phase in ["Downloading -> Starting", "-> Warming", "-> Serving", "-> Draining", "-> Exited"] {
        assert!(ended.stdout.contains(phase), "no {phase}:\n{}", ended.stdout);
    }
    assert!(!dir.join("s-0").exists() && !dir.join("s.lock").exists());
}

#[test]
fn children_lead_groups_of_their_own_so_that_ctrl_c_is_for_the_launcher_alone() {
    let service = Service::start(&["--num-shard", "2"], &[]);
    service.wait_until_serving();
    for child in ["shard-0", "shard-1", "router"] {
        let pid = service.pid_of(child);
        assert_eq!(getpgid(Some(pid)), Ok(pid), "{child}");
    }
}

#[test]
fn the_router_starts_at_once_and_waits_for_the_shards() {
    let service = Service::start(&[], &[("FAKE_SHARD", "never-ready")]);
    service.wait_for("router", |service| !service.read("router.pid").is_empty());
    let (router, released) = (service.pid_of("router"), service.dir.path().join("released"));
    // Long enough for a router that does not wait.
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_alive(router) && !released.exists());
    service.signal(Signal::SIGTERM);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    assert!(!ended.stdout.contains("Warming"), "{}", ended.stdout);

    let service = Service::start(&[], &[]);
    service.wait_until_serving();
    assert!(service.dir.path().join("released").exists());
}

#[test]
fn a_shard_that_crashes_at_its_start_is_reported_with_its_last_words() {
    let ended = Service::start(&["--num-shard", "2"], &[("FAKE_SHARD", "crash-at-start")]).ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.ends_with("Error: ShardCannotStart\n"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("shard rank 1 exited with code 10 (the model is missing"),
        "{}",
        ended.stderr
    );
    for text in ["rank=1", "tensor lm_head.weight is missing", "the file is truncated"] {
        assert!(ended.stdout.contains(text), "no {text}:\n{}", ended.stdout);
    }
}

#[test]
fn the_rank_that_is_the_cause_is_named() {
    let ended = Service::start(&["--num-shard", "2"], &[("FAKE_SHARD", "peer-lost")]).ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("shard rank 1 exited with code 13"), "{}", ended.stderr);
    assert!(ended.stderr.contains("the cause"), "{}", ended.stderr);
}

#[test]
fn without_restarts_a_shard_that_dies_takes_everything_down() {
    let service = Service::start(&["--num-shard", "2", "--max-restarts", "0"], &[]);
    service.wait_until_serving();
    kill(service.pid_of("shard-1"), Signal::SIGKILL).unwrap();
    let ended = service.ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.ends_with("Error: ShardFailed\n"), "{}", ended.stderr);
    assert!(ended.stderr.contains("shard rank 1 was ended by SIGKILL"), "{}", ended.stderr);
}

#[test]
fn without_restarts_a_router_that_dies_takes_everything_down() {
    let service = Service::start(&[], &[("QUARTET_MAX_RESTARTS", "0")]);
    service.wait_until_serving();
    // In order and with code 0, but nobody asked for it.
    kill(service.pid_of("router"), Signal::SIGTERM).unwrap();
    let ended = service.ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.ends_with("Error: WebserverFailed\n"), "{}", ended.stderr);

    let ended = Service::start(&[], &[("FAKE_ROUTER", "crash-at-start")]).ended();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no tokenizer.json"), "{}", ended.stderr);
    assert!(ended.stderr.ends_with("Error: WebserverFailed\n"), "{}", ended.stderr);
}

#[test]
fn all_shards_are_replaced_when_one_dies_and_the_router_stays() {
    let service = Service::start(&["--num-shard", "2"], &[]);
    service.wait_until_serving();
    let before = ["shard-0", "shard-1", "router"].map(|child| service.pid_of(child));
    kill(before[1], Signal::SIGKILL).unwrap();
    service.wait_for_log("Serving again");
    let after = ["shard-0", "shard-1", "router"].map(|child| service.pid_of(child));
    assert!(before[0] != after[0] && before[1] != after[1] && before[2] == after[2]);
    assert!(!is_alive(before[0]) && !is_alive(before[1]));
    service.signal(Signal::SIGTERM);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    for text in ["shard rank 1 was ended by SIGKILL", "Serving -> Recovering", "Recovering -> Serving"] {
        assert!(ended.stdout.contains(text), "no {text}:\n{}", ended.stdout);
    }
}

#[test]
fn a_router_that_dies_is_replaced_and_the_shards_stay() {
    let service = Service::start(&[], &[]);
    service.wait_until_serving();
    let before = ["shard-0", "router"].map(|child| service.pid_of(child));
    let start = Instant::now();
    kill(before[1], Signal::SIGKILL).unwrap();
    service.wait_for_log("Serving again");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let after = ["shard-0", "router"].map(|child| service.pid_of(child));
    assert!(before[0] == after[0] && before[1] != after[1]);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.ended().code, Some(0));
}

#[test]
fn too_many_deaths_end_the_service_with_their_own_code_and_the_last_cause() {
    let flags = ["--max-restarts", "2", "--restart-window", "60"];
    let service = Service::start(&flags, &[("FAKE_SHARD", "crash-at-restart")]);
    service.wait_until_serving();
    std::fs::write(service.dir.path().join("served"), "").unwrap();
    kill(service.pid_of("shard-0"), Signal::SIGKILL).unwrap();
    let ended = service.ended();
    assert_eq!(ended.code, Some(16), "{}", ended.stdout);
    let expected = "shard rank 0 exited with code 13 (its engine met an error while it served); its last words: the \
                    device has gone (it is failure 3 within 60 s and --max-restarts is 2)\nError: ShardFailed\n";
    assert!(ended.stderr.ends_with(expected), "{}", ended.stderr);
    assert!(ended.stdout.contains("Starting again in 0.25 s"), "{}", ended.stdout);
}

#[test]
fn a_shard_that_stands_still_is_killed_and_replaced() {
    let service = Service::start(&["--num-shard", "2", "--stall-timeout", "1"], &[]);
    service.wait_until_serving();
    let stopped = service.pid_of("shard-1");
    kill(stopped, Signal::SIGSTOP).unwrap();
    service.wait_for_log("Serving again");
    assert!(!is_alive(stopped));
    let log = service.read("stdout");
    assert!(log.contains("shard rank 1 stalled: it has not answered for"), "{log}");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.ended().code, Some(0));
}

#[test]
fn what_a_child_leaves_behind_is_adopted_ended_and_reaped() {
    let service = Service::start(&[], &[("FAKE_SHARD", "has-a-child"), ("PATH", "/usr/bin:/bin")]);
    service.wait_until_serving();
    let orphan = service.pid_of("orphan");
    let status = std::fs::read_to_string(format!("/proc/{orphan}/status")).unwrap();
    assert!(status.contains(&format!("\nPPid:\t{}\n", service.launcher.id())), "{status}");
    kill(service.pid_of("shard-0"), Signal::SIGKILL).unwrap();
    service.wait_for("end of the orphan", |_| !Path::new(&format!("/proc/{orphan}")).exists());
    service.wait_for_log("Serving again");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.ended().code, Some(0));
}

#[test]
fn a_stop_while_the_shards_are_replaced_exits_0() {
    let service = Service::start(&["--num-shard", "2"], &[]);
    service.wait_until_serving();
    kill(service.pid_of("shard-0"), Signal::SIGKILL).unwrap();
    service.wait_for_log("-> Recovering");
    service.signal(Signal::SIGTERM);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
}

#[test]
fn children_that_ignore_sigterm_are_killed_after_the_timeout() {
    let environment = [("FAKE_SHARD", "ignore-term"), ("FAKE_ROUTER", "ignore-term")];
    let service = Service::start(&["--graceful-termination-timeout", "1"], &environment);
    service.wait_until_serving();
    let start = Instant::now();
    service.signal(Signal::SIGINT);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    assert!(start.elapsed() >= Duration::from_secs(2), "one for the router, one for the shard");
    for text in [
        "requests end with an error",
        "every stream has its error event",
        "in time after SIGTERM and is killed",
    ] {
        assert!(ended.stdout.contains(text), "no {text}:\n{}", ended.stdout);
    }
}

#[test]
fn a_second_signal_ends_everything_now() {
    let service = Service::start(&[], &[("FAKE_ROUTER", "ignore-term")]);
    service.wait_until_serving();
    service.signal(Signal::SIGTERM);
    service.wait_for("first signal", |service| service.read("stdout").contains("SIGTERM received"));
    let start = Instant::now();
    service.signal(Signal::SIGHUP);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0));
    for text in
        ["SIGTERM received: what runs has 90 s to finish", "SIGHUP received again: everything ends now"]
    {
        assert!(ended.stdout.contains(text), "no {text}:\n{}", ended.stdout);
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_stop_while_the_shards_load_exits_0() {
    let service = Service::start(&["--num-shard", "2"], &[("FAKE_SHARD", "never-ready")]);
    service.wait_for("shards", |service| service.has_pid("shard-0") && service.has_pid("shard-1"));
    service.signal(Signal::SIGTERM);
    let ended = service.ended();
    assert_eq!(ended.code, Some(0), "{}", ended.stdout);
    assert!(!ended.stdout.contains("Serving "));
}

#[test]
fn killing_the_launcher_leaves_no_child_and_the_prefix_is_free_again() {
    let mut service = Service::start(&["--num-shard", "2"], &[("FAKE_SHARD", "ignore-term")]);
    service.wait_until_serving();
    let children = ["shard-0", "shard-1", "router"].map(|child| service.pid_of(child));
    service.signal(Signal::SIGKILL);
    service.launcher.wait().unwrap();
    let start = Instant::now();
    while children.iter().any(|&child| is_alive(child)) {
        assert!(start.elapsed() < Duration::from_secs(2), "children outlive their launcher");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(service.dir.path().join("s-0").exists(), "nobody was left to remove it");
    // The next launcher clears the stale sockets. The directory moves into it, so the old service gives it up.
    let dir = std::mem::replace(&mut service.dir, tempfile::tempdir().unwrap());
    let next = Service::start_in(dir, &["--num-shard", "2"], &[]);
    next.wait_until_serving();
    next.signal(Signal::SIGTERM);
    assert_eq!(next.ended().code, Some(0));
}

#[test]
fn a_second_launcher_on_the_same_prefix_is_refused_and_harms_nobody() {
    let first = Service::start(&[], &[]);
    first.wait_until_serving();
    let prefix = first.dir.path().join("s").display().to_string();
    let second = Command::new(env!("CARGO_BIN_EXE_launcher"))
        .env_clear()
        .env("SHARD_UDS_PATH", &prefix)
        .env("QUARTET_BIN_DIR", first.dir.path())
        .args(["--port", &free_port().to_string(), "--hostname", "127.0.0.1"])
        .args([Path::new("--model-id"), &first.dir.path().join("model")])
        .output()
        .unwrap();
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr.contains("another launcher") && stderr.contains("--shard-uds-path"), "{stderr}");
    assert!(first.dir.path().join("s-0").exists());
    first.signal(Signal::SIGTERM);
    assert_eq!(first.ended().code, Some(0));
}

#[test]
fn what_cannot_work_is_said_before_anything_starts() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = listener.local_addr().unwrap().port().to_string();
    let refused = |arguments: &[&str], bin_dir: &Path, code: i32| {
        let output = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .env_clear()
            .env("QUARTET_BIN_DIR", bin_dir)
            .args(["--hostname", "127.0.0.1"])
            .args(arguments)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        stderr
    };
    let dir = fresh_dir();
    let model = dir.path().join("model").display().to_string();
    let free = free_port().to_string();

    let text = refused(&["--port", &busy], dir.path(), 1);
    assert!(
        text.contains(&busy) && text.contains("--port") && text.contains("Error: ArgumentValidation("),
        "{text}"
    );
    let text = refused(&["--port", &free, "--validation-workers", "0", "--speculate", "2"], dir.path(), 1);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "one for each mistake and upstream's: {text}");
    assert!(lines[0].starts_with("`validation_workers` must be > 0"), "{text}");
    assert!(lines[1].starts_with("--speculate 2"), "{text}");
    let text = refused(&["--port", &free, "--device", "cuda"], dir.path(), 1);
    assert!(text.contains("--device cuda") && text.contains("--device cpu"), "{text}");
    let text = refused(&["--port", &free, "--sharded", "true"], dir.path(), 1);
    assert!(text.contains("Error: NotEnoughCUDADevices("), "{text}");
    let text = refused(&["--port", &free, "--model-id", "./no/such/thing/here"], dir.path(), 1);
    assert!(text.contains("./no/such/thing/here") && text.ends_with("Error: DownloadError\n"), "{text}");
    let long = format!("/tmp/{}", "x".repeat(110));
    let text = refused(&["--port", &free, "--model-id", &model, "--shard-uds-path", &long], dir.path(), 1);
    assert!(text.contains("107") && text.contains("--shard-uds-path"), "{text}");
    let text = refused(&["--max-tokens", "3"], dir.path(), 2);
    assert!(text.contains("--max-tokens") && text.contains("Usage"), "{text}");
}

#[test]
fn json_logs_carry_the_rank() {
    let service = Service::start(&["--json-output"], &[]);
    service.wait_until_serving();
    service.signal(Signal::SIGTERM);
    let ended = service.ended();
    let lines = ended.stdout.lines().filter(|line| *line != "Connected");
    let lines: Vec<serde_json::Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let hello = lines.iter().find(|line| line["fields"]["message"] == "hello from rank 0").unwrap();
    assert_eq!(hello["span"]["name"], "shard-manager");
    assert_eq!(hello["span"]["rank"], 0);
    assert_eq!(hello["level"], "INFO");
}

/// The launcher with these variables and nothing else in its environment: exit code, standard output, standard error.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_launcher"))
        .env_clear()
        .envs(environment.iter().copied())
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn variables_are_read_as_upstream_reads_them_and_wrong_ones_are_named() {
    for (name, value) in [
        ("TRUST_REMOTE_CODE", "1"),
        ("NGROK", "yes"),
        ("ENABLE_PREFILL_LOGPROBS", ""),
        ("NUM_SHARD", ""),
        ("PORT", "tcp://10.0.0.1:80"),
        ("MASTER_PORT", "tcp://10.0.0.1:80"),
        ("QUANTIZE", "int3"),
        ("CUDA_GRAPHS", "1,two"),
    ] {
        let (code, _, stderr) = run(&[], &[(name, value)]);
        assert_eq!(code, Some(2), "{name}={value}: {stderr}");
        assert!(stderr.contains(&format!("environment variable {name}\n")), "{name}={value}: {stderr}");
    }
    let (code, _, stderr) = run(&["--dtype", "int3"], &[("NUM_SHARD", "two"), ("PORT", "x")]);
    assert_eq!(code, Some(2));
    for named in ["environment variable NUM_SHARD", "environment variable PORT", "'int3' for '--dtype"] {
        assert!(stderr.contains(named), "no {named}:\n{stderr}");
    }
    let (code, _, stderr) = run(&["plan", "--no-such-flag"], &[("NUM_SHARD", "two")]);
    assert_eq!((code, stderr.matches("error: ").count()), (Some(2), 2), "{stderr}");
    // The command line wins over the environment, which is then not even looked at.
    let (code, stdout, _) = run(&["--port", "0"], &[("PORT", "tcp://"), ("TRUST_REMOTE_CODE", "true")]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("--port 0: expected a port"), "{stdout}");
}

#[test]
fn the_manual_comes_as_completions_and_as_a_page_whatever_the_environment() {
    for (arguments, first) in [
        (&["completions", "bash"][..], "_launcher()"),
        (&["completions", "zsh"], "#compdef launcher"),
        (&["completions", "fish"], "complete -c launcher"),
        (&["man"], ".TH launcher 1"),
    ] {
        let (code, stdout, stderr) = run(arguments, &[("MODEL_ID", "org/model"), ("PORT", "80")]);
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
        assert!(stdout.contains(first), "{arguments:?}: {stdout}");
    }
    let (code, _, stderr) = run(&["completions", "tcsh"], &[]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("bash") && stderr.contains("fish"), "{stderr}");
}

#[test]
fn the_report_of_env_comes_first_and_the_start_goes_on() {
    // Refused at its port, which is looked at after the report.
    let (code, stdout, _) = run(&["--env", "--port", "0"], &[("PATH", "/nowhere"), ("LOG_COLORIZE", "1")]);
    assert_eq!(code, Some(1), "{stdout}");
    let at = |text: &str| stdout.find(text).unwrap_or_else(|| panic!("no {text:?} in:\n{stdout}"));
    let order = [
        "INFO launcher: Target: ",
        "\nCargo version: 1.",
        "\nCommit sha: ",
        "\nDocker label: ",
        "\nnvidia-smi:\n   N/A",
        "\nxpu-smi:\n   N/A",
        "\nhpu-smi:\n   N/A",
        "Args {",
        "--port 0: expected",
    ];
    let places: Vec<usize> = order.iter().map(|text| at(text)).collect();
    assert!(places.is_sorted(), "{stdout}");
}

#[test]
fn json_lines_have_upstreams_shape() {
    let (code, stdout, stderr) = run(&["--json-output", "--env", "--port", "0"], &[("PATH", "/nowhere")]);
    assert_eq!(code, Some(1));
    // Standard error stays text: scripts match on it.
    assert!(stderr.ends_with("expected a port from 1 to 65535\")\n"), "{stderr}");
    let lines: Vec<serde_json::Value> =
        stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        let keys: Vec<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["timestamp", "level", "fields", "target"], "{line}");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!(line["target"], "launcher");
    }
    assert!(lines[0]["fields"]["message"].as_str().unwrap().starts_with("Target: "));
    let last = lines.last().unwrap();
    assert_eq!(last["level"], "ERROR");
    assert_eq!(last["fields"]["message"], "--port 0: expected a port from 1 to 65535");
}
