//! The launcher's one event loop: it feeds what happens to the state machine and does what that answers.

mod machine;
mod restarts;

use std::collections::{HashMap, HashSet};
use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use process::SignalStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::args::Args;
use crate::child::{self, Exit, Handle};
use crate::command::ShardRuntime;
use crate::devices::Devices;
use crate::error::{Failure, LauncherError};
use crate::liveness;
use crate::orphans;
use crate::readiness;
use crate::router_http;
use crate::startup_ledger::{Phase as StartupPhase, RankStart, StartupLedger, listed};
use crate::status::{RankStatus, RestartStatus, RouterStatus, Status};
use crate::status_socket::{self, StatusSocket};
use crate::weights::{Prepared, prepare};

pub use machine::{Action, ChildId, Death, Event, Grace, Phase, State, transition};
pub use restarts::{RestartPolicy, Restarts};

/// A child without requests has nothing to finish: it frees its memory and ends. A longer wait would only delay the
/// restart that somebody is waiting for.
const IDLE_GRACE: Duration = Duration::from_secs(5);

/// Between a rank's end and what its peers make of it there are milliseconds; this is ample, and short against a restart.
const CAUSE_SHOWS_WITHIN: Duration = Duration::from_millis(500);

/// For its ledger, which is only printed.
const ROUTER_ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// What the supervisor is started with.
#[derive(Debug)]
pub struct Launch {
    /// As parsed.
    pub args: Args,
    /// As chosen.
    pub devices: Devices,
    /// The shards' program.
    pub shard_program: PathBuf,
    /// The router's program.
    pub router_program: PathBuf,
    /// Level of the shards' logs, in capitals.
    pub logger_level: String,
    /// Started when the process did.
    pub ledger: StartupLedger,
}

/// What the event loop is told by tasks of its own.
#[derive(Debug)]
enum Told {
    /// As it is.
    Event(Event),
    /// [`Event::ShardReady`], and how it came to be.
    ShardReady { attempt: u32, rank: usize, start: RankStart },
}

/// Starts everything, serves until it is asked to stop or children die too often, and ends everything.
///
/// Must run on the main thread in a current-thread runtime, because children are tied to the thread that starts them.
///
/// # Errors
/// Why the service ended, unless it was asked to.
pub async fn supervise(launch: Launch) -> Result<(), Failure> {
    let uncaught = |error| Failure::argument(format!("cannot catch signals: {error}"));
    let mut signals = SignalStream::new().map_err(uncaught)?;
    let mut children_end = signal(SignalKind::child()).map_err(uncaught)?;
    orphans::adopt();
    let (events, mut happened) = mpsc::unbounded_channel();
    let (exits, mut exited) = mpsc::unbounded_channel();
    let (ask, mut asked) = mpsc::channel(1);
    let _status_socket = open_status_socket(&launch.args, ask);
    let mut preparing = {
        let (args, devices) = (launch.args.clone(), launch.devices.clone());
        tokio::task::spawn_blocking(move || prepare(&args, &devices))
    };
    let mut state = State::new(restart_policy(&launch.args));
    let mut supervisor = Supervisor::new(launch, events, exits);
    while state.phase != Phase::Exited {
        let event = tokio::select! {
            // A child's end outranks what it may have reported before.
            biased;
            signal = signals.next() => {
                tracing::info!("{signal} received{}", supervisor.what_a_stop_means(state.phase));
                Event::Stop(signal)
            }
            Some(exit) = exited.recv() => supervisor.note_exit(exit),
            prepared = &mut preparing, if supervisor.is_preparing => supervisor.note_prepared(prepared),
            Some(told) = happened.recv() => supervisor.note(told),
            Some(request) = asked.recv() => {
                // Whoever asked may have gone.
                let _ = request.send(supervisor.status(&state));
                continue;
            }
            Some(()) = children_end.recv() => {
                orphans::reap(&supervisor.process_ids());
                continue;
            }
        };
        let before = state.phase;
        tracing::debug!("{before:?}: {event:?}");
        let (after, actions) = transition(state, event, supervisor.started.elapsed());
        state = after;
        if state.phase != before {
            tracing::info!("{before:?} -> {:?}", state.phase);
            supervisor.note_phase(state.phase);
        }
        supervisor.act(actions);
    }
    state.outcome
}

fn restart_policy(args: &Args) -> RestartPolicy {
    RestartPolicy {
        max_restarts: args.recovery.max_restarts,
        window: Duration::from_secs(args.recovery.restart_window),
    }
}

