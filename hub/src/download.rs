//! Fetching a model from the Hub into the shared cache.
//!
//! A snapshot becomes visible only when it is complete: what [`locate`] asks for is fetched last, and the branch's
//! reference is moved after that. An interrupted download goes on where it stopped.

use std::collections::VecDeque;
use std::io::{ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::args::HubOptions;
use crate::download_plan::{DownloadPlan, small_files};
use crate::error::HubError;
use crate::model_files::{ModelFiles, WeightFiles};
use crate::snapshot::{HubId, ModelRef, files_of_index, locate, locate_with, override_weights};
use crate::weight_choice::WeightNames;

/// Files fetched at once: enough to fill a fast line, few enough to be polite.
const NUM_WORKERS: usize = 4;
/// How often a file is tried again after an error that may pass; upstream's number.
const NUM_TRIES: usize = 5;
/// How often another process's lock on a file is waited for; each time takes about five seconds.
const NUM_LOCK_WAITS: usize = 720;
/// The address the Hub's client uses when none is given, in words.
const PUBLIC_HUB: &str = "the public Hub";
const OFFLINE: &str = "nothing is downloaded because HF_HUB_OFFLINE is set: unset it, or put the file there";

/// [`locate`], else download: with bars on a terminal, else one log line per file.
///
/// # Errors
/// As [`locate`]; and the Hub does not answer, does not know the model, or sends damaged files.
pub fn fetch(model: &ModelRef, options: &HubOptions) -> Result<ModelFiles, HubError> {
    if options.offline {
        return locate_with(model, options, OFFLINE);
    }
    override_weights(model, options)?;
    let found = locate(model, options);
    let is_local = Path::new(&model.model_id).exists();
    match &found {
        Ok(files) if is_local || has_tokenizer(files) => return found,
        Ok(_) | Err(HubError::Missing { .. } | HubError::UnsupportedWeights { .. }) if !is_local => {}
        _ => return found,
    }
    let downloaded = Download::new(model, options).and_then(|download| download.run());
    match (downloaded, found) {
        (Ok(()), _) => locate(model, options),
        // Weights without a tokenizer are still worth having when the Hub cannot be reached.
        (Err(error), Ok(files)) => {
            tracing::warn!("using the model as it is in the cache: {error}");
            Ok(files)
        }
        (Err(error), Err(_)) => Err(error),
    }
}

fn has_tokenizer(files: &ModelFiles) -> bool {
    matches!(files.weights, WeightFiles::Gguf(_)) || files.root.join("tokenizer.json").is_file()
}

/// One model on its way into the cache.
struct Download<'a> {
    model: &'a ModelRef,
    options: &'a HubOptions,
    id: HubId,
    api: Api,
}

impl<'a> Download<'a> {
    fn new(model: &'a ModelRef, options: &'a HubOptions) -> Result<Self, HubError> {
        let id = HubId::parse(&model.model_id)?;
        let mut builder = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
            .with_token(options.token.as_ref().map(|token| token.reveal().to_owned()))
            // Its own retries begin a continued file from the start and append to what is there; ours do not.
            .with_retries(0)
            .with_progress(false);
        if !options.endpoint.is_empty() {
            builder = builder.with_endpoint(options.endpoint.clone());
        }
        let api = builder.build().map_err(|error| hub_error(options, "prepare a download", &error))?;
        Ok(Self { model, options, id, api })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.repository.clone(), RepoType::Model, revision.to_owned())
    }

    fn run(&self) -> Result<(), HubError> {
        let revision = self.model.revision();
        let info = retry(|| self.api.repo(self.repo(revision)).info()).map_err(|error| {
            let action = format!("list the files of {:?} at revision {revision:?}", self.id.repository);
            hub_error(self.options, &action, &error)
        })?;
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(HubError::format(
                "the Hub",
                format!("commit {:?}, expected hexadecimal digits", info.sha),
            ));
        }
        let mut names: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        names.sort();
        let place = format!("{} on {}", self.id.repository, endpoint_name(self.options));
        // From here on by commit, so that a push in between cannot mix two versions.
        let snapshot = Snapshot {
            api: &self.api,
            repo: self.api.repo(self.repo(&info.sha)),
            folder: self.id.folder(self.options).join("snapshots").join(&info.sha),
            options: self.options,
        };
        snapshot.fetch(self.files(&names, &place, &snapshot)?)?;
        Cache::new(self.options.cache_dir.clone())
            .repo(self.repo(revision))
            .create_ref(&info.sha)
            .map_err(HubError::io("write the reference of the revision in", &self.id.folder(self.options)))
    }

    /// The files to fetch. The one that makes a snapshot count as complete is the last.
    fn files(&self, names: &[String], place: &str, snapshot: &Snapshot<'_>) -> Result<Vec<String>, HubError> {
        let mut files = if self.options.weights_cache_override.is_some() {
            small_files(names)
        } else {
            let plan = DownloadPlan::new(self.model, &self.id, names, place)?;
            let weights = match plan.weights {
                WeightNames::Files(weights) => weights,
                WeightNames::Indexed(index) => {
                    snapshot.fetch(vec![index.to_owned()])?;
                    files_of_index(&snapshot.folder.join(index))?
                }
            };
            [weights, plan.small_files].concat()
        };
        files.sort_by_key(|name| name == "config.json");
        Ok(files)
    }
}

