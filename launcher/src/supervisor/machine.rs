//! The supervisor's states and what each event does to them: a pure function, tested by table.
//!
//! ```text
//! Downloading ──► Starting ──► Warming ──► Serving
//!      │              └────────────┴──────────┴──────► Draining ──► Exited
//!      └──────────────────────────────────────────────────────────────▲
//! ```
//! On the way down for a stop signal the router goes first, because it finishes the running requests with the shards'
//! help; after a death everything goes at once, because nothing can be finished any more.

use std::collections::BTreeSet;
use std::fmt;

use process::Signal;

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
    /// The shards load the model.
    Starting,
    /// All shards are ready; the router starts and warms them up.
    Warming,
    /// `/health` has answered 200.
    Serving,
    /// Children are being ended, in order.
    Draining,
    /// No child is left.
    Exited,
}

/// Something that happened.
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
        /// Which.
        rank: usize,
    },
    /// `/health` answered 200.
    RouterHealthy,
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
        /// It ended only because another one had ended before, which we have not been told yet.
        is_consequence: bool,
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
    SpawnShards,
    /// Start the router and wait for its health.
    SpawnRouter,
    /// Tell the world that it can send requests.
    Announce,
    /// A rank ended because another one did, of which we do not know yet: ending that one now would hide its last
    /// words. Answered by [`Event::CauseOverdue`] after a moment.
    AwaitCause,
    /// SIGTERM, and SIGKILL when the grace is over.
    Terminate(ChildId, Grace),
    /// SIGKILL.
    Kill(ChildId),
}

/// All the supervisor knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Where the service is in its life.
    pub phase: Phase,
    /// What the launcher will exit with.
    pub outcome: Result<(), Failure>,
    alive: BTreeSet<ChildId>,
    waiting_for: BTreeSet<usize>,
    /// `outcome` names a death that was another one's consequence.
    is_cause_unknown: bool,
    /// Everything was killed on demand, so no end is a failure any more.
    is_killed: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            phase: Phase::Downloading,
            outcome: Ok(()),
            alive: BTreeSet::new(),
            waiting_for: BTreeSet::new(),
            is_cause_unknown: false,
            is_killed: false,
        }
    }
}

/// The state after `event`, and what to do, in this order. Events that come too late to matter change nothing.
pub fn transition(mut state: State, event: Event) -> (State, Vec<Action>) {
    use Phase::{Downloading, Draining, Exited, Serving, Starting, Warming};
    let actions = match (state.phase, event) {
        (Downloading, Event::Prepared { num_shard }) => {
            state.phase = Starting;
            state.waiting_for = (0..num_shard).collect();
            state.alive = (0..num_shard).map(ChildId::Shard).collect();
            vec![Action::SpawnShards]
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
        (Starting, Event::ShardReady { rank }) => {
            state.waiting_for.remove(&rank);
            if state.waiting_for.is_empty() {
                state.phase = Warming;
                state.alive.insert(ChildId::Router);
                vec![Action::SpawnRouter]
            } else {
                vec![]
            }
        }
        (Warming, Event::RouterHealthy) => {
            state.phase = Serving;
            vec![Action::Announce]
        }
        (Starting | Warming | Serving, Event::Stop(_)) => {
            state.phase = Draining;
            begin_drain(&state)
        }
        (Starting | Warming | Serving, Event::SpawnFailed { child, reason }) => {
            let error = match child {
                ChildId::Router => LauncherError::WebserverCannotStart,
                ChildId::Shard(_) => LauncherError::ShardCannotStart,
            };
            fail(&mut state, child, Failure::new(error, reason), false)
        }
        (Starting | Warming | Serving, Event::Ended { child, reason, is_consequence }) => {
            let error = death_of(child, state.phase);
            fail(&mut state, child, Failure::new(error, reason), is_consequence)
        }
        (Draining, Event::CauseOverdue) => terminate_all(&state),
        (Draining, Event::Stop(_)) => {
            state.is_killed = true;
            state.alive.iter().copied().map(Action::Kill).collect()
        }
        (Draining, Event::SpawnFailed { child, reason }) => {
            ended_while_draining(&mut state, child, reason, false)
        }
        (Draining, Event::Ended { child, reason, is_consequence }) => {
            ended_while_draining(&mut state, child, reason, is_consequence)
        }
        (_, _) => vec![],
    };
    (state, actions)
}

/// The router first, with the time its requests need; without a router there are no requests.
fn begin_drain(state: &State) -> Vec<Action> {
    if state.alive.contains(&ChildId::Router) {
        vec![Action::Terminate(ChildId::Router, Grace::Requests)]
    } else {
        terminate_all(state)
    }
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

/// A child is gone that was needed.
fn fail(state: &mut State, child: ChildId, failure: Failure, is_consequence: bool) -> Vec<Action> {
    state.outcome = Err(failure);
    state.is_cause_unknown = is_consequence;
    state.alive.remove(&child);
    state.phase = if state.alive.is_empty() { Phase::Exited } else { Phase::Draining };
    if may_cause_show(state) { vec![Action::AwaitCause] } else { terminate_all(state) }
}

/// Only another rank can be the cause of a rank's end.
fn may_cause_show(state: &State) -> bool {
    state.is_cause_unknown && state.alive.iter().any(|child| *child != ChildId::Router)
}

fn ended_while_draining(
    state: &mut State,
    child: ChildId,
    reason: String,
    is_consequence: bool,
) -> Vec<Action> {
    let is_asked_for = state.outcome.is_ok();
    if is_asked_for && !state.is_killed && child != ChildId::Router && state.alive.contains(&ChildId::Router)
    {
        // Nobody asked the shard to end yet, and without it the requests cannot be finished.
        return fail(state, child, Failure::new(LauncherError::ShardFailed, reason), is_consequence);
    }
    let was_awaiting = may_cause_show(state);
    state.alive.remove(&child);
    if let Err(failure) = &mut state.outcome
        && state.is_cause_unknown
        && !is_consequence
    {
        failure.reason = reason;
        state.is_cause_unknown = false;
    }
    if state.alive.is_empty() {
        state.phase = Phase::Exited;
    }
    let is_router_done = is_asked_for && child == ChildId::Router && !state.is_killed;
    let is_cause_decided = was_awaiting && !may_cause_show(state);
    if is_router_done || is_cause_decided { terminate_all(state) } else { vec![] }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
