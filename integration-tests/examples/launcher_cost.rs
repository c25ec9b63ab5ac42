//! What the launcher itself costs, how soon it decides, and how soon a router is back.
//!
//! ```text
//! launcher_cost [--idle-seconds 60] [--kills 20] [--num-shard 2]
//! ```
//!
//! Prints one JSON object: resident memory and the share of one core over the idle time; from the kill of a shard or of the
//! router to the line that says that the launcher recovers; from the kill of an idle shard or router to the answer of a
//! request that is sent again until it has one.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use integration_tests::golden::fixture;
use integration_tests::{Server, http, process_tree};
use nix::sys::signal::Signal;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let (mut idle_seconds, mut kills, mut num_shard) = (60, 20, "2".to_string());
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--idle-seconds" => idle_seconds = value.parse()?,
            "--kills" => kills = value.parse()?,
            "--num-shard" => num_shard = value,
            _ => bail!("unknown flag {flag}; the top of this example lists the flags"),
        }
    }
    let flags = ["--num-shard", &num_shard, "--max-restarts", "1000000"];
    let server = Server::of(fixture("tiny-llama")).args(flags).start()?;
    wait(|| server.log().contains("Start-up of the router"))?;

    let (began, before) = (Instant::now(), process_tree::cpu_seconds(server.pid()));
    std::thread::sleep(Duration::from_secs(idle_seconds));
    let used = process_tree::cpu_seconds(server.pid()) - before;
    let share = used / began.elapsed().as_secs_f64();
    let resident_kib = process_tree::resident_kib(server.pid());

    let mut decisions = Vec::new();
    let (mut shards, mut routers) = (Vec::new(), Vec::new());
    for kill in 0..kills {
        let name = if kill % 2 == 0 { "shard" } else { "router" };
        let (decided, back) = kill_one(&server, name)?;
        decisions.push(decided);
        if name == "shard" { shards.push(back) } else { routers.push(back) }
    }
    for times in [&mut decisions, &mut shards, &mut routers] {
        times.sort_by(f64::total_cmp);
    }
    let of = |sorted: &[f64]| json!({"p50": sorted.get(sorted.len() / 2), "max": sorted.last()});
    writeln!(
        std::io::stdout(),
        "{}",
        json!({
            "launcher_resident_kib": resident_kib,
            "launcher_core_percent_idle": share * 100.0,
            "decision_ms": of(&decisions),
            "answered_after_shard_ms": of(&shards),
            "answered_after_router_ms": of(&routers),
        })
    )?;
    Ok(())
}

/// Milliseconds from the kill until the launcher recovers, and until a request is answered.
fn kill_one(server: &Server, name: &str) -> Result<(f64, f64)> {
    let recoveries = || server.log().matches("Serving -> Recovering").count();
    let returns = || server.log().matches("Recovering -> Serving").count();
    let (begun, ended) = (recoveries(), returns());
    let victim = *server.children(name).first().context("no victim")?;
    let began = Instant::now();
    process_tree::send(victim, Signal::SIGKILL);
    wait(|| recoveries() > begun)?;
    let decided = began.elapsed();
    let request = json!({"inputs": "a", "parameters": {"max_new_tokens": 1}});
    wait(|| http::post(server.port(), "/generate", &request).is_ok_and(|answer| answer.status == 200))?;
    let back = began.elapsed();
    wait(|| returns() > ended)?;
    Ok((decided.as_secs_f64() * 1e3, back.as_secs_f64() * 1e3))
}

fn wait(condition: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            bail!("nothing happens");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
