//! Fetching a model from the Hub into the shared cache.
//!
//! Under a lock of the repository: the list of files ([`repository`]), the choice ([`plan`]), the transfer into blobs
//! ([`transfer`], [`part_file`]), the check of each ([`checksum`]), and last the names ([`cache`]). A snapshot becomes visible
//! only when it is complete: what [`locate`] asks for is named last, and the branch's reference is moved after that. An
//! interrupted download goes on where it stopped.

mod cache;
mod checksum;
mod client;
mod failure;
mod lock;
mod part_file;
mod plan;
mod progress;
mod repository;
mod transfer;

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
use nix::sys::statvfs::statvfs;

use crate::args::HubOptions;
use crate::error::HubError;
use crate::model_files::{ModelFiles, WeightFiles};
use crate::snapshot::{HubId, ModelRef, files_of_index, locate, locate_with, override_weights};
use crate::weight_choice::WeightNames;
use cache::RepositoryCache;
use client::Client;
use failure::Failure;
use plan::{DownloadPlan, small_files};
use progress::Reporter;
use repository::{Listing, ask_content, content_path};
use transfer::{FileFailure, Job, Transfer, WantedFile};

/// The Hub when no other is given, in words.
const PUBLIC_HUB: &str = "the public Hub";
const OFFLINE: &str = "nothing is downloaded because HF_HUB_OFFLINE is set: unset it, or put the file there";
/// How often a file is fetched that comes complete but damaged.
const MAX_ROUNDS: usize = 2;
/// Left free of what a file system says is free: it counts blocks, and others write too.
const SPARE_BYTES: u64 = 1 << 20;

/// [`locate`], else download: with bars on a terminal, else a log line a second.
///
/// # Errors
/// As [`locate`]; and the Hub does not answer, does not know the model, or sends damaged files; the disk is full.
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
    match (download(model, options), found) {
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

fn download(model: &ModelRef, options: &HubOptions) -> Result<(), HubError> {
    let id = HubId::parse(&model.model_id)?;
    let cache = RepositoryCache::open(&id, options)?;
    // Whoever had the lock was after the same most likely.
    if cache.has_waited() && locate(model, options).is_ok_and(|files| has_tokenizer(&files)) {
        return Ok(());
    }
    let revision = model.revision();
    let failed = |action: &str, failure| explain(model, &id, options, action, failure);
    let client = Client::new(options).map_err(|failure| failed("prepare a download", failure))?;
    let listing =
        persist(options, || Listing::fetch(&client, &id.repository, revision)).map_err(|failure| {
            failed(&format!("list the files of {:?} at revision {revision:?}", id.repository), failure)
        })?;
    // From here on by commit, so that a push in between cannot mix two versions.
    let download = Download { model, options, id: &id, cache: &cache, client: &client, listing: &listing };
    download.fetch(download.files()?)?;
    cache.write_ref(revision, &listing.commit)
}

/// One commit of a repository on its way into the cache.
struct Download<'a> {
    model: &'a ModelRef,
    options: &'a HubOptions,
    id: &'a HubId,
    cache: &'a RepositoryCache,
    client: &'a Client,
    listing: &'a Listing,
}

