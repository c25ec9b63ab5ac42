//! The supervisor's states and what each event does to them: a pure function, tested by table.
//!
//! ```text
//! Downloading ──► Starting ──► Warming ──► Serving ◄──► Recovering
//!      │              └────────────┴──────────┴──────────────┴──► Draining ──► Exited
//!      └─────────────────────────────────────────────────────────────────────────▲
//! ```
//! A start that fails is reported and not repeated: the next one would fail alike. Once the service has served, deaths
//! are answered by restarts as far as the policy allows; and so is the death of a child that somebody killed while the
//! service warms up, because clients may see `/health` turn 200 a moment before the supervisor does. The shards of a model restart together, because one death breaks
//! the collectives of all; the router alone, because it holds no weights.
//!
//! On the way down for a stop signal the router goes first, because it finishes the running requests with the shards'
//! help; shards that die meanwhile are still restarted for it. After a failure everything goes at once, because nothing
//! can be finished any more.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use process::Signal;

use super::restarts::{RestartPolicy, Restarts};
use crate::error::{Failure, LauncherError};

/// One of the launcher's children.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChildId {
    /// A shard, by its rank.
    Shard(usize),
    /// The router.
    Router,
}

impl fmt::Display for ChildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChildId::Shard(rank) => write!(f, "shard rank {rank}"),
            ChildId::Router => f.write_str("router"),
        }
    }
}

/// Where the service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The model's files are being looked for or fetched; no child lives.
    Downloading,
    /// The shards load the model, and the router reads its tokenizer meanwhile.
    Starting,
    /// All shards are ready; the router warms them up.
    Warming,
    /// `/health` has answered 200.
    Serving,
    /// Children that died are being replaced.
    Recovering,
    /// Children are being ended, in order.
    Draining,
    /// No child is left.
    Exited,
}

/// What the end of a child says about its successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// It failed by itself.
    Cause {
        /// Starting the same command again may succeed.
        restart_helps: bool,
    },
    /// Somebody killed it, or the kernel did.
    Killed,
    /// It ended only because another child had ended before, which we may not have been told yet.
    Consequence,
}

/// Something that happened. `attempt` names the start that an event belongs to: those of earlier ones are too late.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Files, plan and socket prefix are there.
    Prepared {
        /// Number of ranks.
        num_shard: usize,
    },
    /// They cannot be had.
    PrepareFailed(Failure),
    /// A rank answered its handshake.
    ShardReady {
        /// Of [`Action::SpawnShards`].
        attempt: u32,
        /// Which.
        rank: usize,
    },
    /// `/health` answered 200.
    RouterHealthy {
        /// Of [`Action::SpawnRouter`], [`Action::ReleaseRouter`] or [`Action::AwaitRouter`].
        attempt: u32,
    },
    /// A child could not be started at all.
    SpawnFailed {
        /// Which.
        child: ChildId,
        /// One line: what was tried and what the operating system says.
        reason: String,
    },
    /// A child ended.
    Ended {
        /// Which.
        child: ChildId,
        /// One line: how it ended and what it said last.
        reason: String,
        /// What that says.
        death: Death,
    },
    /// A shard that lives makes no progress.
    Stalled {
        /// Of [`Action::SpawnShards`].
        attempt: u32,
        /// One line: which, and what was seen.
        reason: String,
    },
    /// The wait before a restart is over.
    BackoffOver {
        /// Of [`Action::Backoff`].
        attempt: u32,
    },
    /// The cause of a death has had its time to show.
    CauseOverdue,
    /// Somebody asks us to stop.
    Stop(Signal),
}

/// How long a child may take to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grace {
    /// As long as running requests may take.
    Requests,
    /// There is nothing to finish.
    Idle,
}

/// What the supervisor does in consequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start all ranks at once and wait for their handshakes.
    SpawnShards {
        /// For the events about it.
        attempt: u32,
    },
    /// Start the router, but hold it back from the shards, which do not answer yet.
    PrepareRouter,
    /// Let the router that was held back go to the shards, and wait for its health.
    ReleaseRouter {
        /// For the events about it.
        attempt: u32,
    },
    /// Start the router and wait for its health.
    SpawnRouter {
        /// For the events about it.
        attempt: u32,
    },
    /// The router that lives takes to the new shards by itself: wait for its health.
    AwaitRouter {
        /// For the events about it.
        attempt: u32,
    },
    /// Tell the world that it can send requests.
    Announce,
    /// Tell it that it can do so again.
    AnnounceRecovery,
    /// Answered by [`Event::BackoffOver`] after the time.
    Backoff {
        /// For the answer.
        attempt: u32,
        /// The time.
        wait: Duration,
    },
    /// A child ended because another one did, of which we do not know yet: ending that one now would hide its last
    /// words. Answered by [`Event::CauseOverdue`] after a moment.
    AwaitCause,
    /// Tell the router that no shards will come: it ends the running requests with an error.
    GiveUp,
    /// SIGTERM, and SIGKILL when the grace is over.
    Terminate(ChildId, Grace),
    /// SIGKILL.
    Kill(ChildId),
}

