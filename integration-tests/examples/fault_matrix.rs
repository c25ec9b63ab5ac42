//! Every fault in every phase of a server's life, one after another; prints the table of `docs/reliability.md`.
//!
//! ```text
//! fault_matrix
//! ```
//!
//! Exits with 1 when, ten seconds after a fault, some processes live and the service is not back.

use std::io::Write;

use anyhow::{Result, bail};
use integration_tests::faults;

fn main() -> Result<()> {
    let mut failures = 0;
    let mut out = std::io::stdout();
    writeln!(out, "| fault | while | what was seen |\n|---|---|---|")?;
    for (fault, during) in faults::all() {
        match faults::inject(fault, during) {
            Ok(seen) => writeln!(out, "| {fault} | {during} | {seen} |")?,
            Err(error) => {
                failures += 1;
                writeln!(out, "| {fault} | {during} | **{error:#}** |")?;
            }
        }
    }
    if failures > 0 {
        bail!("{failures} faults left something behind");
    }
    Ok(())
}
