//! What can be known to fail, or to be slow, before anything starts: each answer says what was found, expected, and what changes
//! it. Looking at the machine and judging are apart, so that every judgement is tested.

mod port;
mod probe;

use std::path::PathBuf;

use hub::{ModelFiles, WeightFiles};
use serde::Serialize;

use crate::devices::{Device, Devices};
use crate::machine::{Gpu, Machine};
use crate::memory::{self, Available};
use crate::plan::LaunchPlan;
use crate::runtime_dir;

pub use port::check_port;
pub use probe::{look, raise_open_files};

/// The CUDA that the kernels and libraries are built for, as the driver counts.
const CUDA_VERSION: u32 = 13_000;

/// The first driver that runs it.
const FIRST_DRIVER: u32 = 580;

/// Open files besides the connections: logs, sockets, libraries, model files.
const OTHER_FILES: u64 = 128;

/// Whether the service can start with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can, but worse than it could.
    Warning,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether the service can start with it.
    pub severity: Severity,
    /// What was found, what was expected, what changes it.
    pub line: String,
}

/// What the machine is like for this launch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Why the router could not listen.
    pub port: Option<String>,
    /// The most files a process may open, `ulimit -Hn`.
    pub open_files: Option<u64>,
    /// Where a download would have to write and cannot, and why; none when it can or the model is here.
    pub cache: Option<(PathBuf, String)>,
    /// Of the user, for messages about files.
    pub user: u32,
    /// Cores this process may use, limits of its control group included.
    pub cores: usize,
    /// The processor lacks the vector instructions that fast kernels need.
    pub lacks_vectors: bool,
}

/// Judges the facts; the errors first.
pub fn findings(facts: &Facts, machine: &Machine, devices: &Devices, plan: &LaunchPlan) -> Vec<Finding> {
    let error = |line: String| Finding { severity: Severity::Error, line };
    let warning = |line: String| Finding { severity: Severity::Warning, line };
    let mut found: Vec<Finding> = facts.port.iter().cloned().map(error).collect();
    found.extend(driver(machine, plan).map(error));
    found.extend(cache(facts).map(error));
    found.extend(sockets(plan).map(error));
    found.extend(holders(devices, plan).into_iter().map(warning));
    found.extend(apart(devices, plan).map(warning));
    found.extend(open_files(facts, plan).map(warning));
    found.extend(threads(facts, plan).map(warning));
    found.extend((plan.shard.device == Device::Cpu && facts.lacks_vectors).then(|| {
        warning(
            "this processor has no AVX2: portable kernels run, several times slower; serve on a newer processor or a \
             GPU"
                .to_owned(),
        )
    }));
    found
}

/// Whether the driver runs what this build is made of.
fn driver(machine: &Machine, plan: &LaunchPlan) -> Option<String> {
    let version = machine.cuda_version.filter(|_| plan.shard.device == Device::Cuda)?;
    (version < CUDA_VERSION).then(|| {
        format!(
            "the NVIDIA driver {} runs CUDA up to {}.{}; this build needs {}.{}: install driver {FIRST_DRIVER} or newer, or \
             use --device cpu",
            machine.driver.as_deref().unwrap_or("of this machine"),
            version / 1000,
            version % 1000 / 10,
            CUDA_VERSION / 1000,
            CUDA_VERSION % 1000 / 10
        )
    })
}

fn cache(facts: &Facts) -> Option<String> {
    let (path, why) = facts.cache.as_ref()?;
    Some(format!(
        "the model is not on this disk and user {} cannot download it to {}: {why}; make that writable, point \
         --huggingface-hub-cache at a directory that is, or put the model there first with `launcher download`",
        facts.user,
        path.display()
    ))
}

fn sockets(plan: &LaunchPlan) -> Option<String> {
    let prefix = plan.uds_prefix.as_deref()?;
    let problem = runtime_dir::check_length(prefix, plan.shard.num_shard).err()?;
    Some(format!("--shard-uds-path {prefix}: {problem}"))
}

/// Who computes on the ranks' GPUs already.
fn holders(devices: &Devices, plan: &LaunchPlan) -> Vec<String> {
    let chosen = devices.visible.iter().take(plan.shard.num_shard);
    let gpus = chosen.filter_map(|device| Some((device.id.as_str(), device.gpu.as_ref()?)));
    gpus.flat_map(|(id, gpu)| gpu.processes.iter().map(move |process| (id, gpu, process)))
        .map(|(id, gpu, process)| {
            let Gpu { name, memory_bytes, free_bytes, .. } = gpu;
            let who = process.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
            let holds = match process.bytes {
                Some(bytes) => format!("{} of its {} MiB", bytes >> 20, memory_bytes >> 20),
                None => "some of its memory".to_owned(),
            };
            format!(
                "GPU {id} ({name}) is used by process {}{who}, which holds {holds}, {} MiB are free; stop that process or \
                 choose another GPU with CUDA_VISIBLE_DEVICES",
                process.pid,
                free_bytes >> 20
            )
        })
        .collect()
}