/// Where the shards are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    /// They load, or have not been started yet.
    Loading,
    /// All are ready.
    Up,
    /// One has died, and the others are to end as well.
    Ending,
    /// None lives; the next start waits.
    Resting,
}

/// A death that has not been answered yet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trouble {
    failure: Failure,
    death: Death,
}

/// All the supervisor knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Where the service is in its life.
    pub phase: Phase,
    /// What the launcher will exit with.
    pub outcome: Result<(), Failure>,
    num_shard: usize,
    alive: BTreeSet<ChildId>,
    group: Group,
    waiting_for: BTreeSet<usize>,
    restarts: Restarts,
    /// How long the shards stay down once the last one has ended.
    group_wait: Duration,
    /// The latest start or wait, and the latest start of the shards.
    attempt: u32,
    group_attempt: u32,
    has_served: bool,
    /// Deaths are answered by restarts.
    recovers: bool,
    /// Set while the cause of a death is awaited.
    trouble: Option<Trouble>,
    /// Everything was killed on demand, so no end is a failure any more.
    is_killed: bool,
}

impl State {
    /// Before anything has been done.
    pub fn new(policy: RestartPolicy) -> Self {
        Self {
            phase: Phase::Downloading,
            outcome: Ok(()),
            num_shard: 0,
            alive: BTreeSet::new(),
            group: Group::Loading,
            waiting_for: BTreeSet::new(),
            restarts: Restarts::new(policy),
            group_wait: Duration::ZERO,
            attempt: 0,
            group_attempt: 0,
            has_served: false,
            recovers: false,
            trouble: None,
            is_killed: false,
        }
    }

    /// How many failures count at `now`, and what is allowed.
    pub fn restarts_used(&self, now: Duration) -> (usize, RestartPolicy) {
        self.restarts.used(now)
    }

    fn has(&self, child: ChildId) -> bool {
        self.alive.contains(&child)
    }

    fn live_shards(&self) -> impl Iterator<Item = ChildId> {
        self.alive.iter().copied().filter(|child| *child != ChildId::Router)
    }

    /// Whether every child is there and was ready once.
    fn is_whole(&self) -> bool {
        self.group == Group::Up && self.has(ChildId::Router)
    }

    fn next_attempt(&mut self) -> u32 {
        self.attempt += 1;
        self.attempt
    }

    /// Whether whatever dies now is needed.
    fn is_wanted(&self) -> bool {
        match self.phase {
            Phase::Starting | Phase::Warming | Phase::Serving | Phase::Recovering => true,
            // The router finishes requests with the shards' help.
            Phase::Draining => self.outcome.is_ok() && !self.is_killed && self.has(ChildId::Router),
            Phase::Downloading | Phase::Exited => false,
        }
    }
}

