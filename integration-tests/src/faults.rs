//! One fault in one phase of a server's life, and what is seen within ten seconds: nothing of it lives, or all of it is back.

use std::cell::RefCell;
use std::fmt;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::golden::fixture;
use crate::{Server, http, process_tree};

/// What is allowed.
const WITHIN: Duration = Duration::from_secs(10);
/// A phase of some milliseconds is missed now and then on a busy machine.
const ATTEMPTS: usize = 20;
/// Longer than any phase takes to begin.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who is hit, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of the launcher.
    KillLauncher,
    /// `kill -9` of the router.
    KillRouter,
    /// `kill -9` of the shard of this rank of two.
    KillShard(usize),
    /// `SIGSTOP` of the shard of this rank; `--stall-timeout` is 2.
    StopShard(usize),
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum During {
    /// The model is being fetched; only the launcher lives.
    Download,
    /// One shard has loaded, the other one is held in the middle of it.
    Load,
    /// The router warms the shards up, one of which is held.
    WarmUp,
    /// Eight streams run.
    Steady,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::KillLauncher => f.write_str("`kill -9` of the launcher"),
            Fault::KillRouter => f.write_str("`kill -9` of the router"),
            Fault::KillShard(rank) => write!(f, "`kill -9` of shard {rank}"),
            Fault::StopShard(rank) => write!(f, "`SIGSTOP` of shard {rank}"),
        }
    }
}

impl fmt::Display for During {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            During::Download => "download",
            During::Load => "load",
            During::WarmUp => "warm-up",
            During::Steady => "8 streams",
        })
    }
}

/// Every fault with every phase in which there is somebody to hit.
pub fn all() -> Vec<(Fault, During)> {
    let mut all = vec![(Fault::KillLauncher, During::Download)];
    for during in [During::Load, During::WarmUp, During::Steady] {
        let kills = [Fault::KillLauncher, Fault::KillRouter, Fault::KillShard(0), Fault::KillShard(1)];
        all.extend(kills.map(|fault| (fault, during)));
    }
    all.push((Fault::StopShard(0), During::Steady));
    all.push((Fault::StopShard(1), During::Steady));
    all
}

/// What became of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// No process of it lives. The launcher's exit code, unless it was the victim.
    Gone(Option<i32>),
    /// `/health` is 200, and there are a router and two shards without the victim.
    Back,
}

/// What was seen.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The end.
    pub end: End,
    /// From the fault to the end.
    pub after: Duration,
    /// Streams that ran, and how many of them did not reach their end.
    pub streams: (usize, usize),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = self.after.as_secs_f64();
        match self.end {
            End::Gone(Some(code)) => write!(f, "all gone after {after:.2} s, exit code {code}")?,
            End::Gone(None) => write!(f, "all gone after {after:.2} s")?,
            End::Back => write!(f, "all back after {after:.2} s")?,
        }
        match self.streams {
            (0, _) => Ok(()),
            (streams, lost) => write!(f, "; {lost} of {streams} streams lost"),
        }
    }
}

/// Does it and looks.
///
/// # Errors
/// The phase could not be met, or neither end came within ten seconds.
pub fn inject(fault: Fault, during: During) -> Result<Seen> {
    if during == During::Steady {
        return inject_while_streaming(fault);
    }
    for _ in 0..ATTEMPTS {
        if let Some(scene) = Scene::enter(during)? {
            let victim = victim(&scene.server, fault)?;
            let family = scene.server.family();
            let began = Instant::now();
            process_tree::send(victim, Signal::SIGKILL);
            // Only the phase was to be held, until the fault is seen: what is let go may be over with it at once.
            if fault != Fault::KillLauncher {
                let is_seen = || scene.server.log().contains("was ended by SIGKILL");
                wait_for(&scene.server, "a word on the death", is_seen)?;
            }
            scene.let_go();
            let (end, after) = wait_for_end(scene.server, victim, &family, began)?;
            return Ok(Seen { end, after, streams: (0, 0) });
        }
    }
    bail!("the phase {during} was missed {ATTEMPTS} times")
}

/// A server in the phase that is asked for.
struct Scene {
    server: Server,
    held: Option<i32>,
    /// A connection to a Hub that never answers, and a cache for what it will not send.
    _silence: Option<(TcpStream, TempDir)>,
}

