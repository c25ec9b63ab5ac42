//! What the tests take from the environment.

use std::path::PathBuf;

/// Path of SmolLM2-135M-Instruct as GGUF: `QUARTET_TEST_SMOLLM2`, else where `make model` keeps it.
///
/// # Panics
/// When the file is not there: these tests are part of the suite, not optional.
#[allow(
    clippy::disallowed_methods,
    reason = "tests have no clap arguments; this is the one place that reads"
)]
pub fn smollm2() -> PathBuf {
    let path = std::env::var_os("QUARTET_TEST_SMOLLM2").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"));
        cache.join("quartet/SmolLM2-135M-Instruct.Q4_1.gguf")
    });
    assert!(
        path.is_file(),
        "{} is missing: run `make model` first, or set QUARTET_TEST_SMOLLM2",
        path.display()
    );
    path
}