/// GPUs of ranks that cannot exchange memory directly, all pairs in one line.
fn apart(devices: &Devices, plan: &LaunchPlan) -> Option<String> {
    let chosen: Vec<_> = devices.visible.iter().take(plan.shard.num_shard).collect();
    let mut pairs = Vec::new();
    for (index, device) in chosen.iter().enumerate() {
        let Some(gpu) = &device.gpu else { continue };
        for other in &chosen[index + 1..] {
            let found = gpu
                .unreachable
                .iter()
                .find(|peer| other.gpu.as_ref().is_some_and(|other| other.uuid == peer.uuid));
            pairs.extend(found.map(|peer| format!("{} and {} ({})", device.id, other.id, peer.why)));
        }
    }
    (!pairs.is_empty()).then(|| {
        format!(
            "GPUs that cannot exchange memory directly: {}; their ranks exchange results by NCCL (libnccl.so.2 must be there) \
             through the host's memory, which is slower; choose GPUs that can with CUDA_VISIBLE_DEVICES (`nvidia-smi topo -p2p r` shows which)",
            pairs.join(", ")
        )
    })
}

fn open_files(facts: &Facts, plan: &LaunchPlan) -> Option<String> {
    let (limit, requests) = (facts.open_files?, plan.max_concurrent_requests);
    let needed = u64::try_from(requests).ok()?.saturating_add(OTHER_FILES);
    (limit < needed).then(|| {
        format!(
            "a process may open {limit} files (`ulimit -Hn`), but {requests} requests at once need about {needed}: raise \
             the limit (docker: --ulimit nofile={}), or lower --max-concurrent-requests",
            needed.next_power_of_two()
        )
    })
}

fn threads(facts: &Facts, plan: &LaunchPlan) -> Option<String> {
    if plan.shard.device == Device::Cuda || facts.cores == 0 {
        return None;
    }
    let (shards, cores) = (plan.shard.num_shard, facts.cores);
    let each = plan.threads.unwrap_or_else(|| (cores / shards).max(1));
    let all = each.saturating_mul(shards);
    (all > cores).then(|| {
        format!(
            "{shards} shard(s) x {each} thread(s) are {all}, but this process may use {cores} core(s), by the machine or \
             its container's CPU limit: they will wait for one another; lower --threads or --num-shard, or raise the limit"
        )
    })
}

/// Whether the weights can be in memory at all.
///
/// # Errors
/// The weight files are larger than the memory that is left.
pub fn check_memory(files: &ModelFiles) -> Result<(), String> {
    match memory::available() {
        Some(available) => compare(weight_bytes(&files.weights), &available),
        // A kernel that does not tell is no reason to refuse.
        None => Ok(()),
    }
}

fn compare(weights: u64, available: &Available) -> Result<(), String> {
    if weights <= available.bytes {
        return Ok(());
    }
    Err(format!(
        "the model's weights are {} MiB, but {} leaves {} MiB; free or add memory, or choose a smaller model with \
         --model-id",
        weights >> 20,
        available.bound,
        available.bytes >> 20
    ))
}

