//! Compares a served model with reference outputs, through HTTP, on several numbers of ranks.
//!
//! ```text
//! check_http MODEL GOLDEN [float32|bfloat16] [RANKS...]
//! ```
//!
//! GOLDEN is a `.jsonl` or `.json` file as in the fixtures. Each prompt is asked alone and eight at a time, streamed
//! and not; ids must be equal up to the first near-tie and log-probabilities within the one tolerance table. Prompts
//! without a text are left out (and counted). One line a number of ranks; exit code 1 at the first difference.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use integration_tests::Server;
use integration_tests::conformance::check_server;
use integration_tests::golden::{BFLOAT16, Case, FLOAT32, cases};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = PathBuf::from(args.next().context("which model? See the head of this file")?);
    let golden = PathBuf::from(args.next().context("which reference outputs? See the head of this file")?);
    let tolerance = match args.next().as_deref() {
        Some("float32") => FLOAT32,
        Some("bfloat16") | None => BFLOAT16,
        Some(other) => bail!("{other} is no tolerance; known: float32, bfloat16"),
    };
    let mut ranks: Vec<String> = args.collect();
    if ranks.is_empty() {
        ranks = ["1", "2", "3"].map(String::from).to_vec();
    }
    let all = cases(&golden)?;
    let (asked, silent): (Vec<Case>, Vec<Case>) = all.into_iter().partition(|case| case.prompt.is_some());
    let steps: usize = asked.iter().map(|case| case.comparable(tolerance)).sum();
    for count in ranks {
        let server = Server::of(&model).args(["--num-shard", &count]).start()?;
        check_server(server.port(), &asked, tolerance).with_context(|| format!("{count} rank(s)"))?;
        writeln!(
            std::io::stdout(),
            "{count} rank(s): {} prompts ({} without text left out), {steps} steps: equal, alone and 8 at a time, \
             streamed and not; log-probabilities within {}",
            asked.len(),
            silent.len(),
            tolerance.logprob,
        )?;
    }
    Ok(())
}
