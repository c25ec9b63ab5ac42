//! libFuzzer's program. Which target it runs is the name it is called by: `fuzz/run.py` makes a link for each.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use fuzz::{TARGETS, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let program = std::env::args().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().to_string_lossy();
    let names = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
    let target = TARGETS.iter().find(|target| target.name == name);
    target.unwrap_or_else(|| panic!("called by the name {name:?}, expected one of {}", names()))
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::check(&TARGET, input));
