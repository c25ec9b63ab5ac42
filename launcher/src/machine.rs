//! What this machine and this build offer: facts, read once, from which everything else is decided.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::nvml;

/// The NVIDIA driver creates this node for its first device.
pub const FIRST_CUDA_DEVICE: &str = "/dev/nvidia0";

/// What this machine and this build offer. Also the form of the file that `--machine` names, where every field may be left
/// out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// This build can run on CUDA.
    pub has_cuda_kernels: bool,
    /// The machine has an NVIDIA device and its driver.
    pub has_cuda_device: bool,
    /// Cores that this process may use.
    pub cores: usize,
    /// The driver's version, such as `580.65.06`, where its library answers.
    pub driver: Option<String>,
    /// The newest CUDA the driver runs, as it counts: 13000 is 13.0.
    pub cuda_version: Option<u32>,
    /// The devices this process sees, in the order of their buses; empty where the driver's library does not answer.
    pub gpus: Vec<Gpu>,
}

/// One GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gpu {
    /// `GPU-` and a UUID.
    pub uuid: String,
    /// The product's name.
    pub name: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes nobody holds.
    pub free_bytes: u64,
    /// Who computes on it.
    pub processes: Vec<GpuProcess>,
    /// Its slices, where it is cut into some (MIG).
    pub slices: Vec<GpuSlice>,
    /// GPUs of this machine that it cannot exchange memory with directly, as far as the driver tells.
    pub unreachable: Vec<Unreachable>,
}

/// A GPU whose memory another one cannot read or write itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Unreachable {
    /// `GPU-` and its UUID.
    pub uuid: String,
    /// What the driver gives as the reason.
    pub why: String,
}

/// A process that holds memory of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuProcess {
    /// Its number, in the outermost namespace.
    pub pid: u32,
    /// Its name, where `/proc` tells.
    pub name: Option<String>,
    /// What it holds, where the driver tells.
    pub bytes: Option<u64>,
}

/// A slice of a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GpuSlice {
    /// `MIG-` and a UUID.
    pub uuid: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes nobody holds.
    pub free_bytes: u64,
}

impl Machine {
    /// Looks at the machine and, where it has a GPU, asks the program `shard` what it has kernels for; touches no device.
    pub fn look(shard: Option<&Path>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // A machine without a device is not asked for the driver's library: that would cost every start a search.
        if !Path::new(FIRST_CUDA_DEVICE).exists() && !Path::new("/dev/nvidiactl").exists() {
            return Self { cores, ..Self::default() };
        }
        let found = nvml::read();
        Self {
            has_cuda_kernels: shard.is_some_and(has_kernels),
            // In a container the first device may have another number.
            has_cuda_device: !found.gpus.is_empty() || Path::new(FIRST_CUDA_DEVICE).exists(),
            cores,
            driver: found.driver,
            cuda_version: found.cuda_version,
            gpus: found.gpus,
        }
    }

    /// The machine that the JSON file at `path` describes.
    ///
    /// # Errors
    /// One line: the file cannot be read, or what is wrong in it.
    pub fn from_file(path: &Path) -> Result<Self, String> {
        let wrong = |problem: String| format!("--machine {}: {problem}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
    }
}

/// Whether the program `shard` prints any architecture.
fn has_kernels(shard: &Path) -> bool {
    let output = Command::new(shard).arg("architectures").stdin(Stdio::null()).output();
    output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_describes_a_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.json");
        std::fs::write(&path, r#"{"has_cuda_device": true, "gpus": [{"uuid": "GPU-1", "free_bytes": 7}]}"#)
            .unwrap();
        let machine = Machine::from_file(&path).unwrap();
        assert!(machine.has_cuda_device && !machine.has_cuda_kernels);
        assert_eq!((machine.gpus[0].uuid.as_str(), machine.gpus[0].free_bytes), ("GPU-1", 7));
        std::fs::write(&path, r#"{"gpu": []}"#).unwrap();
        assert!(Machine::from_file(&path).unwrap_err().contains("unknown field `gpu`"));
        assert!(Machine::from_file(Path::new("/no/file")).unwrap_err().starts_with("--machine /no/file: "));
    }

    #[test]
    fn this_machine_has_cores() {
        assert!(Machine::look(None).cores > 0);
    }
}
