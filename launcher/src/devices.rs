//! What the shards run on, and how many there are.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::args::{Args, DeviceKind};
use crate::error::LauncherError;

/// The NVIDIA driver creates this node for its first device.
const FIRST_CUDA_DEVICE: &str = "/dev/nvidia0";

/// The kind of device, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// NVIDIA GPUs, one shard each.
    Cuda,
    /// The processor, shared by all shards.
    Cpu,
}

impl Device {
    /// The spelling that `--device` takes.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cuda => "cuda",
            Device::Cpu => "cpu",
        }
    }
}

/// What this machine and this build offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// This build can run on CUDA.
    pub has_cuda_kernels: bool,
    /// The machine has an NVIDIA device and its driver.
    pub has_cuda_device: bool,
    /// Cores that this process may use.
    pub cores: usize,
}

impl Machine {
    /// Looks at the machine and, where it has a GPU, asks the program `shard` what it has kernels for; touches no device.
    pub fn look(shard: Option<&Path>) -> Self {
        let has_cuda_device = Path::new(FIRST_CUDA_DEVICE).exists();
        Self {
            has_cuda_kernels: has_cuda_device && shard.is_some_and(has_kernels),
            has_cuda_device,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// Whether the program `shard` prints any architecture.
fn has_kernels(shard: &Path) -> bool {
    let output = Command::new(shard).arg("architectures").stdin(Stdio::null()).output();
    output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

/// The device and how many of it are visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// What the shards run on.
    pub device: Device,
    /// Visible devices; `None` on the CPU and when nothing says how many.
    pub count: Option<usize>,
    /// Why `auto` became this device; one log line.
    pub why: Option<String>,
}

impl Devices {
    /// Decides what `--device` means on `machine`.
    ///
    /// # Errors
    /// `--device cuda` where CUDA is not possible.
    pub fn choose(args: &Args, machine: Machine) -> Result<Self, LauncherError> {
        let missing = match machine {
            Machine { has_cuda_kernels: false, has_cuda_device: true, .. } => {
                Some("this build has no CUDA kernels, although the machine has an NVIDIA device".to_owned())
            }
            Machine { has_cuda_kernels: false, .. } => Some("this build has no CUDA kernels".to_owned()),
            Machine { has_cuda_device: false, .. } => Some(format!("there is no {FIRST_CUDA_DEVICE}")),
            _ => None,
        };
        match (args.devices.device, missing) {
            (DeviceKind::Cuda, Some(missing)) => Err(LauncherError::ArgumentValidation(format!(
                "--device cuda: {missing}; use --device cpu or --device auto"
            ))),
            (DeviceKind::Cuda | DeviceKind::Auto, None) => {
                Ok(Self { device: Device::Cuda, count: visible_devices(args), why: None })
            }
            (DeviceKind::Auto, Some(missing)) => {
                let why =
                    format!("device auto: running on the CPU ({} cores), because {missing}", machine.cores);
                Ok(Self { device: Device::Cpu, count: None, why: Some(why) })
            }
            (DeviceKind::Cpu, _) => Ok(Self { device: Device::Cpu, count: None, why: None }),
        }
    }
}

/// Counts what the environment lets this process see: the items of the first list that is set.
fn visible_devices(args: &Args) -> Option<usize> {
    let hidden = &args.hidden;
    let list = hidden.cuda_visible_devices.as_deref().or_else(|| {
        // `all` and `void` name no device; the backend counts them itself.
        hidden.nvidia_visible_devices.as_deref().filter(|list| !matches!(list.trim(), "all" | "void"))
    })?;
    Some(list.split(',').count())
}

/// How many shards there will be.
///
/// # Errors
/// `--sharded true` with fewer than two, or `--num-shard 0`.
pub fn num_shard(args: &Args, devices: &Devices) -> Result<usize, LauncherError> {
    let (sharded, given) = (args.devices.sharded, args.devices.num_shard);
    let count = match (sharded, given) {
        (Some(true), None) => {
            let count = devices.count.unwrap_or(0);
            if count <= 1 {
                return Err(LauncherError::NotEnoughCUDADevices(format!(
                    "`sharded` is true but only found {count} CUDA devices; --num-shard N splits the model over N \
                     processes on the CPU as well"
                )));
            }
            count
        }
        (Some(true), Some(given)) if given <= 1 => {
            return Err(LauncherError::ArgumentValidation(format!(
                "`sharded` is true but `num_shard` is {given}; expected --num-shard 2 or more, or --sharded false"
            )));
        }
        (_, Some(given)) => given,
        (Some(false), None) => 1,
        (None, None) => devices.count.unwrap_or(1),
    };
    if count < 1 {
        return Err(LauncherError::ArgumentValidation(
            "`num_shard` cannot be < 1; expected --num-shard 1 or more".to_owned(),
        ));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    const NOTHING: Machine = Machine { has_cuda_kernels: false, has_cuda_device: false, cores: 2 };
    const GPUS: Machine = Machine { has_cuda_kernels: true, has_cuda_device: true, cores: 2 };

    fn args(words: &[&str]) -> Args {
        let mut args = Args::parse_from([&["launcher"], words].concat());
        // The machine that runs the tests may have these set.
        if !words.contains(&"--cuda-visible-devices") {
            args.hidden.cuda_visible_devices = None;
            args.hidden.nvidia_visible_devices = None;
        }
        args
    }

    #[test]
    fn auto_says_why_it_is_the_cpu() {
        let devices = Devices::choose(&args(&["--device", "auto"]), NOTHING).unwrap();
        assert_eq!(devices.device, Device::Cpu);
        assert!(devices.why.unwrap().contains("no CUDA kernels"));
    }

    #[test]
    fn cuda_without_kernels_is_refused_in_one_line() {
        let error = Devices::choose(&args(&["--device", "cuda"]), NOTHING).unwrap_err().to_string();
        assert!(error.contains("--device cuda") && error.contains("--device cpu"), "{error}");
    }

    #[test]
    fn visible_devices_count_on_cuda_only() {
        let words = ["--cuda-visible-devices", "0,1,2"];
        assert_eq!(Devices::choose(&args(&words), GPUS).unwrap().count, Some(3));
        let on_cpu = [&words[..], &["--device", "cpu"]].concat();
        assert_eq!(Devices::choose(&args(&on_cpu), GPUS).unwrap().count, None);
        assert_eq!(Devices::choose(&args(&["--cuda-visible-devices", ""]), GPUS).unwrap().count, Some(1));
    }

    #[test]
    fn number_of_shards_follows_the_table() {
        let visible = |count| Devices { device: Device::Cuda, count, why: None };
        for (words, count, expected) in [
            (&["--sharded", "true"][..], Some(4), Some(4)),
            (&["--sharded", "true"], Some(1), None),
            (&["--sharded", "true"], None, None),
            (&["--sharded", "true", "--num-shard", "2"], Some(4), Some(2)),
            (&["--sharded", "true", "--num-shard", "1"], Some(4), None),
            (&["--sharded", "false", "--num-shard", "2"], Some(4), Some(2)),
            (&["--sharded", "false"], Some(4), Some(1)),
            (&[], Some(4), Some(4)),
            (&[], None, Some(1)),
            (&["--num-shard", "3"], None, Some(3)),
            (&["--num-shard", "0"], None, None),
        ] {
            assert_eq!(num_shard(&args(words), &visible(count)).ok(), expected, "{words:?} {count:?}");
        }
    }
}
