//! Every path through the supervisor's states.

use super::*;

const S0: ChildId = ChildId::Shard(0);
const S1: ChildId = ChildId::Shard(1);
const R: ChildId = ChildId::Router;

fn ended(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} ended"), death: Death::Cause { restart_helps: true } }
}

fn killed(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} was killed"), death: Death::Killed }
}

fn hopeless(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} gave up"), death: Death::Cause { restart_helps: false } }
}

fn consequence(child: ChildId) -> Event {
    Event::Ended { child, reason: format!("{child} lost its peer"), death: Death::Consequence }
}

fn not_spawned(child: ChildId) -> Event {
    Event::SpawnFailed { child, reason: "no such file".to_owned() }
}

fn stop() -> Event {
    Event::Stop(Signal::Terminate)
}

fn ready(attempt: u32, rank: usize) -> Event {
    Event::ShardReady { attempt, rank }
}

fn healthy(attempt: u32) -> Event {
    Event::RouterHealthy { attempt }
}

fn stalled(attempt: u32) -> Event {
    Event::Stalled { attempt, reason: "shard rank 1 stalled".to_owned() }
}

/// The events that lead to serving with two ranks. The shards are start 1, the router start 2.
fn up_to(phase: Phase) -> Vec<Event> {
    let all = [Event::Prepared { num_shard: 2 }, ready(1, 1), ready(1, 0), healthy(2)];
    let count = match phase {
        Phase::Downloading => 0,
        Phase::Starting => 1,
        Phase::Warming => 3,
        _ => 4,
    };
    all[..count].to_vec()
}

/// Runs `events` after those that lead to `phase`, a second each; the actions are those of the last event.
fn run_with(max_restarts: usize, phase: Phase, events: &[Event]) -> (State, Vec<Action>) {
    let policy = RestartPolicy { max_restarts, window: Duration::from_secs(600) };
    let mut last = (State::new(policy), vec![]);
    for (second, event) in up_to(phase).iter().chain(events).enumerate() {
        last = transition(last.0, event.clone(), Duration::from_secs(second as u64));
    }
    last
}

/// Without restarts.
fn run(phase: Phase, events: &[Event]) -> (State, Vec<Action>) {
    run_with(0, phase, events)
}

fn idle(children: &[ChildId]) -> Vec<Action> {
    children.iter().map(|&child| Action::Terminate(child, Grace::Idle)).collect()
}

fn given_up(children: &[ChildId]) -> Vec<Action> {
    [vec![Action::GiveUp], idle(children)].concat()
}

