//! Symbolic links among a model's files. A directory from elsewhere could make any file of this machine a part of its
//! model; links that stay in the directory, and those of the Hub's caches into their blobs, are what they seem.

use std::path::Path;

use crate::error::HubError;
use crate::model_files::ModelFiles;

/// Files beside the weights that are read if they exist.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
];

/// Whether all files of a model belong to it.
///
/// # Errors
/// A link leads out of the model's directory.
pub(crate) fn check_links(files: &ModelFiles) -> Result<(), HubError> {
    let small_files = SMALL_FILES.iter().map(|name| files.root.join(name)).filter(|path| path.exists());
    files.weights.paths().iter().cloned().chain(small_files).try_for_each(|path| check_link(&path))
}

fn check_link(path: &Path) -> Result<(), HubError> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = directory.canonicalize().map_err(HubError::io("find", directory))?;
    let target = path.canonicalize().map_err(HubError::io("find", path))?;
    if target.starts_with(directory) || is_blob(&target) {
        return Ok(());
    }
    Err(HubError::format(
        path.display().to_string(),
        format!(
            "found a link to {:?}, outside of the model's directory, expected a file; put the file itself there",
            target.display().to_string()
        ),
    ))
}

/// Whether a path is where the Hub's caches keep files: `models--ORGANISATION--NAME/blobs/HASH`.
fn is_blob(path: &Path) -> bool {
    let name = |path: Option<&Path>| path?.file_name()?.to_str().map(str::to_owned);
    let blobs = path.parent();
    name(blobs).is_some_and(|name| name == "blobs")
        && name(blobs.and_then(Path::parent)).is_some_and(|name| name.starts_with("models--"))
}
