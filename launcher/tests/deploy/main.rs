//! What is under `deploy/`, and the Dockerfile: typed, and against the programs they start.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

mod image;
mod manifests;

use std::path::{Path, PathBuf};

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}
