//! What must be there before the first process starts: the model's files, the final plan, a socket prefix.

use hub::{ModelFiles, ModelRef, ProgressOutput};
use nix::sys::signal::{SigHandler, Signal, signal};
use process::SignalStream;

use crate::args::{Args, DownloadArgs};
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
    let files = fetch(&model, &args.hub, args.log.json_output)?;
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

/// `launcher download`: the first phase of a start, alone. A signal ends it; what has come is kept.
///
/// # Errors
/// The model cannot be had, or a signal came first.
pub fn download(args: &DownloadArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::argument(format!("cannot start the event loop: {error}")))?;
    let outcome = runtime.block_on(download_or_stop(args.clone()));
    // A download that was told to stop must not hold us back.
    runtime.shutdown_background();
    outcome
}

async fn download_or_stop(args: DownloadArgs) -> Result<(), Failure> {
    // As process 1 of a container, nothing would stop us unless we listened.
    let mut signals =
        SignalStream::new().map_err(|error| Failure::argument(format!("cannot catch signals: {error}")))?;
    let model_id = args.model.or(args.model_id).unwrap_or_default();
    let model = ModelRef { model_id, revision: args.revision };
    let fetching = tokio::task::spawn_blocking(move || fetch(&model, &args.hub, args.log.json_output));
    tokio::select! {
        fetched = fetching => {
            let files = fetched.map_err(|error| Failure::new(LauncherError::DownloadError, error.to_string()))??;
            let commit = files.sha.as_deref().map_or(String::new(), |sha| format!(" at commit {sha}"));
            let (count, root) = (files.weights.paths().len(), files.root.display());
            tracing::info!("{} is complete{commit}: {count} weight file(s), {root}", files.model_id);
            Ok(())
        }
        signal = signals.next() => Err(Failure::new(
            LauncherError::DownloadError,
            format!("stopped by {signal}; what has come is kept, and the next download goes on there"),
        )),
    }
}

fn fetch(model: &ModelRef, hub: &hub::HubArgs, is_json: bool) -> Result<ModelFiles, Failure> {
    let mut options = hub.options();
    if is_json {
        options.download.progress = ProgressOutput::Structured;
    }
    survive_file_size_limit();
    hub::fetch(model, &options).map_err(unavailable)
}

fn unavailable(error: hub::HubError) -> Failure {
    Failure::new(LauncherError::DownloadError, error.to_string())
}

/// A file that reaches `ulimit -f` is to be an error with a name, not the end of this process.
fn survive_file_size_limit() {
    // SAFETY: an ignored signal runs no code of ours. A refusal leaves the system's default, which is what was before.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}
