//! `launcher plan`: what serving with the same options would do, as text or JSON; nothing is started.

mod render;

use std::ffi::OsString;
use std::path::Path;

use hub::{ModelFiles, ModelRef};
use serde::Serialize;

use crate::args::Args;
use crate::command::{Invocation, ShardRuntime};
use crate::devices::{Device, Devices};
use crate::error::{Failure, LauncherError};
use crate::footprint::{self, CacheForecast, Footprint};
use crate::machine::Machine;
use crate::memory;
use crate::plan::{self, LaunchPlan};
use crate::preflight::{self, Finding};
use crate::runtime_dir::DEFAULT_PREFIX;

/// What is in place of a value that must not be shown.
const HIDDEN: &str = "***";

/// Variables whose values must not be shown.
const SECRETS: [&str; 2] = ["HF_TOKEN", "NGROK_AUTHTOKEN"];

/// Everything `launcher plan` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model.
    pub model: ModelReport,
    /// `cuda` or `cpu`.
    pub device: &'static str,
    /// Where the router will listen.
    pub listen: String,
    /// The shards' sockets without `-RANK`, unless another launcher has them when it comes to that.
    pub sockets: String,
    /// Devices, in the order of the ranks; empty on the CPU and where they are not known by name.
    pub devices: Vec<DeviceReport>,
    /// Memory and split; none where [`Report::unknown`] says why not.
    pub footprint: Option<Footprint>,
    /// Why there is no footprint.
    pub unknown: Option<String>,
    /// What a request and a batch may have.
    pub limits: Limits,
    /// What will be started.
    pub commands: Vec<CommandReport>,
    /// What would be logged.
    pub notices: Vec<String>,
    /// What stands in the way here and now.
    pub findings: Vec<Finding>,
}

/// The model on this disk.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// As asked for.
    pub id: String,
    /// The commit on the Hub.
    pub commit: Option<String>,
    /// Where its files are; none before they are on this disk.
    pub root: Option<String>,
    /// Weight files.
    pub files: usize,
    /// Their bytes.
    pub file_bytes: u64,
}

/// A rank's device.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// `CUDA_VISIBLE_DEVICES` of the rank.
    pub id: String,
    /// The product, where the driver tells.
    pub name: Option<String>,
    /// Bytes nobody holds, where the driver tells.
    pub free_bytes: Option<u64>,
}

/// Limits in tokens; none: what the shards measure when they warm up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Of a prompt.
    pub max_input_tokens: Option<u64>,
    /// Of a prompt and its answer.
    pub max_total_tokens: Option<u64>,
    /// Of the prompts of one step.
    pub max_batch_prefill_tokens: u64,
    /// Of all running requests.
    pub max_batch_total_tokens: Option<u64>,
}

/// A process.
#[derive(Clone, Debug, Serialize)]
pub struct CommandReport {
    /// `shard rank 0` or `router`.
    pub name: String,
    /// Its program.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables on top of the launcher's own.
    pub env: Vec<(String, String)>,
}

/// Plans as serving would, with what is on this disk; nothing is downloaded.
///
/// # Errors
/// As serving: every mistake in the options.
pub fn report(
    args: &Args,
    (machine, devices): (&Machine, &Devices),
    (shard_program, router_program): (&Path, &Path),
) -> Result<Report, Failure> {
    let model = ModelRef { model_id: args.model.model_id.clone(), revision: args.model.revision.clone() };
    let located = hub::locate(&model, &args.hub.options());
    let config = match &located {
        Ok(files) => Some(
            files.config().map_err(|error| Failure::new(LauncherError::DownloadError, error.to_string()))?,
        ),
        Err(_) => None,
    };
    let plan = plan::plan(args, config.as_ref(), devices).map_err(Failure::all)?;
    let prefix = plan.uds_prefix.clone().unwrap_or_else(|| DEFAULT_PREFIX.to_owned());
    let runtime = ShardRuntime {
        uds_prefix: prefix.clone(),
        instance_id: "chosen-at-start".to_owned(),
        lifeline_fd: None,
        logger_level: "INFO".to_owned(),
    };
    let prefill = plan.router.max_batch_prefill_tokens();
    let asked = match &located {
        Ok(_) => footprint::ask(
            shard_program,
            &plan.shard.command(0, &runtime),
            &free_bytes(devices, &plan),
            prefill,
        ),
        Err(error) => Err(error.to_string()),
    };
    let (footprint, unknown) = match asked {
        Ok(footprint) => (Some(footprint), None),
        Err(reason) => (None, Some(reason)),
    };
    let shards = (0..plan.shard.num_shard).map(|rank| {
        command(&format!("shard rank {rank}"), shard_program, plan.shard.command(rank, &runtime))
    });
    let router = command("router", router_program, plan.router.command(&prefix));
    let findings = preflight::findings(&preflight::look(args, &plan), machine, devices, &plan);
    Ok(Report {
        findings,
        model: model_report(args, located.as_ref().ok()),
        device: plan.shard.device.name(),
        listen: plan.bind.to_string(),
        devices: device_reports(devices, &plan),
        limits: limits(args, prefill, footprint.as_ref()),
        footprint,
        unknown,
        commands: shards.chain([router]).collect(),
        sockets: prefix,
        notices: plan.notices,
    })
}

