//! Kills processes of a server at random while streams run, and says what the clients noticed.
//!
//! ```text
//! chaos [--rounds 200] [--streams 32] [--num-shard 2] [--pause-ms 4000] [--router-one-in 10] [--stop-one-in 20] [--seed 1]
//!       [--tokens 400] [--model DIR]
//! ```
//!
//! Each round waits up to `--pause-ms` (3 s a round on average make 200 rounds of about ten minutes), then kills one
//! process with SIGKILL: a shard, or, once in `--router-one-in` rounds, the router, whose streams are lost with it and
//! asked for again; once in `--stop-one-in` rounds a shard is stopped instead (`--stall-timeout` is 2 s). Every answer is
//! compared with the one of an undisturbed run; a token that differs is excused only where the distribution at that step, asked for
//! again when all is over, is a near-tie. Prints one JSON object; exits with 1 when anything else was noticed.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use integration_tests::Server;
use integration_tests::chaos::{self, Chaos, Report};
use integration_tests::golden::fixture;
use integration_tests::near_tie;
use integration_tests::workload::{requests, undisturbed};
use serde_json::json;

struct Options {
    chaos: Chaos,
    num_shard: usize,
    tokens: usize,
    model: PathBuf,
}

impl Options {
    fn from_args() -> Result<Self> {
        let chaos = Chaos {
            streams: 32,
            rounds: 200,
            longest_pause: Duration::from_millis(4000),
            router_one_in: 10,
            stop_one_in: 20,
            seed: 1,
        };
        let mut options = Self { chaos, num_shard: 2, tokens: 400, model: fixture("tiny-llama") };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args.next().with_context(|| format!("{flag} needs a value"))?;
            let chaos = &mut options.chaos;
            match flag.as_str() {
                "--rounds" => chaos.rounds = value.parse()?,
                "--streams" => chaos.streams = value.parse()?,
                "--num-shard" => options.num_shard = value.parse()?,
                "--pause-ms" => chaos.longest_pause = Duration::from_millis(value.parse()?),
                "--router-one-in" => chaos.router_one_in = value.parse()?,
                "--stop-one-in" => chaos.stop_one_in = value.parse()?,
                "--seed" => chaos.seed = value.parse()?,
                "--tokens" => options.tokens = value.parse()?,
                "--model" => options.model = value.into(),
                _ => bail!("unknown flag {flag}; the top of this example lists the flags"),
            }
        }
        Ok(options)
    }
}

/// The value below which a share of the sorted values lies.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied()
}

fn summary(report: &Report) -> serde_json::Value {
    let of = |sorted: &[f64]| json!({"p50": quantile(sorted, 0.5), "p99": quantile(sorted, 0.99), "max": sorted.last()});
    json!({
        "shard_kills": report.shard_kills,
        "shard_stops": report.shard_stops,
        "router_kills": report.router_kills,
        "answers_compared": report.answers,
        "near_ties_left_out": report.near_ties_left_out,
        "tokens": report.tokens,
        "near_ties_met": report.near_ties_met,
        "errors": report.errors,
        "streams_lost_with_router": report.lost_with_router,
        "stop_recovery_ms": of(&report.stop_recovery_ms),
        "shard_recovery_ms": of(&report.shard_recovery_ms),
        "router_recovery_ms": of(&report.router_recovery_ms),
        "longest_gap_ms": report.longest_gap_ms,
        "resources": report.resources,
        "blocks_left": report.blocks_left,
    })
}

fn main() -> Result<()> {
    let options = Options::from_args()?;
    let flags = ["--num-shard".to_string(), options.num_shard.to_string()];
    // Every kill is meant to be answered; the budget is not what is tested here.
    let unlimited = ["--max-restarts", "1000000", "--stall-timeout", "2"].map(str::to_string);
    let judged = ["--max-top-n-tokens".to_string(), near_tie::CHOICES.to_string()];
    let server = Server::of(&options.model).args(flags).args(unlimited).args(judged).start()?;
    let known = undisturbed(server.port(), requests(2 * options.chaos.streams, options.tokens))?;
    let report = chaos::run(&server, &options.chaos, &known)?;
    writeln!(std::io::stdout(), "{}", summary(&report))?;
    if !report.errors.is_empty() || report.blocks_left > 0 {
        bail!("{} errors, {} blocks left", report.errors.len(), report.blocks_left);
    }
    Ok(())
}
