//! The launcher's download as processes: killed at any moment, two at once, on full and on read-only disks, in logs.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use integration_tests::fake_hub::{COMMIT, FakeHub, Fault, RunningHub, noise};
use integration_tests::golden::fixture;
use integration_tests::{free_port, http, process_tree, program};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";
const TOKEN: &str = "hf_a_secret_of_this_test";
/// No download of a test takes this long, not even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
const CONNECTIONS: u64 = 2;

fn tiny(size: usize) -> FakeHub {
    FakeHub::default()
        .file("config.json", r#"{"model_type": "llama"}"#)
        .file("tokenizer.json", "{}")
        .file(WEIGHTS, noise(size))
}

/// A cache directory, and the launchers that use it.
struct Place {
    dir: tempfile::TempDir,
    endpoint: String,
}

/// A launcher with its output in files; killed when dropped.
struct Launcher {
    child: Child,
    log: PathBuf,
}

impl Place {
    fn of(hub: &RunningHub) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), endpoint: hub.endpoint.clone() }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// A command with the environment that the launcher is to see, and no other.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HUGGINGFACE_HUB_CACHE", self.cache())
            .env("HF_TOKEN", TOKEN)
            .env("QUARTET_DOWNLOAD_CONNECTIONS", CONNECTIONS.to_string())
            .env("QUARTET_DOWNLOAD_SEGMENT_BYTES", "65536")
            .env("LOG_COLORIZE", "1")
            .stdin(Stdio::null());
        command
    }

    fn download(&self) -> Command {
        let mut command = self.command(program("launcher"));
        command.args(["download", "org/tiny"]);
        command
    }

    /// The download as a script, `$LAUNCHER download org/tiny`, in namespaces of its own where it may mount; `None` where
    /// this machine does not allow that.
    fn script(&self, script: &str) -> Option<Command> {
        let probe = Command::new("unshare").args(["-Urm", "true"]).output();
        if !probe.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: no user namespaces on this machine");
            return None;
        }
        let mut command = self.command("unshare");
        command.args(["-Urm", "sh", "-euc", script]);
        command.env("LAUNCHER", program("launcher")).env("CACHE", self.cache());
        Some(command)
    }

    fn start(&self, mut command: Command) -> Launcher {
        let log = tempfile::Builder::new().prefix("log-").tempfile_in(self.dir.path()).unwrap();
        let (file, log) = log.keep().unwrap();
        let child = command.stderr(file.try_clone().unwrap()).stdout(file).spawn().unwrap();
        Launcher { child, log }
    }

    fn snapshot(&self) -> PathBuf {
        self.cache().join("models--org--tiny/snapshots").join(COMMIT)
    }

    /// Whatever has a name in the snapshot is whole.
    fn assert_sound(&self, hub: &RunningHub) {
        let Ok(entries) = std::fs::read_dir(self.snapshot()) else { return };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let found = std::fs::read(self.snapshot().join(&name)).unwrap();
            assert!(found == hub.content(&name), "{name} is not whole");
        }
    }

    fn assert_complete(&self, hub: &RunningHub) {
        self.assert_sound(hub);
        assert!(
            ["config.json", "tokenizer.json", WEIGHTS]
                .iter()
                .all(|name| self.snapshot().join(name).is_file())
        );
        let blobs = std::fs::read_dir(self.cache().join("models--org--tiny/blobs")).unwrap();
        let blobs: Vec<_> = blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(blobs.iter().all(|name| !name.contains("part")), "{blobs:?}");
    }
}

