//! `cargo xtask TASK`: the checks and chores that are code rather than scripts.

mod tidy;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask tidy    check the rules of ARCHITECTURE.md on the whole tree";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tidy"] => run_tidy(),
        [] => usage("no task given"),
        given => usage(&format!("unknown task `{}`", given.join(" "))),
    }
}

fn run_tidy() -> ExitCode {
    match tidy::check(repository_root()) {
        Ok(violations) => {
            let mut stdout = std::io::stdout().lock();
            for violation in &violations {
                // A reader that closed the pipe has seen enough; the exit code still tells the result.
                let _ = writeln!(stdout, "{violation}");
            }
            match violations.len() {
                0 => ExitCode::SUCCESS,
                count => {
                    eprintln!("tidy: {count} violations");
                    ExitCode::FAILURE
                }
            }
        }
        Err(error) => {
            eprintln!("tidy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(problem: &str) -> ExitCode {
    eprintln!("{problem}\n{USAGE}");
    ExitCode::from(2)
}

/// The folder above this crate: the task does the same from whatever folder it is called.
fn repository_root() -> &'static Path {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.parent().unwrap_or(manifest_dir)
}
