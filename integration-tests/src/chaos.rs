//! Kills processes of a server at random while streams run, and counts what clients notice.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::workload::{Answer, AskError, Known, ask};
use crate::{Server, http, near_tie, process_tree};

/// Longer than any recovery, on any machine.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(60);

/// Flat means: at every look.
const RESOURCES_EVERY: usize = 20;

/// How it is done.
#[derive(Debug, Clone)]
pub struct Chaos {
    /// Streams at any time.
    pub streams: usize,
    /// Kills.
    pub rounds: usize,
    /// Between a recovery and the next kill, at most.
    pub longest_pause: Duration,
    /// One of so many kills hits the router, whose streams are lost with it; 0: none.
    pub router_one_in: usize,
    /// One of so many kills of a shard stops it instead; 0: none. The server must have a short `--stall-timeout`.
    pub stop_one_in: usize,
    /// Of the random choices.
    pub seed: u64,
}

/// What was seen.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Shards killed.
    pub shard_kills: usize,
    /// Shards stopped.
    pub shard_stops: usize,
    /// Routers killed.
    pub router_kills: usize,
    /// Streams that were read to their end and compared.
    pub answers: usize,
    /// Requests that were not asked, see [`Known::near_ties`].
    pub near_ties_left_out: usize,
    /// Tokens of all streams.
    pub tokens: usize,
    /// Streams that ended otherwise, or said something else, with the reason.
    pub errors: Vec<String>,
    /// Streams that said something else than the known answer from a near-tie on, see [`near_tie::parts_answers`].
    pub near_ties_met: Vec<String>,
    #[serde(skip)]
    differences: Vec<Difference>,
    /// Streams that were lost with a router and asked for again.
    pub lost_with_router: usize,
    /// From the stop of a shard to `/health` 200, in milliseconds, sorted; `--stall-timeout` is most of it.
    pub stop_recovery_ms: Vec<f64>,
    /// From the kill of a shard to `/health` 200, in milliseconds, sorted.
    pub shard_recovery_ms: Vec<f64>,
    /// From the kill of the router to `/health` 200, in milliseconds, sorted.
    pub router_recovery_ms: Vec<f64>,
    /// The longest time that any stream waited for its next token, in milliseconds.
    pub longest_gap_ms: f64,
    /// Open file descriptors and resident memory in KiB of launcher and router, every 20 rounds and at the end.
    pub resources: Vec<Resources>,
    /// KV blocks held when all streams had ended, all ranks together.
    pub blocks_left: u64,
}

/// An answer that is not the known one.
#[derive(Debug)]
struct Difference {
    number: usize,
    answer: Answer,
    text: String,
}

/// What the long-lived processes hold.
#[derive(Debug, Serialize)]
pub struct Resources {
    /// After how many kills.
    pub after: usize,
    /// Of the launcher: file descriptors, KiB.
    pub launcher: (usize, u64),
    /// Of the router: likewise.
    pub router: (usize, u64),
}

/// Shared by the streams and by whoever kills.
#[derive(Default)]
struct Progress {
    is_over: AtomicBool,
    tokens: AtomicUsize,
    report: Mutex<Report>,
}