impl Launcher {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn wait(mut self) -> (ExitStatus, String) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, self.log());
            }
            assert!(Instant::now() < end, "still running:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn wait_for(&self, what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "{what}: never\n{}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Both fail for one that has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn killed_at_any_moment_it_leaves_nothing_that_is_trusted_and_goes_on() {
    const NUM_KILLS: u64 = 20;
    let hub = tiny(2_500_000).file("tokenizer_config.json", noise(300_000)).slow(1_000_000).serve();
    let place = Place::of(&hub);
    let mut chance = noise(NUM_KILLS as usize).into_iter();
    let mut num_killed = 0;
    while num_killed < NUM_KILLS {
        let mut launcher = place.start(place.download());
        // At any moment: after 0 to 127 KB more.
        let until = hub.num_bytes() + u64::from(chance.next().unwrap()) * 500;
        while hub.num_bytes() < until && launcher.child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        num_killed += 1;
        if launcher.child.try_wait().unwrap().is_some_and(|status| status.success()) {
            break;
        }
        drop(launcher);
        place.assert_sound(&hub);
        assert!(!place.snapshot().join("config.json").exists() || place.snapshot().join(WEIGHTS).exists());
    }
    let (status, log) = place.start(place.download()).wait();
    assert!(status.success(), "{log}");
    place.assert_complete(&hub);
    assert!(num_killed >= NUM_KILLS / 2, "the download was over after {num_killed} kills");
    // A killed process loses what its connections had read or the kernel had for them.
    let (sent, lost) = (hub.num_bytes(), (num_killed + 1) * CONNECTIONS * (64 << 10));
    println!("{num_killed} kills: {} of {} bytes were sent again", sent - hub.size(), hub.size());
    assert!(sent <= hub.size() + lost, "{sent} bytes were sent for {} and {num_killed} kills", hub.size());
}

#[test]
fn two_at_once_download_once_and_the_second_says_whom_it_waits_for() {
    let hub = tiny(600_000).slow(300_000).serve();
    let place = Place::of(&hub);
    let first = place.start(place.download());
    first.wait_for("the download", || hub.num_bytes() > 0);
    let second = place.start(place.download());
    let waiting = format!("Waiting for process {}, which downloads org/tiny", first.child.id());
    second.wait_for("the second waits", || second.log().contains(&waiting));
    let (second_status, log) = second.wait();
    assert!(second_status.success(), "{log}");
    let (first_status, log) = first.wait();
    assert!(first_status.success(), "{log}");
    place.assert_complete(&hub);
    assert_eq!(hub.num_bytes(), hub.size());
    assert_eq!(hub.requests().iter().filter(|request| request.path.starts_with("/api/")).count(), 1);
}

#[test]
fn who_waits_goes_on_when_the_other_is_killed() {
    let hub = tiny(600_000).slow(300_000).serve();
    let place = Place::of(&hub);
    let first = place.start(place.download());
    first.wait_for("the download", || hub.num_bytes() > 0);
    let second = place.start(place.download());
    second.wait_for("the second waits", || second.log().contains("Waiting for process"));
    drop(first);
    let (status, log) = second.wait();
    assert!(status.success(), "{log}");
    place.assert_complete(&hub);
    assert!(hub.num_bytes() <= hub.size() + CONNECTIONS * (64 << 10), "{}", hub.num_bytes());
}

#[test]
fn a_file_size_limit_is_a_line_that_says_how_much_is_needed_and_where() {
    let hub = tiny(1_000_000).serve();
    let place = Place::of(&hub);
    let mut command = place.command("sh");
    command.args(["-c", "ulimit -f 300; exec \"$0\" download org/tiny"]).arg(program("launcher"));
    let (status, log) = place.start(command).wait();
    assert_eq!(status.code(), Some(1), "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("no space for \"org/tiny\"")).collect();
    assert!(
        lines.iter().all(|line| line.contains("MiB more are needed") || line.contains("KiB more are needed")),
        "{log}"
    );
    assert!(
        !lines.is_empty() && lines[0].contains("models--org--tiny") && lines[0].contains("File too large"),
        "{log}"
    );
    assert!(lines[0].contains("--huggingface-hub-cache"), "{log}");
    place.assert_sound(&hub);
    let (status, log) = place.start(place.download()).wait();
    assert!(status.success(), "{log}");
    place.assert_complete(&hub);
}