/// A service that cannot be asked for its state serves all the same.
fn open_status_socket(args: &Args, ask: mpsc::Sender<status_socket::StatusRequest>) -> Option<StatusSocket> {
    let directory = args.hidden.status_dir.clone().unwrap_or_else(status_socket::default_directory);
    StatusSocket::open(&directory, ask)
        .inspect_err(|error| {
            tracing::warn!(
                "`launcher status` will not find this launcher: {} cannot be used: {error}",
                directory.display()
            );
        })
        .ok()
}

/// The part of the supervisor that touches the world.
struct Supervisor {
    launch: Launch,
    events: mpsc::UnboundedSender<Told>,
    exits: mpsc::UnboundedSender<Exit>,
    started: Instant,
    phase_since: Instant,
    is_preparing: bool,
    prepared: Option<Prepared>,
    /// The read end is inherited by every shard; its end-of-file means that this process is gone.
    lifeline: Option<(PipeReader, PipeWriter)>,
    children: HashMap<ChildId, Handle>,
    probes: Vec<JoinHandle<()>>,
    /// Looks whether the shards make progress.
    watch: Option<JoinHandle<()>>,
    recovering_since: Option<Instant>,
}

impl Supervisor {
    fn new(launch: Launch, events: mpsc::UnboundedSender<Told>, exits: mpsc::UnboundedSender<Exit>) -> Self {
        let now = Instant::now();
        Self {
            launch,
            events,
            exits,
            started: now,
            phase_since: now,
            is_preparing: true,
            prepared: None,
            lifeline: None,
            children: HashMap::new(),
            probes: Vec::new(),
            watch: None,
            recovering_since: None,
        }
    }

    fn note_phase(&mut self, phase: Phase) {
        self.phase_since = Instant::now();
        if phase == Phase::Recovering {
            self.recovering_since.get_or_insert_with(Instant::now);
        }
    }

    /// Keeps what the state machine needs not know.
    fn note(&mut self, told: Told) -> Event {
        match told {
            Told::Event(event) => {
                if let Event::Stalled { reason, .. } = &event {
                    tracing::error!("{reason}");
                }
                event
            }
            Told::ShardReady { attempt, rank, start } => {
                self.launch.ledger.note_rank(rank, &start);
                Event::ShardReady { attempt, rank }
            }
        }
    }

    fn process_ids(&self) -> HashSet<u32> {
        self.children.values().filter_map(|child| child.pid).collect()
    }

