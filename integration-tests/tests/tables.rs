//! The tables of `docs/reliability.md` say what the code does: the exit codes are those of the programs, and every test that
//! is named exists.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use process::ExitCode;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document() -> String {
    fs::read_to_string(root().join("docs/reliability.md")).unwrap()
}

/// The cells of the table below `heading`, without its head.
fn table(heading: &str) -> Vec<Vec<String>> {
    let document = document();
    let (_, section) = document.split_once(heading).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()).collect()
}

#[test]
fn the_exit_codes_are_those_of_the_programs() {
    let rows = table("\n## Exit codes");
    let codes: Vec<i32> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
    assert_eq!(codes, ExitCode::ALL.map(i32::from));
    let source = fs::read_to_string(root().join("process/src/exit_code.rs")).unwrap();
    for (row, code) in rows.iter().zip(ExitCode::ALL) {
        let helps = row[3].as_str();
        // The launcher's own code is nobody's child's.
        if code != ExitCode::RestartsSpent {
            assert_eq!(
                helps.starts_with("yes") || helps.starts_with("maybe"),
                code.is_restartable(),
                "{row:?}"
            );
        }
        let documented = format!("| {} | `{code:?}` |", row[0]);
        let line =
            source.lines().find(|line| line.contains(&documented)).unwrap_or_else(|| panic!("{row:?}"));
        assert!(line.ends_with(&format!("| {helps} |")), "{line} and {row:?}");
    }
}

/// Names of all functions in the sources below `folder`.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().to_string());
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            functions(&path, found);
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next());
            found.extend(names.map(str::to_string));
        }
    }
}

#[test]
fn every_test_that_is_named_exists() {
    let mut existing = BTreeSet::new();
    functions(&root(), &mut existing);
    let document = document();
    let named = document.split('`').skip(1).step_by(2).filter(|name| name.contains("::"));
    let mut count = 0;
    for name in named {
        let function = name.rsplit("::").next().unwrap();
        assert!(existing.contains(function), "{name} is nowhere");
        count += 1;
    }
    assert!(count > 20, "{count}");
}