impl Scene {
    /// `None`: the phase was over before it could be held.
    fn enter(during: During) -> Result<Option<Self>> {
        if during == During::Download {
            return Self::downloading().map(Some);
        }
        let server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).spawn()?;
        let (begun, over) =
            if during == During::Load { ("-> Starting", "-> Warming") } else { ("-> Warming", "-> Serving") };
        wait_for(&server, begun, || server.log().contains(begun))?;
        wait_for(&server, "two shards", || server.children("shard").len() == 2)?;
        let held = server.children("shard").into_iter().nth(1).context("no second shard")?;
        process_tree::send(held, Signal::SIGSTOP);
        // The first shard goes as far as it can without the other one.
        std::thread::sleep(Duration::from_millis(100));
        let is_over = server.log().contains(over);
        Ok((!is_over).then_some(Self { server, held: Some(held), _silence: None }))
    }

    fn downloading() -> Result<Self> {
        let (hub, cache) = (TcpListener::bind("127.0.0.1:0")?, tempfile::tempdir()?);
        let server = Server::of("org/model")
            .env("HF_HUB_OFFLINE", "0")
            .env("HF_ENDPOINT", format!("http://{}", hub.local_addr()?))
            .env("HUGGINGFACE_HUB_CACHE", cache.path().display().to_string())
            .spawn()?;
        // Once it has asked it waits for the answer.
        hub.set_nonblocking(true)?;
        let asked = RefCell::new(None);
        wait_for(&server, "a question to the Hub", || {
            *asked.borrow_mut() = hub.accept().ok();
            asked.borrow().is_some()
        })?;
        let connection = asked.into_inner().context("no connection")?.0;
        Ok(Self { server, held: None, _silence: Some((connection, cache)) })
    }

    fn let_go(&self) {
        if let Some(held) = self.held {
            process_tree::send(held, Signal::SIGCONT);
        }
    }
}

fn inject_while_streaming(fault: Fault) -> Result<Seen> {
    const STREAMS: usize = 8;
    let server =
        Server::of(fixture("tiny-llama")).args(["--num-shard", "2", "--stall-timeout", "2"]).start()?;
    let body = |seed: usize| json!({"inputs": "a", "parameters": {"max_new_tokens": 800, "do_sample": true, "seed": seed}});
    let mut streams = Vec::new();
    for seed in 0..STREAMS {
        let mut stream = http::stream(server.port(), "/generate_stream", &body(seed))?;
        stream.next().context("no first token")??;
        streams.push(stream);
    }
    std::thread::scope(|scope| {
        let is_lost = |stream: http::EventStream| match stream.collect_events() {
            Ok(events) => !events.last().is_some_and(|last| {
                last.contains("\"finish_reason\"") || last.contains("\"generated_text\":\"")
            }),
            Err(_) => true,
        };
        let readers: Vec<_> =
            streams.into_iter().map(|stream| scope.spawn(move || is_lost(stream))).collect();
        let victim = victim(&server, fault)?;
        let family = server.family();
        let began = Instant::now();
        let is_stop = matches!(fault, Fault::StopShard(_));
        process_tree::send(victim, if is_stop { Signal::SIGSTOP } else { Signal::SIGKILL });
        let lost = |readers: Vec<std::thread::ScopedJoinHandle<'_, bool>>| {
            readers.into_iter().filter_map(|reader| reader.join().ok()).filter(|is_lost| *is_lost).count()
        };
        // The server lives until its streams have ended.
        let (end, after, server) = watch(server, victim, &family, began)?;
        let lost = lost(readers);
        drop(server);
        Ok(Seen { end, after, streams: (STREAMS, lost) })
    })
}

fn victim(server: &Server, fault: Fault) -> Result<i32> {
    let (name, number) = match fault {
        Fault::KillLauncher => return Ok(server.pid()),
        Fault::KillRouter => ("router", 0),
        Fault::KillShard(rank) | Fault::StopShard(rank) => ("shard", rank),
    };
    server.children(name).into_iter().nth(number).context("there is nobody to hit")
}

fn wait_for(server: &Server, what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            bail!("never: {what}\n{}", server.log());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn wait_for_end(server: Server, victim: i32, family: &[i32], began: Instant) -> Result<(End, Duration)> {
    let (end, after, server) = watch(server, victim, family, began)?;
    drop(server);
    Ok((end, after))
}

/// `None` in place of the server: it has gone.
fn watch(
    mut server: Server,
    victim: i32,
    family: &[i32],
    began: Instant,
) -> Result<(End, Duration, Option<Server>)> {
    loop {
        if let Some(status) = server.try_wait()?
            && !family.iter().any(|&pid| process_tree::is_alive(pid))
        {
            let code = status.code().filter(|_| victim != server.pid());
            return Ok((End::Gone(code), began.elapsed(), None));
        }
        let shards = server.children("shard");
        let is_whole = shards.len() == 2 && server.children("router").len() == 1;
        if is_whole
            && !process_tree::is_alive(victim)
            && http::get(server.port(), "/ready").is_ok_and(|answer| answer.status == 200)
        {
            return Ok((End::Back, began.elapsed(), Some(server)));
        }
        if began.elapsed() > WITHIN {
            bail!("neither gone nor back after {WITHIN:?}:\n{}", server.log());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
