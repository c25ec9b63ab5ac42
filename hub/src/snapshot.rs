//! Where a model's files are on this disk.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args::HubOptions;
use crate::bounded::MAX_INDEX_BYTES;
use crate::config::{read_object_of, shorten};
use crate::error::HubError;
use crate::links::check_links;
use crate::model_files::{ModelFiles, WeightFiles};
use crate::weight_choice::{
    EXPECTED_WEIGHTS, PYTORCH_INDEX, WeightFormat, WeightNames, choose_weights, is_gguf, missing_of_series,
    no_weights,
};

/// Which model is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelRef {
    /// A Hub id (`organisation/name`), a directory, or the path of a `.gguf` file. On the Hub, one GGUF file of
    /// several is chosen as `organisation/name/file.gguf`.
    pub model_id: String,
    /// A branch, tag or commit on the Hub; `None` = `main`.
    pub revision: Option<String>,
}

impl ModelRef {
    /// A model by id at its default revision.
    pub fn new(model_id: impl Into<String>) -> Self {
        Self { model_id: model_id.into(), revision: None }
    }

    pub(crate) fn revision(&self) -> &str {
        self.revision.as_deref().filter(|revision| !revision.is_empty()).unwrap_or("main")
    }

    pub(crate) fn missing(&self, missing: &str, looked_in: &Path, remedy: &str) -> HubError {
        HubError::Missing {
            model_id: self.model_id.clone(),
            missing: missing.to_owned(),
            looked_in: looked_in.to_owned(),
            remedy: remedy.to_owned(),
        }
    }
}

/// A model on the Hub: its repository and, when the id names one, a file of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubId {
    /// `organisation/name`, or `name` for a few old models.
    pub(crate) repository: String,
    /// A `.gguf` file in it.
    pub(crate) gguf: Option<String>,
}

impl HubId {
    /// Reads a model id that is no local path.
    pub(crate) fn parse(model_id: &str) -> Result<Self, HubError> {
        let invalid = || HubError::InvalidModelId { model_id: model_id.to_owned() };
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let parts: Vec<&str> = model_id.split('/').collect();
        // A part of dots only would leave the cache directory.
        if parts.iter().any(|part| part.chars().all(|c| c == '.') || !part.chars().all(legal)) {
            return Err(invalid());
        }
        match parts.as_slice() {
            [_] | [_, _] if !is_gguf(model_id) => Ok(Self { repository: model_id.to_owned(), gguf: None }),
            [organisation, name, file] if is_gguf(file) => {
                Ok(Self { repository: format!("{organisation}/{name}"), gguf: Some((*file).to_owned()) })
            }
            _ => Err(invalid()),
        }
    }

    /// The repository's folder in the cache.
    pub(crate) fn folder(&self, options: &HubOptions) -> PathBuf {
        options.cache_dir.join(format!("models--{}", self.repository.replace('/', "--")))
    }
}

/// What is on this disk already; zero network.
///
/// # Errors
/// The model is not there, not complete, or has its weights in a format that is not read.
pub fn locate(model: &ModelRef, options: &HubOptions) -> Result<ModelFiles, HubError> {
    locate_with(
        model,
        options,
        "check --model-id and --huggingface-hub-cache, or run `launcher download` first",
    )
}

/// [`locate`] with the remedy for a model that is not in the cache.
pub(crate) fn locate_with(
    model: &ModelRef,
    options: &HubOptions,
    remedy: &str,
) -> Result<ModelFiles, HubError> {
    let path = Path::new(&model.model_id);
    let files = if let Some(weights) = override_weights(model, options)? {
        locate_beside(model, options, weights, remedy)?
    } else if path.is_file() {
        // Named by the caller, wherever a link may lead.
        return from_file(model, path);
    } else if path.is_dir() {
        let weights = weights_in(model, path, None, "complete the directory or change --model-id")?;
        ModelFiles::new(&model.model_id, path, weights, None)
    } else {
        let id = HubId::parse(&model.model_id)?;
        let (root, sha) = cached_snapshot(model, &id, options, remedy)?;
        let weights = weights_in(model, &root, id.gguf.as_deref(), remedy)?;
        ModelFiles::new(&model.model_id, &root, weights, Some(sha))
    };
    check_links(&files)?;
    Ok(files)
}

/// The weights in the override directory; `None` without such a directory.
pub(crate) fn override_weights(
    model: &ModelRef,
    options: &HubOptions,
) -> Result<Option<WeightFiles>, HubError> {
    let Some(directory) = &options.weights_cache_override else { return Ok(None) };
    weights_in_flat(model, directory, None, "change --weights-cache-override").map(Some)
}

/// Given weights, together with the other files: from the weights' directory if it has them, else from where the
/// model is.
fn locate_beside(
    model: &ModelRef,
    options: &HubOptions,
    weights: WeightFiles,
    remedy: &str,
) -> Result<ModelFiles, HubError> {
    let flat = weights.paths().first().and_then(|path| path.parent()).unwrap_or(Path::new("."));
    if matches!(weights, WeightFiles::Gguf(_)) || flat.join("config.json").is_file() {
        return Ok(ModelFiles::new(&model.model_id, flat, weights.clone(), None));
    }
    let path = Path::new(&model.model_id);
    let (root, sha) = if path.is_dir() {
        (path.to_owned(), None)
    } else {
        let id = HubId::parse(&model.model_id)?;
        cached_snapshot(model, &id, options, remedy).map(|(root, sha)| (root, Some(sha)))?
    };
    if !root.join("config.json").is_file() {
        return Err(model.missing("config.json", &root, remedy));
    }
    Ok(ModelFiles::new(&model.model_id, &root, weights, sha))
}