    /// What is known here; the children are asked for the rest elsewhere.
    fn status(&self, state: &State) -> Status {
        let (used, policy) = state.restarts_used(self.started.elapsed());
        let plan = self.prepared.as_ref().map(|prepared| &prepared.plan);
        let rank_of = |(child, handle): (&ChildId, &Handle)| match child {
            ChildId::Router => None,
            ChildId::Shard(rank) => Some(RankStatus {
                rank: *rank,
                pid: handle.pid,
                uptime_seconds: handle.started.elapsed().as_secs_f64(),
                steps_started: None,
                steps_finished: None,
                blocks_total: None,
                blocks_used: None,
            }),
        };
        let mut ranks: Vec<RankStatus> = self.children.iter().filter_map(rank_of).collect();
        ranks.sort_by_key(|shard| shard.rank);
        let router = plan.zip(self.children.get(&ChildId::Router)).map(|(plan, handle)| RouterStatus {
            pid: handle.pid,
            uptime_seconds: handle.started.elapsed().as_secs_f64(),
            address: plan.bind,
            requests_in_flight: None,
            requests_queued: None,
        });
        Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            phase: format!("{:?}", state.phase),
            phase_seconds: self.phase_since.elapsed().as_secs_f64(),
            model_id: self.launch.args.model.model_id.clone(),
            device: plan.map(|plan| plan.shard.device.name().to_owned()),
            socket_prefix: self.prepared.as_ref().map(|prepared| prepared.runtime_dir.prefix().to_owned()),
            restarts: RestartStatus {
                used,
                max: policy.max_restarts,
                window_seconds: policy.window.as_secs(),
            },
            router,
            ranks,
        }
    }

    fn note_prepared(
        &mut self,
        prepared: Result<Result<Prepared, Failure>, tokio::task::JoinError>,
    ) -> Event {
        self.is_preparing = false;
        self.launch.ledger.end_phase("model files and plan", Instant::now());
        match prepared {
            Ok(Ok(prepared)) => {
                let num_shard = prepared.plan.shard.num_shard;
                self.prepared = Some(prepared);
                Event::Prepared { num_shard }
            }
            Ok(Err(failure)) => Event::PrepareFailed(failure),
            Err(panic) => Event::PrepareFailed(Failure::new(LauncherError::DownloadError, panic.to_string())),
        }
    }

    /// Logs how a child ended; a death that nobody asked for with its last words.
    fn note_exit(&mut self, exit: Exit) -> Event {
        self.children.remove(&exit.child);
        // Its end may have hidden an orphan's.
        orphans::reap(&self.process_ids());
        if exit.is_orderly {
            tracing::info!("{} terminated", exit.child);
        } else {
            let report = exit.report();
            match exit.child {
                ChildId::Shard(rank) => tracing::error!(rank, "{report}"),
                ChildId::Router => tracing::error!("{report}"),
            }
        }
        Event::Ended { child: exit.child, reason: exit.in_one_line(), death: exit.death }
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::SpawnShards { attempt } => self.spawn_shards(attempt),
                Action::PrepareRouter => self.start_router(true),
                Action::ReleaseRouter { attempt } => self.release_router(attempt),
                Action::SpawnRouter { attempt } => self.spawn_router(attempt),
                Action::AwaitRouter { attempt } => self.await_router(attempt),
                Action::Announce => self.announce(),
                Action::AnnounceRecovery => self.announce_recovery(),
                Action::Backoff { attempt, wait } => {
                    tracing::info!("Starting again in {:.2} s", wait.as_secs_f64());
                    self.send_after(wait, Event::BackoffOver { attempt });
                }
                Action::AwaitCause => self.send_after(CAUSE_SHOWS_WITHIN, Event::CauseOverdue),
                Action::GiveUp => {
                    if let Some(router) = self.children.get(&ChildId::Router) {
                        router.give_up();
                    }
                }
                Action::Terminate(child, grace) => self.terminate(child, grace),
                Action::Kill(child) => {
                    if let Some(handle) = self.children.get(&child) {
                        handle.kill();
                    }
                }
            }
        }
    }

    fn spawn_shards(&mut self, attempt: u32) {
        self.abort_probes();
        if self.lifeline.is_none() {
            match std::io::pipe() {
                Ok(ends) => self.lifeline = Some(ends),
                // The parent-death signal still ties the shards to us.
                Err(error) => tracing::warn!("cannot make a lifeline pipe: {error}"),
            }
        }
        let Some(prepared) = &self.prepared else { return };
        // One for each start: nobody may take a rank of an earlier one for a part of this.
        let instance_id = format!("{:032x}", rand::random::<u128>());
        let lifeline = self.lifeline.as_ref().map(|(reader, _)| reader.as_raw_fd());
        let runtime = ShardRuntime {
            uds_prefix: prepared.runtime_dir.prefix().to_owned(),
            instance_id: instance_id.clone(),
            lifeline_fd: lifeline,
            logger_level: self.launch.logger_level.clone(),
        };
        for rank in 0..prepared.plan.shard.num_shard {
            let child = ChildId::Shard(rank);
            let invocation = prepared.plan.shard.command(rank, &runtime);
            let program = &self.launch.shard_program;
            let spawned = SystemTime::now();
            match child::spawn(child, program, &invocation, lifeline, self.exits.clone()) {
                Ok(handle) => {
                    self.children.insert(child, handle);
                }
                Err(error) => self.report_spawn_failure(child, program.display().to_string(), &error),
            }
            let (events, id) = (self.events.clone(), instance_id.clone());
            let socket = prepared.runtime_dir.socket(rank);
            self.probes.push(tokio::spawn(async move {
                let start = readiness::shard_ready(socket, id, rank, spawned).await;
                // The supervisor ends before its probes only when it no longer cares.
                let _ = events.send(Told::ShardReady { attempt, rank, start });
            }));
        }
        tracing::info!(
            "Starting {} shard(s) on {}",
            prepared.plan.shard.num_shard,
            prepared.plan.shard.device.name()
        );
        let sockets =
            (0..prepared.plan.shard.num_shard).map(|rank| prepared.runtime_dir.socket(rank)).collect();
        self.watch_liveness(attempt, sockets);
    }

    /// From when all ranks have answered; while they load there are no steps to count.
    fn watch_liveness(&mut self, attempt: u32, sockets: Vec<PathBuf>) {
        if let Some(watch) = self.watch.take() {
            watch.abort();
        }
        let timeout = Duration::from_secs(self.launch.args.recovery.stall_timeout);
        if timeout.is_zero() {
            return;
        }
        let events = self.events.clone();
        self.watch = Some(tokio::spawn(async move {
            if let Some(reason) = liveness::stalled(&sockets, timeout).await {
                let _ = events.send(Told::Event(Event::Stalled { attempt, reason }));
            }
        }));
    }

    fn spawn_router(&mut self, attempt: u32) {
        if self.recovering_since.is_none() {
            self.launch.ledger.end_phase("shards", Instant::now());
        }
        self.start_router(false);
        self.await_router(attempt);
    }

    fn release_router(&mut self, attempt: u32) {
        self.launch.ledger.end_phase("shards", Instant::now());
        if let Some(router) = self.children.get_mut(&ChildId::Router) {
            let report = serde_json::to_string(&self.launch.ledger.report());
            router.release(report.unwrap_or_default());
        }
        self.await_router(attempt);
    }

    /// Starts the process; `is_held`: it is to wait for [`Handle::release`] before it goes to the shards.
    fn start_router(&mut self, is_held: bool) {
        let Some(prepared) = &self.prepared else { return };
        let invocation = prepared.plan.router.command(prepared.runtime_dir.prefix());
        let program = &self.launch.router_program;
        tracing::info!("Starting router");
        let spawned = if is_held {
            child::spawn_held(ChildId::Router, program, &invocation, self.exits.clone())
        } else {
            child::spawn(ChildId::Router, program, &invocation, None, self.exits.clone())
        };
        match spawned {
            Ok(handle) => {
                self.children.insert(ChildId::Router, handle);
            }
            Err(error) => self.report_spawn_failure(ChildId::Router, program.display().to_string(), &error),
        }
    }

    fn await_router(&mut self, attempt: u32) {
        self.abort_probes();
        let Some(prepared) = &self.prepared else { return };
        let (events, bind) = (self.events.clone(), prepared.plan.bind);
        self.probes.push(tokio::spawn(async move {
            readiness::router_healthy(bind).await;
            let _ = events.send(Told::Event(Event::RouterHealthy { attempt }));
        }));
    }

    fn abort_probes(&mut self) {
        for probe in self.probes.drain(..) {
            probe.abort();
        }
    }

    fn report_spawn_failure(&self, child: ChildId, program: String, error: &std::io::Error) {
        let reason = format!("{child} cannot be started from {program}: {error}");
        // The loop holds the receiver for as long as it acts.
        let _ = self.events.send(Told::Event(Event::SpawnFailed { child, reason }));
    }

    fn announce(&mut self) {
        self.launch.ledger.end_phase("router", Instant::now());
        let Some(prepared) = &self.prepared else { return };
        let (ledger, bind) = (&self.launch.ledger, prepared.plan.bind);
        tracing::info!(
            "Serving {} at http://{bind} after {:.0} ms ({ledger})",
            prepared.plan.shard.model_id,
            ledger.total().as_secs_f64() * 1e3,
        );
        for rank in ledger.report().ranks {
            tracing::info!("Start-up of shard rank {}: {}", rank.rank, listed(&rank.phases));
        }
        self.probes.push(tokio::spawn(async move {
            if let Some((before, after)) = router_phases(bind).await {
                tracing::info!("Start-up of the router: {before}; then, with the shards: {after}");
            }
        }));
    }

    fn announce_recovery(&mut self) {
        let took = self.recovering_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        tracing::info!("Serving again after {:.0} ms", took.as_secs_f64() * 1e3);
    }

    fn send_after(&self, wait: Duration, event: Event) {
        let events = self.events.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            // The supervisor ends before its timers only when it no longer cares.
            let _ = events.send(Told::Event(event));
        });
    }

    fn terminate(&mut self, child: ChildId, grace: Grace) {
        let grace = match grace {
            Grace::Requests => self.graceful_timeout(),
            Grace::Idle => IDLE_GRACE.min(self.graceful_timeout()),
        };
        if let Some(handle) = self.children.get(&child) {
            tracing::info!("Terminating {child}");
            handle.terminate(grace);
        }
    }

    /// For whoever has just asked for it and may be waiting at a terminal.
    fn what_a_stop_means(&self, phase: Phase) -> String {
        match phase {
            Phase::Warming | Phase::Serving | Phase::Recovering => format!(
                ": what runs has {} s to finish (--graceful-termination-timeout); a second signal ends it now",
                self.graceful_timeout().as_secs()
            ),
            Phase::Draining => " again: everything ends now".to_owned(),
            Phase::Downloading | Phase::Starting | Phase::Exited => String::new(),
        }
    }

    fn graceful_timeout(&self) -> Duration {
        self.prepared.as_ref().map_or(IDLE_GRACE, |prepared| prepared.plan.graceful_timeout)
    }
}

/// What the router did before it could go to the shards, and from then on; in its own words.
async fn router_phases(bind: std::net::SocketAddr) -> Option<(String, String)> {
    let asked = tokio::time::timeout(ROUTER_ANSWERS_WITHIN, router_http::body_of(bind, "/info")).await;
    let info: serde_json::Value = serde_json::from_str(&asked.ok()?.ok()?).ok()?;
    let phases = |name: &str| -> Option<String> {
        let phases: Vec<StartupPhase> = serde_json::from_value(info["startup"][name].clone()).ok()?;
        Some(listed(&phases))
    };
    Some((phases("router_preparation")?, phases("router")?))
}