/// The state after `event` at `now` (since any fixed moment), and what to do, in this order. Events that come too late to
/// matter change nothing.
pub fn transition(mut state: State, event: Event, now: Duration) -> (State, Vec<Action>) {
    use Phase::{Downloading, Draining, Exited, Recovering, Serving, Starting, Warming};
    let actions = match (state.phase, event) {
        (Downloading, Event::Prepared { num_shard }) => {
            state.phase = Starting;
            state.num_shard = num_shard;
            let mut actions = spawn_shards(&mut state);
            // A large vocabulary takes as long as the weights of a small model.
            state.alive.insert(ChildId::Router);
            actions.push(Action::PrepareRouter);
            actions
        }
        (Downloading, Event::PrepareFailed(failure)) => {
            state.phase = Exited;
            state.outcome = Err(failure);
            vec![]
        }
        (Downloading, Event::Stop(_)) => {
            state.phase = Exited;
            vec![]
        }
        (_, Event::ShardReady { attempt, rank }) if attempt == state.group_attempt && state.is_wanted() => {
            shard_ready(&mut state, rank)
        }
        (Warming | Recovering, Event::RouterHealthy { attempt })
            if attempt == state.attempt && state.is_whole() =>
        {
            let is_first = !std::mem::replace(&mut state.has_served, true);
            state.recovers = true;
            state.phase = Serving;
            state.restarts.recovered();
            vec![if is_first { Action::Announce } else { Action::AnnounceRecovery }]
        }
        (_, Event::BackoffOver { attempt }) if attempt == state.attempt && state.is_wanted() => {
            restore(&mut state)
        }
        (_, Event::Stalled { attempt, reason })
            if attempt == state.group_attempt && state.group != Group::Ending && state.is_wanted() =>
        {
            let failure = Failure::new(LauncherError::ShardFailed, reason);
            let death = Death::Cause { restart_helps: true };
            state.group = Group::Ending;
            state.trouble = Some(Trouble { failure, death });
            settle(&mut state, now)
        }
        (_, Event::CauseOverdue) if state.trouble.is_some() => settle(&mut state, now),
        (Starting | Warming | Serving | Recovering, Event::Stop(_)) => {
            state.phase = Draining;
            begin_drain(&mut state)
        }
        (Draining, Event::Stop(_)) => {
            state.is_killed = true;
            state.trouble = None;
            state.alive.iter().copied().map(Action::Kill).collect()
        }
        (_, Event::SpawnFailed { child, reason }) => {
            let error = match child {
                ChildId::Router => LauncherError::WebserverCannotStart,
                ChildId::Shard(_) => LauncherError::ShardCannotStart,
            };
            let death = Death::Cause { restart_helps: true };
            ended(&mut state, child, Trouble { failure: Failure::new(error, reason), death }, now)
        }
        (phase, Event::Ended { child, reason, death }) => {
            let failure = Failure::new(death_of(child, phase), reason);
            ended(&mut state, child, Trouble { failure, death }, now)
        }
        (_, _) => vec![],
    };
    (state, actions)
}

fn spawn_shards(state: &mut State) -> Vec<Action> {
    state.group = Group::Loading;
    state.waiting_for = (0..state.num_shard).collect();
    state.alive.extend((0..state.num_shard).map(ChildId::Shard));
    state.group_attempt = state.next_attempt();
    vec![Action::SpawnShards { attempt: state.group_attempt }]
}

fn spawn_router(state: &mut State) -> Vec<Action> {
    state.alive.insert(ChildId::Router);
    vec![Action::SpawnRouter { attempt: state.next_attempt() }]
}

fn shard_ready(state: &mut State, rank: usize) -> Vec<Action> {
    if state.group != Group::Loading {
        return vec![];
    }
    state.waiting_for.remove(&rank);
    if !state.waiting_for.is_empty() {
        return vec![];
    }
    state.group = Group::Up;
    match state.phase {
        // A router that drains answers no health checks.
        Phase::Draining => vec![],
        Phase::Recovering if state.has(ChildId::Router) => {
            vec![Action::AwaitRouter { attempt: state.next_attempt() }]
        }
        Phase::Recovering => spawn_router(state),
        _ => {
            state.phase = Phase::Warming;
            if state.has(ChildId::Router) {
                vec![Action::ReleaseRouter { attempt: state.next_attempt() }]
            } else {
                spawn_router(state)
            }
        }
    }
}

/// Starts what is missing, the shards first.
fn restore(state: &mut State) -> Vec<Action> {
    if state.live_shards().next().is_none() {
        spawn_shards(state)
    } else if state.group == Group::Up && !state.has(ChildId::Router) {
        spawn_router(state)
    } else {
        vec![]
    }
}

/// The router first, with the time its requests need; without a router there are no requests.
fn begin_drain(state: &mut State) -> Vec<Action> {
    state.trouble = None;
    if state.has(ChildId::Router) {
        return vec![Action::Terminate(ChildId::Router, Grace::Requests)];
    }
    if state.alive.is_empty() {
        state.phase = Phase::Exited;
    }
    terminate_all(state)
}

fn terminate_all(state: &State) -> Vec<Action> {
    state.alive.iter().map(|&child| Action::Terminate(child, Grace::Idle)).collect()
}