fn weight_bytes(weights: &WeightFiles) -> u64 {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    weights.paths().iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;
    use crate::machine::{GpuProcess, Unreachable};
    use crate::plan::plan;

    fn facts() -> Facts {
        Facts { open_files: Some(1 << 20), cores: 4, ..Facts::default() }
    }

    fn machine() -> Machine {
        let gpu = |index: usize| Gpu {
            uuid: format!("GPU-{index}"),
            name: "NVIDIA H100".to_owned(),
            memory_bytes: 80 << 30,
            free_bytes: 10 << 30,
            processes: vec![GpuProcess { pid: 77, name: Some("python3".to_owned()), bytes: Some(70 << 30) }],
            ..Gpu::default()
        };
        Machine {
            has_cuda_kernels: true,
            has_cuda_device: true,
            driver: Some("580.65.06".to_owned()),
            cuda_version: Some(13_000),
            gpus: (0..2).map(gpu).collect(),
            ..Machine::default()
        }
    }

    fn judged(facts: &Facts, machine: &Machine, words: &[&str]) -> Vec<Finding> {
        let mut args = Args::parse_from([&["launcher", "--hostname", "127.0.0.1"], words].concat());
        args.hidden.cuda_visible_devices = None;
        args.hidden.nvidia_visible_devices = None;
        let devices = Devices::choose(&args, machine).unwrap();
        findings(facts, machine, &devices, &plan(&args, None, &devices).unwrap())
    }

    /// The one finding, which names all of `parts`.
    #[track_caller]
    fn assert_one(found: &[Finding], severity: Severity, parts: &[&str]) {
        let [finding] = found else { panic!("{found:?}") };
        assert_eq!(finding.severity, severity);
        for part in parts {
            assert!(finding.line.contains(part), "no {part}: {}", finding.line);
        }
    }

    #[test]
    fn nothing_is_found_where_nothing_is_wrong() {
        assert_eq!(judged(&facts(), &Machine::default(), &["--device", "cpu"]), []);
        let mut free = machine();
        free.gpus.iter_mut().for_each(|gpu| gpu.processes.clear());
        assert_eq!(judged(&facts(), &free, &[]), []);
    }

    #[test]
    fn who_holds_a_gpu_is_named_with_what_it_holds() {
        let found = judged(&facts(), &machine(), &["--num-shard", "1"]);
        assert_one(
            &found,
            Severity::Warning,
            &[
                "GPU GPU-0",
                "process 77 (python3)",
                "71680 of its 81920 MiB",
                "10240 MiB are free",
                "CUDA_VISIBLE_DEVICES",
            ],
        );
        assert_eq!(judged(&facts(), &machine(), &["--sharded", "true"]).len(), 2, "one for each rank's");
        assert_eq!(judged(&facts(), &machine(), &["--device", "cpu"]), [], "they are not used");
    }

    #[test]
    fn ranks_whose_gpus_are_apart_are_named_in_pairs() {
        let mut machine = machine();
        machine.gpus.push(Gpu { uuid: "GPU-2".to_owned(), ..machine.gpus[0].clone() });
        machine.gpus.iter_mut().for_each(|gpu| gpu.processes.clear());
        let cannot = |uuid: &str| Unreachable { uuid: uuid.to_owned(), why: "no way".to_owned() };
        machine.gpus[0].unreachable = vec![cannot("GPU-2")];
        machine.gpus[2].unreachable = vec![cannot("GPU-0"), cannot("GPU-1")];
        machine.gpus[1].unreachable = vec![cannot("GPU-2")];
        let found = judged(&facts(), &machine, &["--num-shard", "3"]);
        let parts = ["GPU-0 and GPU-2 (no way), GPU-1 and GPU-2 (no way);", "CUDA_VISIBLE_DEVICES"];
        assert_one(&found, Severity::Warning, &parts);
        assert_eq!(judged(&facts(), &machine, &["--num-shard", "2"]), [], "these two can");
        assert_eq!(judged(&facts(), &machine, &["--device", "cpu", "--num-shard", "3"]), []);
    }

    #[test]
    fn a_driver_that_is_too_old_is_an_error_on_a_gpu_only() {
        let mut old = machine();
        old.gpus.clear();
        old.driver = Some("535.54".to_owned());
        old.cuda_version = Some(12_020);
        let found = judged(&facts(), &old, &[]);
        assert_one(&found, Severity::Error, &["535.54", "12.2", "13.0", "driver 580"]);
        assert_eq!(judged(&facts(), &old, &["--device", "cpu"]), []);
    }

    #[test]
    fn limits_of_the_process_are_warnings_with_the_flag() {
        let few = Facts { open_files: Some(64), ..facts() };
        let found = judged(&few, &Machine::default(), &["--device", "cpu"]);
        assert_one(
            &found,
            Severity::Warning,
            &["64 files", "256", "--max-concurrent-requests", "--ulimit nofile=256"],
        );
        let words = ["--device", "cpu", "--num-shard", "2", "--threads", "3"];
        let found = judged(&facts(), &Machine::default(), &words);
        assert_one(&found, Severity::Warning, &["2 shard(s) x 3 thread(s) are 6", "4 core(s)", "--threads"]);
        let found = judged(&facts(), &Machine::default(), &["--device", "cpu", "--num-shard", "5"]);
        assert_one(&found, Severity::Warning, &["5 shard(s) x 1 thread(s)", "--num-shard"]);
        let slow = Facts { lacks_vectors: true, ..facts() };
        assert_one(&judged(&slow, &Machine::default(), &["--device", "cpu"]), Severity::Warning, &["AVX2"]);
    }

    #[test]
    fn what_cannot_be_written_or_bound_is_an_error_and_all_are_told() {
        let stuck = Facts {
            port: Some("port 3000 is in use; --port".to_owned()),
            cache: Some((PathBuf::from("/data/hub"), "Read-only file system".to_owned())),
            user: 1000,
            ..facts()
        };
        let long = format!("/tmp/{}", "x".repeat(110));
        let found = judged(&stuck, &Machine::default(), &["--device", "cpu", "--shard-uds-path", &long]);
        let expected: [&[&str]; 3] = [
            &["port 3000", "--port"],
            &[
                "user 1000",
                "/data/hub",
                "Read-only file system",
                "--huggingface-hub-cache",
                "launcher download",
            ],
            &["--shard-uds-path", "107", "shorten"],
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (finding, parts) in found.iter().zip(expected) {
            assert_one(std::slice::from_ref(finding), Severity::Error, parts);
        }
    }

    #[test]
    fn weights_larger_than_memory_are_refused_with_both_sizes() {
        let available = Available { bytes: 100 << 20, bound: "the container's memory limit" };
        compare(100 << 20, &available).unwrap();
        let reason = compare(270 << 20, &available).unwrap_err();
        assert!(
            reason.contains("270 MiB") && reason.contains("100 MiB") && reason.contains("limit"),
            "{reason}"
        );
    }
}