/// One commit of a repository, and its folder in the cache.
struct Snapshot<'a> {
    api: &'a Api,
    repo: ApiRepo,
    folder: PathBuf,
    options: &'a HubOptions,
}

impl Snapshot<'_> {
    /// Fetches what is not there yet: all but the last file in parallel, then the last.
    fn fetch(&self, mut files: Vec<String>) -> Result<(), HubError> {
        files.retain(|name| !self.folder.join(name).exists());
        let Some(last) = files.pop() else { return Ok(()) };
        let reporter = Reporter::new(files.len() + 1);
        let num_workers = NUM_WORKERS.min(files.len());
        let queue = Mutex::new(VecDeque::from(files));
        std::thread::scope(|scope| {
            let worker = || {
                loop {
                    // The lock is held to take a name only; a panic cannot happen there.
                    let next = queue.lock().map(|mut queue| queue.pop_front()).unwrap_or_default();
                    let Some(name) = next else { return Ok(()) };
                    if let Err(error) = self.fetch_one(&name, &reporter) {
                        // The other workers finish their file and find nothing more to do.
                        let _ = queue.lock().map(|mut queue| queue.clear());
                        return Err(error);
                    }
                }
            };
            let workers: Vec<_> = (0..num_workers).map(|_| scope.spawn(worker)).collect();
            // The Hub's client panics on some malformed answers.
            // All are joined before the first error is looked at: a scope panics when a thread it joins itself did.
            let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            results.into_iter().try_for_each(|result| result.unwrap_or_else(|_| Err(self.malformed())))
        })?;
        // In a thread too, for the same reason.
        let fetch_last = || self.fetch_one(&last, &reporter);
        std::thread::scope(|scope| scope.spawn(fetch_last).join()).unwrap_or_else(|_| Err(self.malformed()))
    }

    fn malformed(&self) -> HubError {
        HubError::Hub {
            action: "download".to_owned(),
            endpoint: endpoint_name(self.options).to_owned(),
            problem: "its answer is malformed".to_owned(),
            remedy: "check HF_ENDPOINT".to_owned(),
        }
    }

    fn fetch_one(&self, name: &str, reporter: &Reporter) -> Result<(), HubError> {
        let started = Instant::now();
        let failed = |error: &ApiError| hub_error(self.options, &format!("download {name:?}"), error);
        let pointer = self.folder.join(name);
        let mut discarded = false;
        let mut lock_waits = 0;
        // The loop goes on only after a wait for another process, or once after a damaged part was removed.
        let size = loop {
            let size = AtomicU64::new(0);
            let progress = || FileProgress { bar: reporter.bar(), size: &size };
            match retry(|| self.repo.download_with_progress(name, progress())) {
                Ok(_) => break size.into_inner(),
                Err(ApiError::LockAcquisition(_)) if lock_waits < NUM_LOCK_WAITS => {
                    if lock_waits == 0 {
                        tracing::info!("Waiting for another process that downloads {name}");
                    }
                    lock_waits += 1;
                    if pointer.exists() {
                        return Ok(());
                    }
                }
                Err(error) if !discarded && is_bad_part(&error) => {
                    self.discard_part(name).map_err(|error| failed(&error))?;
                    discarded = true;
                }
                Err(error) => return Err(failed(&error)),
            }
        };
        self.verify(name, size)?;
        reporter.finished(name, size, started.elapsed());
        Ok(())
    }

    /// Removes what an earlier attempt left of a file, when it can be neither continued nor used.
    fn discard_part(&self, name: &str) -> Result<(), ApiError> {
        let metadata = retry(|| self.api.metadata(&self.repo.url(name)))?;
        let part = self.folder.join("../../blobs").join(metadata.etag()).with_extension("part");
        std::fs::remove_file(part).map_err(ApiError::from)
    }

    /// Compares size and, where the Hub tells it, SHA-256 with what arrived; a damaged file is removed.
    fn verify(&self, name: &str, size: u64) -> Result<(), HubError> {
        let pointer = self.folder.join(name);
        let blob = pointer.canonicalize().map_err(HubError::io("find the downloaded", &pointer))?;
        let found = std::fs::metadata(&blob).map_err(HubError::io("read", &blob))?.len();
        let etag = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let has_sha256 = etag.len() == 64 && etag.chars().all(|c| c.is_ascii_hexdigit());
        let problem = if found != size {
            format!("{name} has {found} bytes, expected {size}")
        } else if has_sha256 && sha256_of(&blob)? != etag {
            format!("{name} does not have the SHA-256 {etag}")
        } else {
            return Ok(());
        };
        // When a removal fails, the next attempt meets the same file and says so again.
        let _ = std::fs::remove_file(&pointer);
        let _ = std::fs::remove_file(&blob);
        Err(HubError::Hub {
            action: format!("download {name:?}"),
            endpoint: endpoint_name(self.options).to_owned(),
            problem,
            remedy: "the damaged file was removed; try again".to_owned(),
        })
    }
}

