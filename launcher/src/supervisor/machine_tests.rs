//! Every path through the supervisor's states.

use super::*;

const S0: ChildId = ChildId::Shard(0);
const S1: ChildId = ChildId::Shard(1);
const R: ChildId = ChildId::Router;

fn ended(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} ended"), is_consequence: false }
}

fn consequence(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} lost its peer"), is_consequence: true }
}

fn not_spawned(child: ChildId) -> Event {
    Event::SpawnFailed { child, reason: "no such file".to_owned() }
}

fn stop() -> Event {
    Event::Stop(Signal::Terminate)
}

/// The events that lead to serving with two ranks.
fn up_to(phase: Phase) -> Vec<Event> {
    let all = [
        Event::Prepared { num_shard: 2 },
        Event::ShardReady { rank: 1 },
        Event::ShardReady { rank: 0 },
        Event::RouterHealthy,
    ];
    let count = match phase {
        Phase::Downloading => 0,
        Phase::Starting => 1,
        Phase::Warming => 3,
        _ => 4,
    };
    all[..count].to_vec()
}

/// Runs `events` after those that lead to `phase`; the actions are those of the last event.
fn run(phase: Phase, events: &[Event]) -> (State, Vec<Action>) {
    let mut last = (State::default(), vec![]);
    for event in up_to(phase).iter().chain(events) {
        last = transition(last.0, event.clone());
    }
    last
}

fn idle(children: &[ChildId]) -> Vec<Action> {
    children.iter().map(|&child| Action::Terminate(child, Grace::Idle)).collect()
}

#[test]
fn table_of_phases_and_actions() {
    use Phase::*;
    let requests = Action::Terminate(R, Grace::Requests);
    let refused = Failure::argument("port in use");
    for (from, events, phase, actions) in [
        // The way up.
        (Downloading, vec![Event::Prepared { num_shard: 2 }], Starting, vec![Action::SpawnShards]),
        (Starting, vec![Event::ShardReady { rank: 1 }], Starting, vec![]),
        (Starting, vec![Event::ShardReady { rank: 1 }, Event::ShardReady { rank: 1 }], Starting, vec![]),
        (Starting, up_to(Warming)[1..].to_vec(), Warming, vec![Action::SpawnRouter]),
        (Warming, vec![Event::RouterHealthy], Serving, vec![Action::Announce]),
        // Nothing to end.
        (Downloading, vec![stop()], Exited, vec![]),
        (Downloading, vec![Event::PrepareFailed(refused)], Exited, vec![]),
        // The way down, asked for.
        (Starting, vec![stop()], Draining, idle(&[S0, S1])),
        (Warming, vec![stop()], Draining, vec![requests.clone()]),
        (Serving, vec![stop()], Draining, vec![requests]),
        (Serving, vec![stop(), ended(R)], Draining, idle(&[S0, S1])),
        (Serving, vec![stop(), ended(R), ended(S1)], Draining, vec![]),
        (Serving, vec![stop(), ended(R), ended(S1), ended(S0)], Exited, vec![]),
        // A second signal ends what is left at once.
        (Serving, vec![stop(), stop()], Draining, vec![Action::Kill(S0), Action::Kill(S1), Action::Kill(R)]),
        (Serving, vec![stop(), ended(R), stop()], Draining, vec![Action::Kill(S0), Action::Kill(S1)]),
        // The way down after a death.
        (Starting, vec![ended(S1)], Draining, idle(&[S0])),
        (Warming, vec![ended(R)], Draining, idle(&[S0, S1])),
        (Serving, vec![ended(S0)], Draining, idle(&[S1, R])),
        (Serving, vec![ended(S0), ended(R)], Draining, vec![]),
        (Serving, vec![ended(S0), ended(R), ended(S1)], Exited, vec![]),
        (Serving, vec![stop(), ended(S1)], Draining, idle(&[S0, R])),
        (Starting, vec![not_spawned(S0)], Draining, idle(&[S1])),
        (Starting, vec![not_spawned(S0), not_spawned(S1)], Exited, vec![]),
        (Warming, vec![not_spawned(R)], Draining, idle(&[S0, S1])),
        (Warming, vec![stop(), not_spawned(R)], Draining, idle(&[S0, S1])),
        // The cause of a rank's end gets a moment to show itself.
        (Serving, vec![consequence(S1)], Draining, vec![Action::AwaitCause]),
        (Serving, vec![consequence(S1), ended(S0)], Draining, idle(&[R])),
        (Serving, vec![consequence(S1), consequence(S0)], Draining, idle(&[R])),
        (Serving, vec![consequence(S1), Event::CauseOverdue], Draining, idle(&[S0, R])),
        (Serving, vec![consequence(S1), stop()], Draining, vec![Action::Kill(S0), Action::Kill(R)]),
        (Starting, vec![consequence(S1), ended(S0)], Exited, vec![]),
        // What comes too late changes nothing.
        (
            Starting,
            vec![stop(), Event::ShardReady { rank: 0 }, Event::ShardReady { rank: 1 }],
            Draining,
            vec![],
        ),
        (Warming, vec![stop(), Event::RouterHealthy], Draining, vec![]),
        (Downloading, vec![stop(), Event::Prepared { num_shard: 2 }], Exited, vec![]),
    ] {
        let (state, found) = run(from, &events);
        assert_eq!((state.phase, found), (phase, actions), "{from:?} {events:?}");
    }
}

#[test]
fn table_of_outcomes() {
    use LauncherError::*;
    use Phase::*;
    for (from, events, error) in [
        (Downloading, vec![stop()], None),
        (Starting, vec![stop(), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), ended(R), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), stop(), ended(R), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), stop(), ended(S0), ended(R), ended(S1)], None),
        (Starting, vec![ended(S1), ended(S0)], Some(ShardCannotStart)),
        (Warming, vec![ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
        (Serving, vec![ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
        (Serving, vec![ended(R), ended(S0), ended(S1)], Some(WebserverFailed)),
        (Starting, vec![not_spawned(S0), ended(S1)], Some(ShardCannotStart)),
        (Warming, vec![not_spawned(R), ended(S0), ended(S1)], Some(WebserverCannotStart)),
        (Serving, vec![stop(), ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
    ] {
        let (state, _) = run(from, &events);
        assert_eq!(state.phase, Exited, "{from:?} {events:?}");
        assert_eq!(state.outcome.err().map(|failure| failure.error), error, "{from:?} {events:?}");
    }
}

#[test]
fn a_single_rank_that_dies_leaves_nothing_to_drain() {
    let (state, _) = transition(State::default(), Event::Prepared { num_shard: 1 });
    let (state, actions) = transition(state, ended(S0));
    assert_eq!((state.phase, actions), (Phase::Exited, vec![]));
}

#[test]
fn the_cause_is_named_and_not_its_consequence() {
    let reason = |events: &[Event]| run(Phase::Serving, events).0.outcome.unwrap_err().reason;
    assert_eq!(reason(&[consequence(S1), ended(S0)]), "shard rank 0 ended");
    assert_eq!(reason(&[ended(S0), consequence(S1)]), "shard rank 0 ended");
    assert_eq!(reason(&[consequence(S1), consequence(S0)]), "shard rank 1 lost its peer");
    assert_eq!(reason(&[ended(S0), ended(R), ended(S1)]), "shard rank 0 ended");
}