impl Progress {
    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Runs the known requests over and over on `server`, which must be ready, and compares the answers. It must have been started
/// with `--max-top-n-tokens` [`near_tie::CHOICES`].
///
/// # Errors
/// When the server does not recover.
pub fn run(server: &Server, chaos: &Chaos, known: &Known) -> Result<Report> {
    let progress = Progress::default();
    let outcome = std::thread::scope(|scope| {
        for stream in 0..chaos.streams {
            let progress = &progress;
            scope.spawn(move || keep_asking(server.port(), stream, known, progress));
        }
        let outcome = kill_again_and_again(server, chaos, &progress);
        progress.is_over.store(true, Ordering::Relaxed);
        outcome
    });
    outcome?;
    let mut report = std::mem::take(&mut *progress.report());
    report.tokens = progress.tokens.load(Ordering::Relaxed);
    report.shard_recovery_ms.sort_by(f64::total_cmp);
    report.stop_recovery_ms.sort_by(f64::total_cmp);
    report.router_recovery_ms.sort_by(f64::total_cmp);
    report.near_ties_left_out = known.near_ties;
    for Difference { number, answer, text } in std::mem::take(&mut report.differences) {
        let (request, undisturbed) = (&known.requests[number], &known.answers[number]);
        match near_tie::parts_answers(server.port(), request, &answer, undisturbed) {
            Ok(true) => report.near_ties_met.push(text),
            Ok(false) => report.errors.push(text),
            Err(error) => report.errors.push(format!("{text}; whether it is a near-tie: {error:#}")),
        }
    }
    report.blocks_left = server.blocks_used()?;
    Ok(report)
}

/// One client: a stream after the other. Each is finished, whatever happens.
fn keep_asking(port: u16, first: usize, known: &Known, progress: &Progress) {
    let Known { requests, answers: undisturbed, .. } = known;
    let mut number = first;
    while !progress.is_over.load(Ordering::Relaxed) {
        number = (number * 7 + 3) % requests.len();
        let answer = ask(port, &requests[number], || {
            progress.tokens.fetch_add(1, Ordering::Relaxed);
        });
        let mut report = progress.report();
        match answer {
            Ok(answer) => {
                report.answers += 1;
                report.longest_gap_ms = report.longest_gap_ms.max(answer.longest_gap.as_secs_f64() * 1e3);
                if let Err(difference) = answer.check(&undisturbed[number]) {
                    let text =
                        format!("request {number}, {}: {difference:#}", requests[number]["parameters"]);
                    // Judged when nothing is killed any more.
                    report.differences.push(Difference { number, answer, text });
                }
            }
            Err(AskError::Connection(_)) if report.router_kills > 0 => {
                report.lost_with_router += 1;
                drop(report);
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => report.errors.push(format!("request {number}: {error}")),
        }
        number += 1;
    }
}

fn kill_again_and_again(server: &Server, chaos: &Chaos, progress: &Progress) -> Result<()> {
    let mut lots = Lots(chaos.seed);
    for round in 0..chaos.rounds {
        let pause = lots.below(chaos.longest_pause.as_millis().max(1) as u64);
        std::thread::sleep(Duration::from_millis(pause));
        wait_for_tokens(progress)?;
        let hits_router = lots.once_in(chaos.router_one_in);
        let stops = !hits_router && lots.once_in(chaos.stop_one_in);
        let victims = server.children(if hits_router { "router" } else { "shard" });
        let victim = *victims.get(lots.below(victims.len().max(1) as u64) as usize).context("no victim")?;
        {
            // Counted before it is done: a client may see it at once.
            let mut report = progress.report();
            match (hits_router, stops) {
                (true, _) => report.router_kills += 1,
                (false, true) => report.shard_stops += 1,
                (false, false) => report.shard_kills += 1,
            }
        }
        let started = Instant::now();
        process_tree::send(victim, if stops { Signal::SIGSTOP } else { Signal::SIGKILL });
        wait_until_replaced(server, victim)?;
        let took = started.elapsed().as_secs_f64() * 1e3;
        let mut report = progress.report();
        match (hits_router, stops) {
            (true, _) => report.router_recovery_ms.push(took),
            (false, false) => report.shard_recovery_ms.push(took),
            (false, true) => report.stop_recovery_ms.push(took),
        }
        if round % RESOURCES_EVERY == 0 || round + 1 == chaos.rounds {
            report.resources.push(resources(server, round + 1)?);
        }
    }
    Ok(())
}

/// Kills shall hit running streams.
fn wait_for_tokens(progress: &Progress) -> Result<()> {
    let before = progress.tokens.load(Ordering::Relaxed);
    let deadline = Instant::now() + RECOVERY_DEADLINE;
    while progress.tokens.load(Ordering::Relaxed) <= before {
        if Instant::now() > deadline {
            bail!("no token for {RECOVERY_DEADLINE:?}; errors: {:?}", progress.report().errors);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The victim is gone, and `/health` says that somebody has taken its place.
fn wait_until_replaced(server: &Server, victim: i32) -> Result<()> {
    let deadline = Instant::now() + RECOVERY_DEADLINE;
    let is_there = || process_tree::is_alive(victim);
    let is_healthy = || http::get(server.port(), "/health").is_ok_and(|answer| answer.status == 200);
    while is_there() || !is_healthy() {
        if Instant::now() > deadline {
            bail!("not healthy {RECOVERY_DEADLINE:?} after process {victim} was hit:\n{}", server.log());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn resources(server: &Server, after: usize) -> Result<Resources> {
    let router = *server.children("router").first().context("no router")?;
    let of = |pid: i32| (process_tree::num_descriptors(pid), process_tree::resident_kib(pid));
    Ok(Resources { after, launcher: of(server.pid()), router: of(router) })
}

/// SplitMix64.
struct Lots(u64);

impl Lots {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn once_in(&mut self, times: usize) -> bool {
        times > 0 && self.below(times as u64) == 0
    }
}
