//! A directory for the files that a target makes of its input.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Where temporary files go: into memory, where the system has a file system there.
pub fn parent() -> PathBuf {
    let shared_memory = PathBuf::from("/dev/shm");
    if shared_memory.is_dir() { shared_memory } else { std::env::temp_dir() }
}

/// A directory that goes when this does.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
}

impl Scratch {
    /// A new directory with `files` in it.
    ///
    /// # Panics
    /// There is no place for it.
    pub fn with(files: &[(&str, &[u8])]) -> Self {
        let directory = tempfile::Builder::new().prefix("quartet-fuzz-").tempdir_in(parent());
        let scratch = Self { directory: directory.expect("a place for temporary files") };
        files.iter().for_each(|(name, bytes)| scratch.write(name, bytes));
        scratch
    }

    /// Puts a file into it.
    ///
    /// # Panics
    /// The disk is full.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path().join(name), bytes).expect("room for a temporary file");
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where a file in it is.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}