#[test]
fn table_of_phases_and_actions() {
    use Phase::*;
    let requests = Action::Terminate(R, Grace::Requests);
    let refused = Failure::argument("port in use");
    for (from, events, phase, actions) in [
        // The way up.
        (
            Downloading,
            vec![Event::Prepared { num_shard: 2 }],
            Starting,
            vec![Action::SpawnShards { attempt: 1 }, Action::PrepareRouter],
        ),
        (Starting, vec![ready(1, 1)], Starting, vec![]),
        (Starting, vec![ready(1, 1), ready(1, 1)], Starting, vec![]),
        (Starting, vec![ready(0, 1), ready(0, 0)], Starting, vec![]),
        (Starting, up_to(Warming)[1..].to_vec(), Warming, vec![Action::ReleaseRouter { attempt: 2 }]),
        (Warming, vec![healthy(2)], Serving, vec![Action::Announce]),
        // Nothing to end.
        (Downloading, vec![stop()], Exited, vec![]),
        (Downloading, vec![Event::PrepareFailed(refused)], Exited, vec![]),
        // The way down, asked for.
        (Starting, vec![stop()], Draining, vec![requests.clone()]),
        (Starting, vec![stop(), ended(R)], Draining, idle(&[S0, S1])),
        (Warming, vec![stop()], Draining, vec![requests.clone()]),
        (Serving, vec![stop()], Draining, vec![requests]),
        (Serving, vec![stop(), ended(R)], Draining, idle(&[S0, S1])),
        (Serving, vec![stop(), ended(R), ended(S1)], Draining, vec![]),
        (Serving, vec![stop(), ended(R), ended(S1), ended(S0)], Exited, vec![]),
        // A second signal ends what is left at once.
        (Serving, vec![stop(), stop()], Draining, vec![Action::Kill(S0), Action::Kill(S1), Action::Kill(R)]),
        (Serving, vec![stop(), ended(R), stop()], Draining, vec![Action::Kill(S0), Action::Kill(S1)]),
        // The way down after a death.
        (Starting, vec![ended(S1)], Draining, idle(&[S0, R])),
        (Starting, vec![ended(R)], Draining, idle(&[S0, S1])),
        (Starting, vec![not_spawned(R)], Draining, idle(&[S0, S1])),
        (
            Starting,
            vec![consequence(R), ready(1, 0), ready(1, 1)],
            Warming,
            vec![Action::SpawnRouter { attempt: 2 }],
        ),
        (Warming, vec![ended(R)], Draining, idle(&[S0, S1])),
        (Serving, vec![ended(S0)], Draining, given_up(&[S1, R])),
        (Serving, vec![ended(S0), ended(R)], Draining, vec![]),
        (Serving, vec![ended(S0), ended(R), ended(S1)], Exited, vec![]),
        (Serving, vec![stop(), ended(S1)], Draining, given_up(&[S0, R])),
        (Warming, vec![stop(), ended(S1)], Draining, idle(&[S0, R])),
        (Starting, vec![not_spawned(S0)], Draining, idle(&[S1, R])),
        (Starting, vec![not_spawned(S0), not_spawned(S1), ended(R)], Exited, vec![]),
        (Warming, vec![not_spawned(R)], Draining, idle(&[S0, S1])),
        (Warming, vec![stop(), not_spawned(R)], Draining, idle(&[S0, S1])),
        // The cause of an end gets a moment to show itself.
        (Serving, vec![consequence(S1)], Serving, vec![Action::AwaitCause]),
        (Serving, vec![consequence(S1), ended(S0)], Draining, given_up(&[R])),
        (Serving, vec![consequence(S1), consequence(S0)], Draining, given_up(&[R])),
        (Serving, vec![consequence(S1), Event::CauseOverdue], Draining, given_up(&[S0, R])),
        (Serving, vec![consequence(S1), stop()], Draining, vec![Action::Terminate(R, Grace::Requests)]),
        (Serving, vec![consequence(R)], Serving, vec![Action::AwaitCause]),
        (Serving, vec![consequence(R), Event::CauseOverdue], Draining, idle(&[S0, S1])),
        (Warming, vec![consequence(R), ended(S1)], Draining, idle(&[S0])),
        (Warming, vec![consequence(S1), consequence(R)], Warming, vec![]),
        (Starting, vec![consequence(S1), ended(S0)], Draining, idle(&[R])),
        (Serving, vec![Event::CauseOverdue], Serving, vec![]),
        // A shard that stands still is a shard that died.
        (Warming, vec![stalled(1)], Draining, idle(&[S0, S1, R])),
        (Serving, vec![stalled(0)], Serving, vec![]),
        // What comes too late changes nothing.
        (Starting, vec![stop(), ready(1, 0), ready(1, 1)], Draining, vec![]),
        (Warming, vec![stop(), healthy(2)], Draining, vec![]),
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
        (Starting, vec![stop(), ended(R), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), ended(R), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), stop(), ended(R), ended(S0), ended(S1)], None),
        (Serving, vec![stop(), stop(), ended(S0), ended(R), ended(S1)], None),
        (Starting, vec![ended(S1), ended(S0), ended(R)], Some(ShardCannotStart)),
        (Starting, vec![ended(R), ended(S1), ended(S0)], Some(WebserverFailed)),
        (Warming, vec![ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
        (Serving, vec![ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
        (Serving, vec![ended(R), ended(S0), ended(S1)], Some(WebserverFailed)),
        (Starting, vec![not_spawned(S0), ended(S1), ended(R)], Some(ShardCannotStart)),
        (Warming, vec![not_spawned(R), ended(S0), ended(S1)], Some(WebserverCannotStart)),
        (Serving, vec![stop(), ended(S1), ended(S0), ended(R)], Some(ShardFailed)),
    ] {
        let (state, _) = run(from, &events);
        assert_eq!(state.phase, Exited, "{from:?} {events:?}");
        assert_eq!(state.outcome.err().map(|failure| failure.error), error, "{from:?} {events:?}");
    }
}

#[test]
fn a_single_rank_that_dies_leaves_only_the_router() {
    let policy = RestartPolicy { max_restarts: 5, window: Duration::from_secs(60) };
    let (state, _) = transition(State::new(policy), Event::Prepared { num_shard: 1 }, Duration::ZERO);
    let (state, actions) = transition(state, ended(S0), Duration::ZERO);
    assert_eq!((state.phase, actions), (Phase::Draining, idle(&[R])));
    assert_eq!(transition(state, ended(R), Duration::ZERO).0.phase, Phase::Exited);
}

#[test]
fn the_cause_is_named_and_not_its_consequence() {
    let reason = |events: &[Event]| run(Phase::Serving, events).0.outcome.unwrap_err().reason;
    assert_eq!(reason(&[consequence(S1), ended(S0)]), "shard rank 0 ended");
    assert_eq!(reason(&[ended(S0), consequence(S1)]), "shard rank 0 ended");
    assert_eq!(reason(&[consequence(S1), consequence(S0)]), "shard rank 1 lost its peer");
    assert_eq!(reason(&[ended(S0), ended(R), ended(S1)]), "shard rank 0 ended");
}

#[test]
fn table_of_recoveries() {
    use Phase::*;
    let shards = |attempt| vec![Action::SpawnShards { attempt }];
    let router = |attempt| vec![Action::SpawnRouter { attempt }];
    let await_router = |attempt| vec![Action::AwaitRouter { attempt }];
    let backoff = |attempt, millis| vec![Action::Backoff { attempt, wait: Duration::from_millis(millis) }];
    let kill = |child| vec![Action::Kill(child)];
    let group = |rest: &[Event]| [&[ended(S1), consequence(S0)], rest].concat();
    let again = |rest: &[Event]| [&group(&[ready(3, 0), ready(3, 1)])[..], rest].concat();
    for (events, phase, actions) in [
        // All ranks restart together, once the last one is gone; the router finds the new ones by itself.
        (vec![ended(S1)], Recovering, kill(S0)),
        (group(&[]), Recovering, shards(3)),
        (group(&[ready(3, 0)]), Recovering, vec![]),
        (again(&[]), Recovering, await_router(4)),
        (again(&[healthy(4)]), Serving, vec![Action::AnnounceRecovery]),
        (vec![consequence(S0), ended(S1)], Recovering, shards(3)),
        (vec![consequence(S0), Event::CauseOverdue], Recovering, kill(S1)),
        (vec![stalled(1)], Recovering, vec![Action::Kill(S0), Action::Kill(S1)]),
        (vec![stalled(1), consequence(S0), consequence(S1)], Recovering, shards(3)),
        // What an earlier start still had to say changes nothing.
        (group(&[ready(1, 0), ready(1, 1)]), Recovering, vec![]),
        (group(&[healthy(2)]), Recovering, vec![]),
        (vec![ended(S1), healthy(2)], Recovering, vec![]),
        (again(&[ended(S0), healthy(4)]), Recovering, vec![]),
        (again(&[healthy(4), stalled(1)]), Serving, vec![]),
        // The router restarts alone.
        (vec![ended(R)], Recovering, router(3)),
        (vec![ended(R), healthy(3)], Serving, vec![Action::AnnounceRecovery]),
        (vec![consequence(R), Event::CauseOverdue], Recovering, router(3)),
        // Both: the shards first. A router without shards is not counted.
        (vec![consequence(R), ended(S1)], Recovering, kill(S0)),
        (vec![ended(S1), ended(R)], Recovering, vec![]),
        (again(&[ended(R)]), Recovering, backoff(5, 250)),
        (vec![ended(R), ended(S1), consequence(S0)], Recovering, backoff(4, 250)),
        (group(&[ended(R), ready(3, 0), ready(3, 1)]), Recovering, router(4)),
        (group(&[ended(R), ready(3, 0), ready(3, 1), healthy(4)]), Serving, vec![Action::AnnounceRecovery]),
        // Failures in a row wait longer and longer; one recovery ends the row.
        (group(&[ended(S0)]), Recovering, kill(S1)),
        (group(&[ended(S0), consequence(S1)]), Recovering, backoff(4, 250)),
        (group(&[ended(S0), consequence(S1), Event::BackoffOver { attempt: 4 }]), Recovering, shards(5)),
        (group(&[ended(S0), consequence(S1), Event::BackoffOver { attempt: 3 }]), Recovering, vec![]),
        (again(&[healthy(4), ended(S0), consequence(S1)]), Recovering, shards(5)),
        // A stop lets the router finish its requests, with new shards if need be.
        (group(&[stop()]), Draining, vec![Action::Terminate(R, Grace::Requests)]),
        (group(&[stop(), ready(3, 0), ready(3, 1)]), Draining, vec![]),
        (group(&[stop(), ended(R)]), Draining, idle(&[S0, S1])),
        (vec![stop(), ended(S0), consequence(S1)], Draining, shards(3)),
        (vec![ended(R), stop()], Draining, vec![Action::Terminate(R, Grace::Requests)]),
        (vec![ended(S1), ended(R), consequence(S0), stop()], Draining, idle(&[S0, S1])),
        (group(&[stop(), ended(R), ended(S0), ended(S1)]), Exited, vec![]),
        // What no restart can mend.
        (vec![hopeless(S1)], Draining, given_up(&[S0, R])),
        (vec![hopeless(R)], Draining, idle(&[S0, S1])),
        (group(&[hopeless(S0)]), Draining, given_up(&[S1, R])),
        (group(&[hopeless(R)]), Draining, idle(&[S0, S1])),
    ] {
        let (state, found) = run_with(10, Serving, &events);
        assert_eq!((state.phase, found), (phase, actions), "{events:?}");
    }
}

#[test]
fn a_kill_while_the_service_warms_up_is_answered_and_a_failure_is_not() {
    use Phase::*;
    let again = [killed(S1), consequence(S0), consequence(R), ready(3, 0), ready(3, 1)];
    for (from, events, phase, actions) in [
        (Warming, vec![killed(S1)], Recovering, vec![Action::Kill(S0)]),
        (Warming, again.to_vec(), Recovering, vec![Action::SpawnRouter { attempt: 4 }]),
        (Warming, [&again[..], &[healthy(4)]].concat(), Serving, vec![Action::Announce]),
        (Warming, vec![killed(R)], Recovering, vec![Action::SpawnRouter { attempt: 3 }]),
        (Warming, vec![ended(S1)], Draining, idle(&[S0, R])),
        (Warming, vec![ended(R)], Draining, idle(&[S0, S1])),
        (Starting, vec![killed(S1)], Draining, idle(&[S0, R])),
    ] {
        let (state, found) = run_with(5, from, &events);
        assert_eq!((state.phase, found), (phase, actions), "{from:?} {events:?}");
    }
}

#[test]
fn one_failure_more_than_allowed_is_the_end() {
    let round = |attempt: u32| {
        [ended(S1), consequence(S0), ready(attempt, 0), ready(attempt, 1), healthy(attempt + 1)]
    };
    let events = [&round(3)[..], &round(5), &[ended(S1)]].concat();
    let (state, actions) = run_with(2, Phase::Serving, &events);
    assert_eq!((state.phase, actions), (Phase::Draining, given_up(&[S0, R])));
    let failure = state.outcome.unwrap_err();
    assert_eq!(
        (failure.error.clone(), failure.exit_code()),
        (LauncherError::ShardFailed, process::ExitCode::RestartsSpent)
    );
    assert_eq!(failure.reason, "shard rank 1 ended (it is failure 3 within 600 s and --max-restarts is 2)");
    assert_eq!(run_with(3, Phase::Serving, &events).0.phase, Phase::Recovering);
    let (state, _) = run_with(0, Phase::Serving, &[ended(R)]);
    assert_eq!(state.outcome.unwrap_err().exit_code(), process::ExitCode::Failure, "as upstream");
}

/// Whether something is sure to come that leads on: an end of a child that was killed, an answer of one that starts, or the
/// end of a wait.
fn is_on_its_way(state: &State, wait: u32) -> bool {
    let (_, after_wait) = transition(state.clone(), Event::BackoffOver { attempt: wait }, Duration::ZERO);
    match state.group {
        Group::Ending => state.live_shards().next().is_some(),
        Group::Loading => !state.waiting_for.is_empty(),
        Group::Up if state.has(R) => true,
        Group::Up => matches!(after_wait[..], [Action::SpawnRouter { .. }]),
        Group::Resting => matches!(after_wait[..], [Action::SpawnShards { .. }]),
    }
}

/// Whatever happens in whatever order, ranks of two starts never live together, nothing is started after the end was
/// decided, and everything that was started is ended.
#[test]
fn random_orders_of_events_keep_the_promises() {
    let mut lots: u64 = 1;
    let mut below = move |bound: u64| {
        lots = lots.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (lots >> 33) % bound
    };
    for _ in 0..3000 {
        let policy = RestartPolicy { max_restarts: 4, window: Duration::from_secs(30) };
        let mut state = State::new(policy);
        let mut alive = BTreeSet::new();
        let (mut group, mut router, mut wait) = (0, 0, 0);
        for second in 0..200 {
            let child = [S0, S1, R][below(3) as usize];
            let event = match below(12) {
                0 | 1 => Event::Prepared { num_shard: 2 },
                2..=4 => ready(group, below(2) as usize),
                5 | 6 => healthy(router),
                7 => Event::BackoffOver { attempt: wait },
                8 => Event::CauseOverdue,
                9 if below(10) == 0 => stop(),
                9 => stalled(group),
                _ if !alive.contains(&child) => continue,
                10 if below(2) == 0 => killed(child),
                10 => consequence(child),
                _ => ended(child),
            };
            if let Event::Ended { child, .. } = &event {
                alive.remove(child);
            }
            let was_over = state.phase == Phase::Draining && state.outcome.is_err();
            let (after, actions) = transition(state, event, Duration::from_secs(second));
            state = after;
            for action in actions {
                match action {
                    Action::SpawnShards { attempt } => {
                        assert!(!was_over && !alive.contains(&S0) && !alive.contains(&S1));
                        alive.extend([S0, S1]);
                        group = attempt;
                    }
                    Action::SpawnRouter { attempt } => {
                        assert!(!was_over && alive.contains(&S0) && alive.contains(&S1));
                        assert!(alive.insert(R), "one router");
                        router = attempt;
                    }
                    Action::PrepareRouter => assert!(!was_over && alive.insert(R), "one router"),
                    Action::AwaitRouter { attempt } | Action::ReleaseRouter { attempt } => {
                        assert!(alive.contains(&R));
                        router = attempt;
                    }
                    Action::Backoff { attempt, .. } => wait = attempt,
                    Action::Kill(child) | Action::Terminate(child, _) => assert!(alive.contains(&child)),
                    _ => {}
                }
            }
            assert_eq!(state.alive, alive);
            if matches!(state.phase, Phase::Serving | Phase::Recovering) {
                assert!(state.trouble.is_some() || is_on_its_way(&state, wait), "{state:?}");
            }
            if state.phase == Phase::Exited {
                assert!(alive.is_empty());
                break;
            }
        }
    }
}
