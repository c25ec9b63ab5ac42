//! The seeds of the targets.

use std::fs;
use std::path::{Path, PathBuf};

/// The seeds of a target with their names, sorted by name.
///
/// # Panics
/// There are none: a target without seeds tests nothing.
pub fn of(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = directory(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut seeds: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            Some((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).ok()?))
        })
        .collect();
    assert!(!seeds.is_empty(), "{} has no seeds", directory.display());
    seeds.sort();
    seeds
}

/// Where the seeds of a target lie.
pub fn directory(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target)
}