#[test]
fn a_disk_that_is_too_small_is_known_before_and_one_that_fills_up_is_survived() {
    let hub = tiny(1_000_000).slow(200_000).serve();
    let place = Place::of(&hub);
    let script = r#"
        mkdir "$CACHE"; mount -t tmpfs -o size=1500k none "$CACHE"
        ! "$LAUNCHER" download org/tiny
        mount -t tmpfs -o size=4m none "$CACHE"
        "$LAUNCHER" download org/tiny & pid=$!
        until ls "$CACHE"/models--org--tiny/blobs/*part > /dev/null 2>&1; do sleep 0.01; done
        ! dd if=/dev/zero of="$CACHE/filler" bs=64k 2> /dev/null
        ! wait $pid
        ls "$CACHE"/models--org--tiny/snapshots/*/config.json 2> /dev/null && exit 3
        rm "$CACHE/filler"
        "$LAUNCHER" download org/tiny
        echo "weights: $(sha256sum < "$CACHE"/models--org--tiny/snapshots/*/model.safetensors)"
    "#;
    let Some(command) = place.script(script) else { return };
    let (status, log) = place.start(command).wait();
    assert!(status.success(), "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.starts_with("no space for \"org/tiny\"")).collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(lines[0].contains("are needed") && lines[0].contains("are free"), "{log}");
    assert!(lines[1].contains("are needed") && lines[1].contains("No space left on device"), "{log}");
    let blob = hub.requests().into_iter().find(|request| request.is_storage).unwrap();
    assert!(blob.path.contains(WEIGHTS));
    assert!(log.contains("weights: ") && !log.contains("SHA-256"), "{log}");
}

