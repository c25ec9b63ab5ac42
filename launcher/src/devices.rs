//! What the shards run on, and how many there are.

use crate::args::{Args, DeviceKind};
use crate::error::LauncherError;
use crate::machine::{FIRST_CUDA_DEVICE, Machine};
use crate::visible::{VisibleDevice, count_of, visible};

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

/// The device and which of it are visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// What the shards run on.
    pub device: Device,
    /// Visible devices, in the order of the ranks; none on the CPU and where nothing tells.
    pub visible: Vec<VisibleDevice>,
    /// A variable says how many there are: as many shards are the default.
    pub is_named: bool,
    /// What says so, for messages.
    pub origin: String,
    /// Why `auto` became this device; one log line.
    pub why: Option<String>,
}

impl Devices {
    /// Decides what `--device` means on `machine`.
    ///
    /// # Errors
    /// `--device cuda` where CUDA is not possible, and everything in the variables that names no device.
    pub fn choose(args: &Args, machine: &Machine) -> Result<Self, Vec<LauncherError>> {
        let cpu = |why| Self {
            device: Device::Cpu,
            visible: Vec::new(),
            is_named: false,
            origin: String::new(),
            why,
        };
        let kind = args.devices.device;
        if kind == DeviceKind::Cpu {
            return Ok(cpu(None));
        }
        let mut missing = missing_for_cuda(machine);
        let mut found = Self { device: Device::Cuda, ..cpu(None) };
        if missing.is_none() {
            let visible = visible(&args.hidden, machine).map_err(|problems| {
                problems.into_iter().map(LauncherError::ArgumentValidation).collect::<Vec<_>>()
            })?;
            if visible.is_named && visible.devices.is_empty() && hides_all(args) {
                missing = Some(format!("{} hides all devices", visible.origin));
            }
            found.visible = visible.devices;
            found.is_named = visible.is_named;
            found.origin = visible.origin;
        }
        match missing {
            None => Ok(found),
            Some(missing) if kind == DeviceKind::Cuda => Err(vec![LauncherError::ArgumentValidation(
                format!("--device cuda: {missing}; use --device cpu or --device auto"),
            )]),
            Some(missing) => Ok(cpu(Some(format!(
                "device auto: running on the CPU ({} cores), because {missing}",
                machine.cores
            )))),
        }
    }
}

/// Whether an empty list means that no device may be used, rather than that nothing could tell which there are.
fn hides_all(args: &Args) -> bool {
    let container = args.hidden.nvidia_visible_devices.as_deref().map(str::trim);
    args.hidden.cuda_visible_devices.is_some() || matches!(container, Some("none" | ""))
}

/// What stands in the way of CUDA.
fn missing_for_cuda(machine: &Machine) -> Option<String> {
    match (machine.has_cuda_kernels, machine.has_cuda_device) {
        (false, true) => {
            Some("this build has no CUDA kernels, although the machine has an NVIDIA device".to_owned())
        }
        (false, false) => Some("this build has no CUDA kernels".to_owned()),
        (true, false) => Some(format!("there is no {FIRST_CUDA_DEVICE}")),
        (true, true) => None,
    }
}

/// How many shards there will be.
///
/// # Errors
/// `--sharded true` with fewer than two, `--num-shard 0`, or more shards than visible devices.
pub fn num_shard(args: &Args, devices: &Devices) -> Result<usize, LauncherError> {
    let (sharded, given) = (args.devices.sharded, args.devices.num_shard);
    let visible = devices.visible.len();
    let count = match (sharded, given) {
        (Some(true), None) => {
            if visible <= 1 {
                return Err(LauncherError::NotEnoughCUDADevices(format!(
                    "`sharded` is true but only found {visible} CUDA devices; --num-shard N splits the model over N \
                     processes on the CPU as well"
                )));
            }
            visible
        }
        (Some(true), Some(given)) if given <= 1 => {
            return Err(LauncherError::ArgumentValidation(format!(
                "`sharded` is true but `num_shard` is {given}; expected --num-shard 2 or more, or --sharded false"
            )));
        }
        (_, Some(given)) => given,
        (Some(false), None) => 1,
        (None, None) if devices.is_named => visible.max(1),
        (None, None) => 1,
    };
    if count < 1 {
        return Err(LauncherError::ArgumentValidation(
            "`num_shard` cannot be < 1; expected --num-shard 1 or more".to_owned(),
        ));
    }
    if visible > 0 && count > visible {
        return Err(LauncherError::NotEnoughCUDADevices(format!(
            "--num-shard {count}: {} shows {}; expected one for each shard, so lower --num-shard or let more be seen",
            devices.origin,
            count_of(visible)
        )));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn nothing() -> Machine {
        Machine { cores: 2, ..Machine::default() }
    }

    fn gpus() -> Machine {
        Machine { has_cuda_kernels: true, has_cuda_device: true, ..nothing() }
    }

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
        let devices = Devices::choose(&args(&["--device", "auto"]), &nothing()).unwrap();
        assert_eq!(devices.device, Device::Cpu);
        assert!(devices.why.unwrap().contains("no CUDA kernels"));
        for hidden in ["", "-1"] {
            let mut args = args(&[]);
            args.hidden.cuda_visible_devices = Some(hidden.to_owned());
            let devices = Devices::choose(&args, &gpus()).unwrap();
            assert_eq!(devices.device, Device::Cpu);
            assert!(devices.why.unwrap().contains("hides all devices"));
        }
    }

    #[test]
    fn cuda_without_kernels_is_refused_in_one_line() {
        for (words, machine) in [
            (&["--device", "cuda"][..], nothing()),
            (&["--device", "cuda", "--cuda-visible-devices", ""], gpus()),
        ] {
            let errors = Devices::choose(&args(words), &machine).unwrap_err();
            let [error] = errors.as_slice() else { panic!("{errors:?}") };
            let error = error.to_string();
            assert!(error.contains("--device cuda") && error.contains("--device cpu"), "{error}");
        }
    }

    #[test]
    fn visible_devices_count_on_cuda_only() {
        let words = ["--cuda-visible-devices", "0,1,2"];
        assert_eq!(Devices::choose(&args(&words), &gpus()).unwrap().visible.len(), 3);
        let on_cpu = [&words[..], &["--device", "cpu"]].concat();
        assert_eq!(Devices::choose(&args(&on_cpu), &gpus()).unwrap().visible.len(), 0);
        let wrong = Devices::choose(&args(&["--cuda-visible-devices", "a,b"]), &gpus()).unwrap_err();
        assert_eq!(wrong.len(), 2);
    }

    #[test]
    fn number_of_shards_follows_the_table() {
        let visible = |count: Option<usize>| Devices {
            device: Device::Cuda,
            visible: (0..count.unwrap_or(0))
                .map(|index| VisibleDevice { id: index.to_string(), gpu: None })
                .collect(),
            is_named: count.is_some(),
            origin: "CUDA_VISIBLE_DEVICES=0,1,2,3".to_owned(),
            why: None,
        };
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
            (&["--num-shard", "5"], Some(4), None),
            (&["--num-shard", "0"], None, None),
        ] {
            assert_eq!(num_shard(&args(words), &visible(count)).ok(), expected, "{words:?} {count:?}");
        }
        // Without a variable upstream starts one shard; devices it does not count are there all the same.
        let unnamed = Devices { is_named: false, ..visible(Some(4)) };
        assert_eq!(num_shard(&args(&[]), &unnamed), Ok(1));
        assert_eq!(num_shard(&args(&["--sharded", "true"]), &unnamed), Ok(4));
    }
}
