//! What must be there before the first process starts: the model's files, the final plan, a socket prefix.

use hub::ModelRef;

use crate::args::Args;
use crate::devices::{Device, Devices};
use crate::error::{Failure, LauncherError};
use crate::plan::{self, LaunchPlan};
use crate::preflight;
use crate::runtime_dir::RuntimeDir;

/// All that the children's commands need.
#[derive(Debug)]
pub struct Prepared {
    /// Made with the model's config.
    pub plan: LaunchPlan,
    /// Holds the lock on the socket prefix.
    pub runtime_dir: RuntimeDir,
}

/// Finds or fetches the model, plans, checks the memory, claims the sockets.
///
/// Blocks: milliseconds when the model is on this disk, else as long as the download takes.
///
/// # Errors
/// One line for each thing that is wrong, with what changes it.
pub fn prepare(args: &Args, devices: &Devices) -> Result<Prepared, Failure> {
    let model = ModelRef { model_id: args.model.model_id.clone(), revision: args.model.revision.clone() };
    let unavailable = |error: hub::HubError| Failure::new(LauncherError::DownloadError, error.to_string());
    let files = hub::fetch(&model, &args.hub.options()).map_err(unavailable)?;
    let config = files.config().map_err(unavailable)?;
    let plan = plan::plan(args, Some(&config), devices).map_err(Failure::all)?;
    for notice in &plan.notices {
        tracing::info!("{notice}");
    }
    if devices.device == Device::Cpu {
        preflight::check_memory(&files).map_err(Failure::argument)?;
    }
    let runtime_dir =
        RuntimeDir::claim(plan.uds_prefix.as_deref(), plan.shard.num_shard).map_err(Failure::argument)?;
    Ok(Prepared { plan, runtime_dir })
}