/// What the death of a child is called.
fn death_of(child: ChildId, phase: Phase) -> LauncherError {
    match (child, phase) {
        (ChildId::Router, _) => LauncherError::WebserverFailed,
        (ChildId::Shard(_), Phase::Starting) => LauncherError::ShardCannotStart,
        (ChildId::Shard(_), _) => LauncherError::ShardFailed,
    }
}

/// A child is gone.
fn ended(state: &mut State, child: ChildId, trouble: Trouble, now: Duration) -> Vec<Action> {
    let was_wanted = state.is_wanted();
    state.alive.remove(&child);
    if !was_wanted || (state.phase == Phase::Draining && child == ChildId::Router) {
        return ended_while_draining(state, child);
    }
    match child {
        ChildId::Router => router_died(state, trouble, now),
        ChildId::Shard(_) => shard_died(state, trouble, now),
    }
}

fn ended_while_draining(state: &mut State, child: ChildId) -> Vec<Action> {
    if state.alive.is_empty() {
        state.phase = Phase::Exited;
        return vec![];
    }
    let is_router_done = state.outcome.is_ok() && child == ChildId::Router && !state.is_killed;
    if is_router_done { terminate_all(state) } else { vec![] }
}

/// Without shards there is nothing that a router could have done better, and none that could do better now.
fn router_died(state: &mut State, trouble: Trouble, now: Duration) -> Vec<Action> {
    let is_consequence = trouble.death == Death::Consequence;
    let restart_helps = trouble.death != Death::Cause { restart_helps: false };
    if state.group != Group::Up && (is_consequence || (state.recovers && restart_helps)) {
        return vec![];
    }
    state.trouble = Some(trouble);
    if is_consequence { vec![Action::AwaitCause] } else { settle(state, now) }
}

fn shard_died(state: &mut State, trouble: Trouble, now: Duration) -> Vec<Action> {
    let is_first = state.group != Group::Ending;
    state.group = Group::Ending;
    let is_cause = trouble.death != Death::Consequence;
    // A router that lost its shards, or a rank that lost a peer, is no cause.
    let is_unknown = state.trouble.as_ref().is_some_and(|known| known.death == Death::Consequence);
    if is_first || (is_unknown && is_cause) {
        state.trouble = Some(trouble);
    }
    match &state.trouble {
        // Only another rank can be the cause of a rank's end.
        Some(known) if known.death == Death::Consequence && state.live_shards().next().is_some() => {
            if is_first {
                vec![Action::AwaitCause]
            } else {
                vec![]
            }
        }
        Some(_) => settle(state, now),
        None => rest_when_all_are_gone(state),
    }
}

/// The cause is known, or will not be: counts it and begins the restart, or the end.
fn settle(state: &mut State, now: Duration) -> Vec<Action> {
    let Some(Trouble { failure, death }) = state.trouble.take() else { return vec![] };
    let restart_helps = death != Death::Cause { restart_helps: false };
    state.recovers |= state.phase == Phase::Warming && death == Death::Killed;
    if !state.recovers || !restart_helps || !state.restarts.are_allowed() {
        return fail(state, failure);
    }
    let wait = match state.restarts.count(now) {
        Ok(wait) => wait,
        Err(why) => return fail(state, failure.after_restarts(&why)),
    };
    if state.phase != Phase::Draining {
        state.phase = Phase::Recovering;
    }
    if state.group == Group::Up {
        // It was the router.
        return rest(state, wait);
    }
    state.group_wait = wait;
    let mut actions: Vec<Action> = state.live_shards().map(Action::Kill).collect();
    actions.extend(rest_when_all_are_gone(state));
    actions
}

/// Ranks of two starts must never meet: the next start waits for the last end.
fn rest_when_all_are_gone(state: &mut State) -> Vec<Action> {
    if state.live_shards().next().is_some() {
        return vec![];
    }
    state.group = Group::Resting;
    rest(state, state.group_wait)
}

fn rest(state: &mut State, wait: Duration) -> Vec<Action> {
    if wait.is_zero() {
        restore(state)
    } else {
        vec![Action::Backoff { attempt: state.next_attempt(), wait }]
    }
}

/// The end: nothing that runs can be finished.
fn fail(state: &mut State, failure: Failure) -> Vec<Action> {
    state.outcome = Err(failure);
    state.phase = if state.alive.is_empty() { Phase::Exited } else { Phase::Draining };
    let can_tell_clients = state.has_served && state.has(ChildId::Router);
    can_tell_clients.then_some(Action::GiveUp).into_iter().chain(terminate_all(state)).collect()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