fn from_file(model: &ModelRef, path: &Path) -> Result<ModelFiles, HubError> {
    if !is_gguf(&model.model_id) {
        return Err(HubError::UnsupportedWeights {
            model_id: model.model_id.clone(),
            found: "a file that is not .gguf".to_owned(),
            remedy: "give --model-id a directory, a .gguf file or a Hub id".to_owned(),
        });
    }
    let root = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(ModelFiles::new(&model.model_id, root, WeightFiles::Gguf(path.to_owned()), None))
}

/// The snapshot folder of the wanted revision in the shared cache, and its commit.
fn cached_snapshot(
    model: &ModelRef,
    id: &HubId,
    options: &HubOptions,
    remedy: &str,
) -> Result<(PathBuf, String), HubError> {
    let folder = id.folder(options);
    let revision = model.revision();
    if revision.split('/').any(|part| part.is_empty() || part.chars().all(|c| c == '.')) {
        return Err(HubError::format(
            "--revision",
            format!("found {revision:?}, expected a branch, tag or commit"),
        ));
    }
    // A commit names its snapshot itself; a branch is looked up.
    let commit = match std::fs::read_to_string(folder.join("refs").join(revision)) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => revision.to_owned(),
    };
    let root = folder.join("snapshots").join(&commit);
    if commit.contains('/') || !root.is_dir() {
        return Err(model.missing(&format!("revision {revision:?}"), &folder, remedy));
    }
    Ok((root, commit))
}

/// The weights in `root`, which must also hold what goes with them.
fn weights_in(
    model: &ModelRef,
    root: &Path,
    gguf: Option<&str>,
    remedy: &str,
) -> Result<WeightFiles, HubError> {
    let weights = weights_in_flat(model, root, gguf, remedy)?;
    if !matches!(weights, WeightFiles::Gguf(_)) && !root.join("config.json").is_file() {
        return Err(model.missing("config.json", root, remedy));
    }
    Ok(weights)
}

/// The weights in `root`, in the format that is preferred among those that are there.
fn weights_in_flat(
    model: &ModelRef,
    root: &Path,
    gguf: Option<&str>,
    remedy: &str,
) -> Result<WeightFiles, HubError> {
    let names = file_names(root)?;
    if let Some(file) = gguf {
        return match names.iter().any(|name| name == file) {
            true => Ok(WeightFiles::Gguf(root.join(file))),
            false => Err(model.missing(file, root, remedy)),
        };
    }
    let Some(choice) = choose_weights(model, &names, &root.display().to_string())? else {
        let weights = format!("a weight file ({EXPECTED_WEIGHTS})");
        return Err(no_weights(model, &names).unwrap_or_else(|| model.missing(&weights, root, remedy)));
    };
    let (wanted, series) = match choice.names {
        WeightNames::Indexed(index) => (files_of_index(&root.join(index))?, Vec::new()),
        // A download of another program may have stopped in between.
        WeightNames::Files(files) => {
            let series = missing_of_series(&files);
            (files, series)
        }
    };
    let missing: Vec<&String> =
        wanted.iter().filter(|name| names.binary_search(name).is_err()).chain(&series).collect();
    if !missing.is_empty() {
        return Err(model.missing(&list(&missing), root, remedy));
    }
    let mut paths: Vec<PathBuf> = wanted.iter().map(|name| root.join(name)).collect();
    match choice.format {
        WeightFormat::Safetensors => Ok(WeightFiles::Safetensors(paths)),
        WeightFormat::Pytorch => Ok(WeightFiles::Pytorch(paths)),
        // There is exactly one.
        WeightFormat::Gguf => Ok(WeightFiles::Gguf(paths.swap_remove(0))),
    }
}

/// The first few names, and how many more there are; escaped, since they come from a file.
fn list(names: &[&String]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(4)
        .map(|name| name.chars().take(100).flat_map(char::escape_debug).collect())
        .collect();
    let more = names.len() - shown.len();
    let more = if more == 0 { String::new() } else { format!(" and {more} more files") };
    format!("{}{more}", shown.join(", "))
}

/// Names of the files in a directory, sorted; links count as what they lead to.
fn file_names(root: &Path) -> Result<Vec<String>, HubError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).map_err(HubError::io("list", root))? {
        let entry = entry.map_err(HubError::io("list", root))?;
        if entry.path().is_file() {
            names.extend(entry.file_name().into_string().ok());
        }
    }
    names.sort();
    Ok(names)
}

/// The files an index refers to, sorted; at least one.
pub(crate) fn files_of_index(path: &Path) -> Result<Vec<String>, HubError> {
    let index = read_object_of(path, MAX_INDEX_BYTES)?;
    let suffix = if path.ends_with(PYTORCH_INDEX) { ".bin" } else { ".safetensors" };
    let wrong = |found: String| {
        HubError::format(
            format!("{}: weight_map", path.display()),
            format!("found {found}, expected names of files beside it that end in {suffix}"),
        )
    };
    let map =
        index.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("no object".to_owned()))?;
    let mut files = Vec::new();
    for file in map.values() {
        match file.as_str() {
            // A name with a slash could lead out of the model's directory.
            Some(name) if name.ends_with(suffix) && !name.contains('/') => files.push(name.to_owned()),
            _ => return Err(wrong(shorten(&file.to_string()))),
        }
    }
    if files.is_empty() {
        return Err(wrong("none".to_owned()));
    }
    files.sort();
    files.dedup();
    Ok(files)
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
