//! `docs/compatibility.md` says of every option what is true: its name, its variable, its default, and a test that exists.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use launcher::command_line;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cells of the rows of the first table, without back quotes, by flag.
fn rows() -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(root().join("docs/compatibility.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<String> =
            line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect();
        let name = cells[0].split(',').next().unwrap().to_owned();
        assert!(rows.insert(name, cells).is_none(), "twice: {line}");
    }
    rows
}

#[test]
fn every_option_has_its_row_with_variable_and_default() {
    let mut rows = rows();
    let command = command_line::command();
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let Some(long) = arg.get_long() else { continue };
        let row = rows.remove(&format!("--{long}")).unwrap_or_else(|| panic!("--{long} has no row"));
        let flag = match arg.get_short() {
            Some(short) => format!("--{long}, -{short}"),
            None => format!("--{long}"),
        };
        let variable = arg.get_env().map_or("–".to_owned(), |name| name.to_string_lossy().into_owned());
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let is_switch = !arg.get_action().takes_values();
        let default = if is_switch || defaults.is_empty() { "–".to_owned() } else { defaults.join(",") };
        assert_eq!(row[..3], [flag, variable, default], "--{long}: flag, variable and default");
        assert!(!row[3].is_empty(), "--{long} does not say what it does");
    }
    let hidden = |name: &String| {
        command.get_arguments().any(|arg| arg.is_hide_set() && arg.get_long() == name.strip_prefix("--"))
    };
    rows.retain(|name, _| !hidden(name));
    assert!(rows.is_empty(), "rows of no option: {:?}", rows.keys());
}

#[test]
fn every_named_test_exists() {
    let mut num_tests = 0;
    for (flag, row) in rows() {
        for named in row[4].split(", ") {
            let (path, name) = named.split_once("::").unwrap_or_else(|| panic!("{flag}: {named}"));
            let source = std::fs::read_to_string(root().join(path))
                .unwrap_or_else(|error| panic!("{flag}: {path}: {error}"));
            let function = format!("fn {name}(");
            let at = source.find(&function).unwrap_or_else(|| panic!("{flag}: no {name} in {path}"));
            let before: Vec<&str> = source[..at].lines().rev().take(4).collect();
            assert!(
                before.iter().any(|line| line.trim_start().starts_with("#[test")
                    || line.trim_start().starts_with("#[tokio::test")),
                "{flag}: {name} in {path} is no test"
            );
            num_tests += 1;
        }
        // That an option is handed on proves nothing about what it does there.
        let shows_effect = |named: &str| !named.starts_with("launcher/tests/command_golden.rs");
        assert!(row[4].split(", ").any(shows_effect), "{flag} is only shown to be handed on");
    }
    assert!(num_tests >= 54, "{num_tests}");
}
