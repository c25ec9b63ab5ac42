//! The invariants of ARCHITECTURE.md as code. Every rule is a function from text to violations; this file reads the
//! tree and runs them all, so that one run shows every mistake.
//!
//! What clippy checks already is not repeated here: length and parameters of functions, `unwrap`, SAFETY comments,
//! `println!`, documented public items.

mod documents;
mod imports;
mod sizes;
mod text;

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// One broken rule at one place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    /// From the repository root.
    path: String,
    /// Counted from 1.
    line: usize,
    /// What is there; what is expected.
    message: String,
}

impl Violation {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_string(), line, message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.path, self.line, self.message)
    }
}

/// Checks every rule on the tree under `root`; sorted by path and line.
///
/// # Errors
/// When git or cargo cannot be run there, or a file cannot be read.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<Violation>> {
    let paths = list_files(root)?;
    let mut violations = Vec::new();
    for path in &paths {
        violations.extend(text::file_name(path));
        if !text::is_checked(path) {
            continue;
        }
        let content =
            std::fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))?;
        violations.extend(check_file(path, &content, &paths));
    }
    violations.extend(check_manifests(root)?);
    violations.sort();
    Ok(violations)
}

fn check_file(path: &str, content: &str, paths: &[String]) -> Vec<Violation> {
    let mut violations = text::markers(path, content);
    violations.extend(sizes::file_size(path, content));
    if path.ends_with(".rs") {
        violations.extend(text::header(path, content));
        let code = text::code_only(content);
        violations.extend(text::ignored_tests(path, &code));
        violations.extend(imports::confinements(path, &code));
    }
    if documents::is_checked(path) {
        violations.extend(documents::named_paths(path, content, paths));
        violations.extend(documents::links(path, content, paths));
    }
    violations
}

fn check_manifests(root: &Path) -> anyhow::Result<Vec<Violation>> {
    let metadata = output(root, "cargo", &["metadata", "--no-deps", "--format-version", "1", "--offline"])?;
    let packages = imports::parse_metadata(&metadata)?;
    let mut violations = Vec::new();
    for package in &packages {
        let absolute = Path::new(&package.manifest_path);
        let manifest = std::fs::read_to_string(absolute)
            .with_context(|| format!("cannot read {}", package.manifest_path))?;
        let relative = absolute.strip_prefix(root).unwrap_or(absolute).display().to_string();
        violations.extend(imports::directions(package, &packages, &relative, &manifest));
    }
    Ok(violations)
}

/// Every file that git tracks or would track: build outputs and caches are left out by .gitignore alone.
fn list_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let listing = output(root, "git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"])?;
    let mut paths: Vec<String> = listing
        .split('\0')
        .filter(|path| !path.is_empty() && root.join(path).is_file())
        .map(str::to_string)
        .collect();
    // A file in conflict is listed once a stage.
    paths.sort();
    paths.dedup();
    Ok(paths)
}

fn output(root: &Path, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let shown = format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .output()
        .with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` printed something that is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_prints_as_compilers_do() {
        let violation = Violation::new("router/src/lib.rs", 7, "found a; expected b");
        assert_eq!(violation.to_string(), "router/src/lib.rs:7: found a; expected b");
    }

    #[test]
    fn one_file_shows_all_its_mistakes_at_once() {
        let content = "use tokio::spawn;\n#[ignore]\nfn f() { std::env::var(\"A\"); }\n";
        let messages: Vec<String> =
            check_file("shard/src/engine/mod.rs", content, &[]).iter().map(Violation::to_string).collect();
        assert_eq!(messages.len(), 4, "{messages:#?}");
    }
}
