//! Looks at this machine and process for a launch.

use std::path::{Path, PathBuf};

use hub::ModelRef;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{AccessFlags, Uid, access};

use super::{Facts, check_port};
use crate::args::Args;
use crate::plan::LaunchPlan;

/// Gathers the facts. Takes a few milliseconds; asks no network.
pub fn look(args: &Args, plan: &LaunchPlan) -> Facts {
    Facts {
        port: check_port(plan.bind).err(),
        open_files: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, hard)| hard),
        cache: unwritable_cache(args),
        user: Uid::effective().as_raw(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        lacks_vectors: lacks_vectors(),
    }
}

/// Lets this process and its children open as many files as they may: a connection is one, and shells allow 1024.
pub fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!("the limit of open files stays at {soft}: {error}");
    }
}

/// Where a download would have to write and cannot; none when it can, or when there is nothing to download.
fn unwritable_cache(args: &Args) -> Option<(PathBuf, String)> {
    let options = args.hub.options();
    let model = ModelRef { model_id: args.model.model_id.clone(), revision: args.model.revision.clone() };
    let is_path = Path::new(&model.model_id).exists() || options.weights_cache_override.is_some();
    if is_path || options.offline || hub::locate(&model, &options).is_ok() {
        return None;
    }
    let why = unwritable(&options.cache_dir)?;
    Some((options.cache_dir, why))
}

/// Why nothing can be made in `dir`, or where it would be made.
fn unwritable(dir: &Path) -> Option<String> {
    let existing = dir.ancestors().find(|ancestor| ancestor.exists() && !ancestor.as_os_str().is_empty());
    let existing = existing.unwrap_or(Path::new("."));
    if !existing.is_dir() {
        return Some(format!("{} is no directory", existing.display()));
    }
    access(existing, AccessFlags::W_OK | AccessFlags::X_OK).err().map(|error| error.desc().to_owned())
}

fn lacks_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn cache_of(words: &[&str]) -> Option<(PathBuf, String)> {
        unwritable_cache(&Args::parse_from([&["launcher"], words].concat()))
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_found_where_it_is_needed_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let cache = file.join("hub").display().to_string();
        let words = ["--model-id", "org/model", "--huggingface-hub-cache", &cache];
        let (path, why) = cache_of(&words).unwrap();
        assert_eq!(path, Path::new(&cache));
        assert!(why.contains("file is no directory"), "{why}");
        assert_eq!(cache_of(&[&words[..], &["--hf-hub-offline", "1"]].concat()), None);
        let local = dir.path().display().to_string();
        assert_eq!(cache_of(&["--model-id", &local, "--huggingface-hub-cache", &cache]), None);
        let fresh = dir.path().join("a").join("b").display().to_string();
        assert_eq!(cache_of(&["--model-id", "org/model", "--huggingface-hub-cache", &fresh]), None);
    }

    #[test]
    fn a_directory_of_another_user_is_not_writable() {
        // The superuser may write everywhere.
        if !Uid::effective().is_root() {
            assert!(unwritable(Path::new("/")).is_some());
        }
        assert_eq!(unwritable(&std::env::temp_dir().join("not").join("there")), None);
    }

    #[test]
    fn as_many_files_as_are_allowed_can_be_opened() {
        raise_open_files();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert!(soft == hard && hard > 0);
    }
}