impl Download<'_> {
    /// The files to fetch. The one that makes a snapshot count as complete is the last.
    fn files(&self) -> Result<Vec<String>, HubError> {
        let names: Vec<String> = self.listing.files.iter().map(|file| file.name.clone()).collect();
        let mut files = if self.options.weights_cache_override.is_some() {
            small_files(&names)
        } else {
            let place = format!("{} on {}", self.id.repository, endpoint_name(self.options));
            let plan = DownloadPlan::new(self.model, self.id, &names, &place)?;
            let weights = match plan.weights {
                WeightNames::Files(weights) => weights,
                WeightNames::Indexed(index) => {
                    self.fetch(vec![index.to_owned()])?;
                    files_of_index(&self.cache.snapshot(&self.listing.commit).join(index))?
                }
            };
            [weights, plan.small_files].concat()
        };
        files.sort_by_key(|name| name == "config.json");
        Ok(files)
    }

    /// Fetches what is not there yet, and names all of it in this order.
    fn fetch(&self, names: Vec<String>) -> Result<(), HubError> {
        let snapshot = self.cache.snapshot(&self.listing.commit);
        let mut wanted = Vec::new();
        for name in &names {
            if let Some(file) = self.wanted(&snapshot, name)? {
                wanted.push(file);
            }
        }
        // Files of the same content are one blob.
        let mut blobs = HashSet::new();
        let is_missing = |file: &&WantedFile| !file.blob.exists() && blobs.insert(file.blob.clone());
        let mut left: Vec<WantedFile> = wanted.iter().filter(is_missing).cloned().collect();
        let reporter = Reporter::new(self.options.download.progress, &self.id.repository, left.len());
        for round in 1..=MAX_ROUNDS {
            let damaged = self.transfer(&left, &reporter)?;
            let Some(first) = damaged.first() else { break };
            let kind = first.content.checksum.kind();
            let problem = format!("{} does not have the {kind} that the Hub's list says", first.name);
            if round == MAX_ROUNDS {
                let action = format!("download {:?}", first.name);
                let failure = Failure::Wrong(format!("{problem}, though it was fetched {MAX_ROUNDS} times"));
                return Err(self.explain(&action, failure));
            }
            reporter.warn(&format!("{problem}; fetching it again"));
            left = damaged;
        }
        for file in &wanted {
            let linked = self.cache.link(&self.listing.commit, &file.name, &file.content.checksum);
            linked.map_err(HubError::io("link the downloaded file into", &snapshot))?;
        }
        Ok(())
    }

    /// What is to be fetched, or at least named, to have `name` in the snapshot; `None` when it is there.
    fn wanted(&self, snapshot: &Path, name: &str) -> Result<Option<WantedFile>, HubError> {
        let action = format!("download {name:?}");
        // The choice of files leaves such names out; this is the last place before they would be paths.
        if name.contains(['/', '\\', '\0']) || matches!(name, "" | "." | "..") {
            let problem = "found a name that leads out of the model's directory".to_owned();
            return Err(self.explain(&action, Failure::Wrong(problem)));
        }
        let listed = self.listing.files.iter().find(|file| file.name == name);
        let listed = listed.and_then(|file| file.content.clone());
        let pointer = snapshot.join(name);
        let size_here = |path: &Path| std::fs::metadata(path).ok().map(|metadata| metadata.len());
        if let Some(size) = size_here(&pointer) {
            if listed.as_ref().is_none_or(|content| content.size == size) {
                return Ok(None);
            }
            // Another program left it; ours names only what it has checked.
            tracing::warn!("{} has {size} bytes, which is wrong; fetching it again", pointer.display());
        }
        let url_path = content_path(&self.id.repository, &self.listing.commit, name);
        let mut content = match listed {
            Some(content) => content,
            None => persist(self.options, || ask_content(self.client, &url_path))
                .map_err(|failure| self.explain(&action, failure))?,
        };
        content.checksum = content.checksum.for_file(name);
        let blob = self.cache.blob(&content.checksum);
        if size_here(&blob).is_some_and(|size| size != content.size) {
            std::fs::remove_file(&blob).map_err(HubError::io("remove the damaged", &blob))?;
        }
        let part = self.cache.part(&content.checksum);
        Ok(Some(WantedFile { name: name.to_owned(), url_path, content, part, blob }))
    }

    /// Fetches `files`; returns those that came damaged.
    fn transfer(&self, files: &[WantedFile], reporter: &Reporter) -> Result<Vec<WantedFile>, HubError> {
        if files.is_empty() {
            return Ok(Vec::new());
        }
        let options = &self.options.download;
        let mut jobs = Vec::with_capacity(files.len());
        for file in files {
            jobs.push(Job::open(file, options).map_err(|error| self.disk_error(files, &jobs, error))?);
        }
        let needed = bytes_missing(files, &jobs);
        if let Some(free) =
            bytes_free(self.cache.folder()).filter(|free| free.saturating_sub(SPARE_BYTES) < needed)
        {
            return Err(self.no_space(needed, format!("{} are free", HumanBytes(free))));
        }
        let transfer = Transfer::new(self.client, options, reporter, &jobs);
        match transfer.run() {
            Ok(damaged) => Ok(damaged.into_iter().map(|index| files[index].clone()).collect()),
            Err(FileFailure { failure: Failure::Disk(error), .. }) => {
                Err(self.disk_error(files, &jobs, error))
            }
            Err(FileFailure { name, failure }) => Err(self.explain(&format!("download {name:?}"), failure)),
        }
    }

    fn disk_error(&self, files: &[WantedFile], jobs: &[Job<'_>], error: io::Error) -> HubError {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                self.no_space(bytes_missing(files, jobs), error.to_string())
            }
            _ => HubError::io("write to", self.cache.folder())(error),
        }
    }

    fn no_space(&self, needed: u64, reason: String) -> HubError {
        let path: PathBuf = self.cache.folder().to_owned();
        HubError::NoSpace { model_id: self.id.repository.clone(), path, needed, reason }
    }

    fn explain(&self, action: &str, failure: Failure) -> HubError {
        explain(self.model, self.id, self.options, action, failure)
    }
}