impl Report {
    /// For people.
    pub fn to_text(&self) -> String {
        render::text(self)
    }
}

/// Free memory of each rank's device, or the processor's; empty where it is not known.
fn free_bytes(devices: &Devices, plan: &LaunchPlan) -> Vec<u64> {
    if plan.shard.device == Device::Cpu {
        return memory::available().map(|available| available.bytes).into_iter().collect();
    }
    let chosen = devices.visible.iter().take(plan.shard.num_shard);
    let free: Option<Vec<u64>> = chosen.map(|device| Some(device.gpu.as_ref()?.free_bytes)).collect();
    free.unwrap_or_default()
}

fn device_reports(devices: &Devices, plan: &LaunchPlan) -> Vec<DeviceReport> {
    let chosen = devices.visible.iter().take(plan.shard.num_shard);
    let report = |device: &crate::visible::VisibleDevice| DeviceReport {
        id: device.id.clone(),
        name: device.gpu.as_ref().map(|gpu| gpu.name.clone()),
        free_bytes: device.gpu.as_ref().map(|gpu| gpu.free_bytes),
    };
    chosen.map(report).collect()
}

fn model_report(args: &Args, files: Option<&ModelFiles>) -> ModelReport {
    let paths = files.map_or(&[][..], |files| files.weights.paths());
    let size = |path: &std::path::PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    ModelReport {
        id: args.model.model_id.clone(),
        commit: files.and_then(|files| files.sha.clone()),
        root: files.map(|files| files.root.display().to_string()),
        files: paths.len(),
        file_bytes: paths.iter().map(size).sum(),
    }
}

/// What was given, else what the footprint foretells: the smallest of the ranks.
fn limits(args: &Args, prefill: u32, footprint: Option<&Footprint>) -> Limits {
    let given = &args.limits;
    let forecasts = || {
        let ranks = footprint.iter().flat_map(|footprint| &footprint.ranks);
        ranks.filter_map(|rank| match rank.cache {
            Some(CacheForecast::Fits { total_tokens, max_total_tokens, max_input_tokens, .. }) => {
                Some([total_tokens, max_total_tokens, max_input_tokens])
            }
            _ => None,
        })
    };
    let least = |which: usize| forecasts().map(|forecast| forecast[which]).min();
    let wide = |limit: usize| u64::try_from(limit).unwrap_or(u64::MAX);
    Limits {
        max_input_tokens: given.max_input_tokens.or(given.max_input_length).map(wide).or_else(|| least(2)),
        max_total_tokens: given.max_total_tokens.map(wide).or_else(|| least(1)),
        max_batch_prefill_tokens: u64::from(prefill),
        max_batch_total_tokens: least(0).or(given.max_batch_total_tokens.map(u64::from)),
    }
}

fn command(name: &str, program: &Path, invocation: Invocation) -> CommandReport {
    let mut args = invocation.args;
    if let Some(key) = args.iter().position(|word| word == "--api-key").and_then(|at| args.get_mut(at + 1)) {
        HIDDEN.clone_into(key);
    }
    let shown = |(name, value): (&'static str, OsString)| {
        let value =
            if SECRETS.contains(&name) { HIDDEN.into() } else { value.to_string_lossy().into_owned() };
        (name.to_owned(), value)
    };
    CommandReport {
        name: name.to_owned(),
        program: program.display().to_string(),
        args,
        env: invocation.env.into_iter().map(shown).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let invocation = Invocation {
            args: ["--api-key", "hunter2", "--port", "1"].map(str::to_owned).to_vec(),
            env: vec![
                ("HF_TOKEN", "hunter3".into()),
                ("NGROK_AUTHTOKEN", "hunter4".into()),
                ("RANK", "0".into()),
            ],
            env_removed: Vec::new(),
        };
        let shown = format!("{:?}", command("router", Path::new("/bin/router"), invocation));
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.contains(r#""--api-key", "***", "--port", "1""#), "{shown}");
    }
}