fn sha256_of(path: &Path) -> Result<String, HubError> {
    let mut file = std::fs::File::open(path).map_err(HubError::io("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(HubError::io("read", path))? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Tries again, with growing pauses, while the error is one that may pass.
fn retry<T>(mut attempt: impl FnMut() -> Result<T, ApiError>) -> Result<T, ApiError> {
    for tried in 1..NUM_TRIES {
        match attempt() {
            Err(error) if may_pass(&error) => {
                tracing::debug!("the Hub failed, trying again: {error}");
                std::thread::sleep(Duration::from_millis(200 << tried));
            }
            result => return result,
        }
    }
    attempt()
}

/// Whether the same request may succeed later: the connection broke, or the server said it is busy.
fn may_pass(error: &ApiError) -> bool {
    match (error, status_of(error)) {
        (_, Some(status)) => status == 429 || status >= 500,
        (ApiError::RequestError(_), None) => true,
        // A broken body; a disk that refuses will go on refusing.
        (ApiError::IoError(error), None) => !matches!(
            error.kind(),
            ErrorKind::StorageFull
                | ErrorKind::QuotaExceeded
                | ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::NotFound
        ),
        _ => false,
    }
}

/// The HTTP status an error stands for. The client does not export its type, so its text is read.
fn status_of(error: &ApiError) -> Option<u16> {
    let text = error.to_string();
    let (_, rest) = text.split_once("http status: ")?;
    rest.get(..3)?.parse().ok()
}

/// Whether a part of the file from an earlier attempt is in the way: it is complete (416) or too long.
fn is_bad_part(error: &ApiError) -> bool {
    matches!(error, ApiError::InvalidResume) || status_of(error) == Some(416)
}

fn endpoint_name(options: &HubOptions) -> &str {
    if options.endpoint.is_empty() { PUBLIC_HUB } else { &options.endpoint }
}

fn hub_error(options: &HubOptions, action: &str, error: &ApiError) -> HubError {
    let remedy = match status_of(error) {
        // The Hub hides what it does not show: a missing repository answers 401 as well.
        Some(401 | 403) => {
            "the model does not exist or needs permission: check --model-id and --revision, \
             or set HF_TOKEN to a token that has access"
        }
        Some(404) => "check --model-id and --revision",
        _ => "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache",
    };
    HubError::Hub {
        action: action.to_owned(),
        endpoint: endpoint_name(options).to_owned(),
        problem: error.to_string(),
        remedy: remedy.to_owned(),
    }
}

/// Tells how the download goes: bars for a person, lines for a log.
struct Reporter {
    bars: Option<MultiProgress>,
    num_files: usize,
    num_finished: AtomicUsize,
}

impl Reporter {
    fn new(num_files: usize) -> Self {
        let bars = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { bars, num_files, num_finished: AtomicUsize::new(0) }
    }

    fn bar(&self) -> Option<ProgressBar> {
        self.bars.as_ref().map(|bars| bars.add(ProgressBar::new(0)))
    }

    fn finished(&self, name: &str, size: u64, elapsed: Duration) {
        let finished = self.num_finished.fetch_add(1, Ordering::Relaxed) + 1;
        if self.bars.is_none() {
            let (size, seconds, total) = (HumanBytes(size), elapsed.as_secs_f64(), self.num_files);
            tracing::info!("Downloaded {name} ({size}) in {seconds:.1} s [{finished}/{total}]");
        }
    }
}

/// Progress of one file; also remembers the size the Hub announced.
struct FileProgress<'a> {
    bar: Option<ProgressBar>,
    size: &'a AtomicU64,
}

impl Progress for FileProgress<'_> {
    /// Called before every attempt, so it also resets what an earlier one had counted.
    fn init(&mut self, size: usize, filename: &str) {
        self.size.store(size as u64, Ordering::Relaxed);
        let Some(bar) = &self.bar else { return };
        let template = "{msg:40} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_length(size as u64);
        bar.set_position(0);
        bar.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        if let Some(bar) = &self.bar {
            bar.inc(size as u64);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
