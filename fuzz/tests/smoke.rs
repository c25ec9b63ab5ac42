//! Every target over its seeds and a fixed number of changes to them: what `make test` runs of the fuzzing.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuzz::mutation::Mutator;
use fuzz::{TARGETS, Target, check, scratch, seeds};

/// Of one input. The slowest take a tenth of a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the input that is being tried lies.
fn input_file(target: &Target) -> PathBuf {
    scratch::parent().join(format!("quartet-fuzz-input-{}", target.name))
}

/// Runs the target. The input is written down first: a stack overflow leaves no other trace of it.
fn run(target: &Target, what: &str, input: &[u8]) {
    let written = input_file(target);
    std::fs::write(&written, input).unwrap();
    let begin = Instant::now();
    let outcome = catch_unwind(|| check(target, input));
    assert!(outcome.is_ok(), "{} fails on {what}; the input is {}", target.name, written.display());
    let taken = begin.elapsed();
    assert!(taken < PATIENCE, "{} took {taken:?} on {what}; the input is {}", target.name, written.display());
}

/// All seeds of a target, and its number of changes to them.
fn smoke(name: &str) {
    // One at a time, since memory is counted for the whole process.
    static RUNNING: Mutex<()> = Mutex::new(());
    let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let seeds = seeds::of(target.name);
    for (name, seed) in &seeds {
        assert!(seed.len() <= target.max_len, "{name} is cut");
        run(target, name, seed);
    }
    let mut mutator = Mutator::new(20_261_124);
    for number in 0..target.mutations {
        let (name, seed) = &seeds[number % seeds.len()];
        let (_, other) = &seeds[(number / seeds.len()) % seeds.len()];
        let input = mutator.mutate(seed, other);
        run(target, &format!("change {number}, of {name}"), &input);
    }
    let _ = std::fs::remove_file(input_file(target));
}

macro_rules! smoke_tests {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*

        #[test]
        fn every_target_is_tested() {
            assert_eq!(TARGETS.each_ref().map(|target| target.name), [$(stringify!($name)),*]);
        }
    };
}

smoke_tests!(
    safetensors,
    index,
    gguf,
    pickle,
    pytorch,
    tokenizer,
    gguf_tokenizer,
    config,
    small_configs,
    chat_template,
    http_request,
    proto_message,
    engine
);