#[test]
fn a_read_only_cache_serves_what_is_complete_and_says_what_is_not() {
    let hub = tiny(100_000).serve();
    let place = Place::of(&hub);
    let read_only = r#"mount --bind "$CACHE" "$CACHE"; mount -o remount,bind,ro "$CACHE"; "#;
    std::fs::create_dir(place.cache()).unwrap();
    let Some(command) = place.script(&format!(r#"{read_only} exec "$LAUNCHER" download org/tiny"#)) else {
        return;
    };
    let (status, log) = place.start(command).wait();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("is not complete in") && log.contains("Read-only file system"), "{log}");
    assert!(log.contains("--huggingface-hub-cache") && hub.requests().is_empty(), "{log}");

    let (status, log) = place.start(place.download()).wait();
    assert!(status.success(), "{log}");
    let asked = hub.requests().len();
    let command = place.script(&format!(r#"{read_only} exec "$LAUNCHER" download org/tiny"#)).unwrap();
    let (status, log) = place.start(command).wait();
    assert!(status.success(), "{log}");
    assert_eq!(hub.requests().len(), asked, "a complete snapshot asks nobody");
}

#[test]
fn logs_say_how_far_it_is_once_a_second_and_never_the_token() {
    let hub = tiny(1_000_000).fault("/stored/", Fault::CutAfter(9_000), 1).slow(200_000).serve();
    let place = Place::of(&hub);
    let mut command = place.download();
    command.env("LOG_LEVEL", "trace");
    let (status, log) = place.start(command).wait();
    assert!(status.success(), "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("Downloading org/tiny: ")).collect();
    assert!(!lines.is_empty() && lines.len() < 60, "{log}");
    assert!(lines.iter().all(|line| line.contains(" of 976.") && line.contains("/s, ")), "{log}");
    assert!(log.contains("trying again in") && log.contains("org/tiny is complete at commit"), "{log}");

    std::fs::remove_dir_all(place.cache()).unwrap();
    let mut command = place.download();
    command.args(["--json-output"]);
    let (status, json_log) = place.start(command).wait();
    assert!(status.success(), "{json_log}");
    let fields: Vec<Value> =
        json_log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["fields"].clone()).collect();
    let progress: Vec<_> = fields.iter().filter(|fields| fields["total_bytes"].is_u64()).collect();
    assert!(!progress.is_empty(), "{json_log}");
    for fields in progress {
        let (done, total) =
            (fields["downloaded_bytes"].as_u64().unwrap(), fields["total_bytes"].as_u64().unwrap());
        assert!(done <= total && total == hub.size() && fields["bytes_per_second"].is_u64(), "{fields}");
    }

    let refused = Fault::Status(403, vec!["X-Error-Code: GatedRepo".to_owned()]);
    let gated = tiny(1_000).fault("/api/", refused, usize::MAX).serve();
    let place = Place::of(&gated);
    let mut command = place.download();
    command.env("LOG_LEVEL", "trace");
    let (status, gated_log) = place.start(command).wait();
    assert_eq!(status.code(), Some(1), "{gated_log}");
    assert!(
        gated_log.contains("accept its licence at") && gated_log.ends_with("Error: DownloadError\n"),
        "{gated_log}"
    );
    for log in [log, json_log, gated_log] {
        assert!(!log.contains(TOKEN) && !log.contains("secret-signature"), "{log}");
    }
}

#[test]
fn a_terminal_shows_bars() {
    let hub = tiny(400_000).slow(200_000).serve();
    let place = Place::of(&hub);
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = nix::pty::openpty(Some(&size), None).unwrap();
    let mut command = place.download();
    command.env("TERM", "xterm").stdout(Stdio::null()).stderr(Stdio::from(terminal.slave));
    let mut child = command.spawn().unwrap();
    // The parent's copy of the terminal's other end goes with the command, so that reading ends with the child.
    drop(command);
    let mut shown = Vec::new();
    // Linux ends the last read of a terminal with an error.
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(
        shown.contains("org/tiny (all)") && shown.contains(WEIGHTS) && shown.contains("390.6"),
        "{shown}"
    );
    place.assert_complete(&hub);
}

#[test]
fn a_signal_ends_a_download_and_the_next_one_goes_on() {
    let hub = tiny(600_000).slow(300_000).serve();
    let place = Place::of(&hub);
    let launcher = place.start(place.download());
    launcher.wait_for("the download", || hub.num_bytes() > 100_000);
    process_tree::send(launcher.child.id() as i32, Signal::SIGTERM);
    let (status, log) = launcher.wait();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("what has come is kept"), "{log}");
    let (status, log) = place.start(place.download()).wait();
    assert!(status.success(), "{log}");
    assert!(hub.num_bytes() <= hub.size() + CONNECTIONS * (64 << 10), "{}", hub.num_bytes());
}

/// The whole service from a Hub: its first phase downloads, a second start asks nobody.
#[test]
fn serving_downloads_first_and_starts_without_network_then() {
    let model = fixture("tiny-llama");
    let read = |name: &str| std::fs::read(Path::new(&model).join(name)).unwrap();
    let names = ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"];
    let hub = names.iter().fold(FakeHub::default(), |hub, name| hub.file(name, read(name))).serve();
    let place = Place::of(&hub);
    let serve = |environment: &[(&str, &str)]| {
        let port = free_port();
        let mut command = place.command(program("launcher"));
        command.args(["--model-id", "org/tiny", "--hostname", "127.0.0.1", "--port", &port.to_string()]);
        command.arg("--shard-uds-path").arg(place.dir.path().join(format!("shard-{port}")));
        command.envs(environment.iter().copied());
        let mut launcher = place.start(command);
        let end = Instant::now() + PATIENCE;
        while !http::get(port, "/health").is_ok_and(|response| response.status == 200) {
            assert!(
                launcher.child.try_wait().unwrap().is_none() && Instant::now() < end,
                "{}",
                launcher.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 3}});
        assert_eq!(http::post(port, "/generate", &body).unwrap().status, 200);
        process_tree::send(launcher.child.id() as i32, Signal::SIGTERM);
        let (status, log) = launcher.wait();
        assert!(status.success(), "{log}");
        assert!(!log.contains(TOKEN), "{log}");
    };
    serve(&[]);
    assert_eq!(hub.num_bytes(), hub.size());
    let asked = hub.requests().len();
    serve(&[]);
    serve(&[("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:1")]);
    assert_eq!(hub.requests().len(), asked);
}
