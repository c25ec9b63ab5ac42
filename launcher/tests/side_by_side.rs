//! Two launchers on one machine with default flags: each rank on its own device, no path shared, however close their starts.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Pairs started one after the other.
const ROUNDS: usize = 100;

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Directory with the fake children, a model of which only the config is read, and a machine with four GPUs.
fn stage() -> tempfile::TempDir {
    let fake = Path::new(env!("CARGO_BIN_EXE_launcher")).with_file_name("examples").join("fake_child");
    assert!(fake.exists(), "{} is missing: run the tests without --test", fake.display());
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&fake, dir.path().join("shard")).unwrap();
    std::os::unix::fs::symlink(&fake, dir.path().join("router")).unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    std::fs::write(model.join("model.safetensors"), "the fake shard does not look").unwrap();
    let gpus: Vec<_> = (0..4)
        .map(|index| serde_json::json!({"uuid": format!("GPU-{index}"), "free_bytes": 1_u64 << 33}))
        .collect();
    let machine =
        serde_json::json!({"has_cuda_kernels": true, "has_cuda_device": true, "cores": 2, "gpus": gpus});
    std::fs::write(dir.path().join("machine.json"), machine.to_string()).unwrap();
    dir
}

/// A launcher with what it logs.
struct Running {
    child: Child,
    dir: PathBuf,
}

impl Running {
    fn start(stage: &Path, name: &str, devices: &str, port: u16) -> Self {
        let dir = stage.join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .env_clear()
            .env("CUDA_VISIBLE_DEVICES", devices)
            .env("QUARTET_BIN_DIR", stage)
            .env("QUARTET_MACHINE", stage.join("machine.json"))
            .env("FAKE_DIR", &dir)
            .args(["--num-shard", "2", "--hostname", "127.0.0.1", "--port", &port.to_string()])
            .args([Path::new("--model-id"), &stage.join("model")])
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .stdout(log)
            .spawn()
            .unwrap();
        Self { child, dir }
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    fn wait_until_serving(&mut self) {
        let start = Instant::now();
        while !self.read("log").contains("Serving ") {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "{ended:?}:\n{}", self.read("log"));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn devices(&self) -> [String; 2] {
        ["shard-0.device", "shard-1.device"].map(|name| self.read(name))
    }

    fn stop(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{}", self.read("log"));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A failed test must leave nothing behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_ports() -> [u16; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

#[test]
fn pairs_of_launchers_start_side_by_side_each_rank_on_its_own_device() {
    let stage = stage();
    let own = |id: &str| format!("Some({id:?}) Some(0)");
    for round in 0..ROUNDS {
        let ports = free_ports();
        let mut first = Running::start(stage.path(), "first", "0,1", ports[0]);
        let mut second = Running::start(stage.path(), "second", "2,3", ports[1]);
        first.wait_until_serving();
        second.wait_until_serving();
        assert_eq!(first.devices(), [own("0"), own("1")], "round {round}");
        assert_eq!(second.devices(), [own("2"), own("3")], "round {round}");
        first.stop();
        second.stop();
    }
}

#[test]
fn more_shards_than_devices_and_devices_that_are_not_there_are_refused() {
    let stage = stage();
    let refused = |devices: &str, shards: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_launcher"))
            .env_clear()
            .env("CUDA_VISIBLE_DEVICES", devices)
            .env("QUARTET_BIN_DIR", stage.path())
            .args([Path::new("--machine"), &stage.path().join("machine.json")])
            .args(["--num-shard", shards, "--port", &free_ports()[0].to_string()])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let text = refused("0,1", "3");
    assert!(text.contains("--num-shard 3: CUDA_VISIBLE_DEVICES=0,1 shows 2 devices"), "{text}");
    assert!(text.ends_with('\n') && text.contains("Error: NotEnoughCUDADevices("), "{text}");
    let text = refused("0,7", "2");
    assert!(text.contains("there is no device 7; this machine has 4 devices"), "{text}");
}