/// What is still to come of `files`; `jobs` are those of them that are open.
fn bytes_missing(files: &[WantedFile], jobs: &[Job<'_>]) -> u64 {
    let total: u64 = files.iter().map(|file| file.content.size).sum();
    total - jobs.iter().map(Job::num_done).sum::<u64>()
}

/// What this user may still write there; `None` when the system does not say.
fn bytes_free(folder: &Path) -> Option<u64> {
    let stat = statvfs(folder).ok()?;
    (stat.blocks() > 0).then(|| stat.blocks_available() * stat.fragment_size())
}

/// Tries again, with growing pauses, while the failure is one that may pass.
fn persist<T>(options: &HubOptions, attempt: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut num_tries = 0;
    loop {
        let failure = match attempt() {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        num_tries += 1;
        let Some(pause) = failure.pause(num_tries, options.download.first_pause) else { return Err(failure) };
        let seconds = pause.as_secs_f64();
        tracing::warn!("{}: {failure}; trying again in {seconds:.1} s", endpoint_name(options));
        std::thread::sleep(pause);
    }
}

fn endpoint_name(options: &HubOptions) -> &str {
    if options.endpoint.is_empty() { PUBLIC_HUB } else { &options.endpoint }
}

/// The failure in one line, with what changes it.
fn explain(model: &ModelRef, id: &HubId, options: &HubOptions, action: &str, failure: Failure) -> HubError {
    HubError::Hub {
        action: action.to_owned(),
        endpoint: endpoint_name(options).to_owned(),
        problem: failure.to_string(),
        remedy: remedy(model, id, options, &failure),
    }
}

fn remedy(model: &ModelRef, id: &HubId, options: &HubOptions, failure: &Failure) -> String {
    let has_token = options.token.is_some();
    match failure {
        Failure::Status { code, .. } if code == "GatedRepo" => {
            let address =
                if options.endpoint.is_empty() { "https://huggingface.co" } else { &options.endpoint };
            format!(
                "the model is gated: accept its licence at {address}/{}, and set HF_TOKEN to a token of the account that \
                 did{}",
                id.repository,
                if has_token { " (the one that was sent has no access)" } else { "" }
            )
        }
        Failure::Status { code, .. } if code == "RevisionNotFound" => {
            format!("the model has no revision {:?}: check --revision", model.revision())
        }
        // The Hub hides what it does not show: a missing repository answers 401 as well.
        Failure::Status { status: 401 | 403, .. } => format!(
            "the model does not exist or needs permission: check --model-id and --revision, or set HF_TOKEN to a token that \
             has access{}",
            if has_token { " (the one that was sent has none)" } else { "" }
        ),
        Failure::Status { status: 404, .. } => "check --model-id and --revision".to_owned(),
        Failure::Status { status: 429, .. } => {
            "the Hub limits requests: try later, or set HF_TOKEN, which raises the limit".to_owned()
        }
        Failure::Wrong(_) => "check HF_ENDPOINT and --revision, and try again".to_owned(),
        _ => "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests;
