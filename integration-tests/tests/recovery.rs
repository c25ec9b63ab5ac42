//! Processes are killed or stopped under running streams: clients see a pause, never an error, never another text.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use integration_tests::chaos::{self, Chaos};
use integration_tests::golden::fixture;
use integration_tests::near_tie;
use integration_tests::workload::{Answer, AskError, Known, ask, requests, undisturbed};
use integration_tests::{Server, http, process_tree};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const STREAMS: usize = 8;

/// Enough tokens that every stream is under way when something dies.
const LONG: usize = 400;

fn server(flags: &[&str]) -> Server {
    Server::of(fixture("tiny-llama")).args(flags.iter().copied()).start().unwrap()
}

/// Requests of every kind with their answers. Hardly ever is one of them a near-tie.
fn known(server: &Server, count: usize) -> Known {
    let known = undisturbed(server.port(), requests(count, LONG)).unwrap();
    assert!(known.near_ties <= 2, "{} near-ties among {count} requests", known.near_ties);
    known
}

/// As [`try_all`], where every stream must have an answer.
fn ask_all(port: u16, requests: &[Value], disturb: impl FnOnce()) -> Vec<Answer> {
    let answers = try_all(port, requests, disturb).into_iter().zip(requests);
    answers.map(|(answer, request)| answer.unwrap_or_else(|error| panic!("{request}: {error}"))).collect()
}

/// Runs all requests at once; `disturb` is called when every stream has had a token.
fn try_all(port: u16, requests: &[Value], disturb: impl FnOnce()) -> Vec<Result<Answer, AskError>> {
    let begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let asked: Vec<_> = requests
            .iter()
            .map(|request| {
                let begun = &begun;
                let mut is_first = true;
                scope.spawn(move || {
                    let note = || {
                        begun.fetch_add(usize::from(is_first), Ordering::Relaxed);
                        is_first = false;
                    };
                    ask(port, request, note)
                })
            })
            .collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        while begun.load(Ordering::Relaxed) < requests.len() {
            assert!(Instant::now() < deadline, "not every stream begins");
            std::thread::sleep(Duration::from_millis(1));
        }
        disturb();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A series of `/metrics`.
fn metric(server: &Server, name: &str) -> f64 {
    let text = http::get(server.port(), "/metrics").unwrap().body;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

fn wait_for(what: &str, server: &Server, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}\n{}", server.log());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_healthy(server: &Server) -> bool {
    http::get(server.port(), "/health").is_ok_and(|answer| answer.status == 200)
}

/// Nothing is held, nothing is left over, and the service ends in order.
fn check_end(server: Server, num_shard: usize) {
    wait_for("health", &server, || is_healthy(&server));
    assert_eq!(server.blocks_used().unwrap(), 0);
    let family = [server.children("shard"), server.children("router")].concat();
    assert_eq!(family.len(), num_shard + 1);
    server.signal(Signal::SIGTERM);
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
    assert!(process_tree::wait_gone(&family, Duration::from_secs(2)).is_empty());
}

#[test]
fn a_killed_shard_costs_eight_streams_a_pause_and_nothing_else() {
    for num_shard in [1, 2] {
        let server = server(&["--num-shard", &num_shard.to_string()]);
        let Known { requests, answers: expected, .. } = known(&server, STREAMS);
        for rank in 0..num_shard {
            let resumed = metric(&server, "quartet_request_resumed");
            let answers = ask_all(server.port(), &requests, || {
                process_tree::send(server.children("shard")[rank], Signal::SIGKILL);
            });
            for ((answer, expected), request) in answers.iter().zip(&expected).zip(&requests) {
                answer.check(expected).unwrap_or_else(|difference| panic!("{request}: {difference}"));
            }
            let resumed = metric(&server, "quartet_request_resumed") - resumed;
            assert!(resumed > 0.0, "the kill must hit running streams");
        }
        check_end(server, num_shard);
    }
}

#[test]
fn all_shards_killed_at_once_and_requests_that_arrive_meanwhile() {
    let server = server(&["--num-shard", "2"]);
    let Known { requests, answers: expected, .. } = known(&server, STREAMS);
    let late = json!({"inputs": "a", "parameters": {"max_new_tokens": 3}});
    let answers = ask_all(server.port(), &requests, || {
        for pid in server.children("shard") {
            process_tree::send(pid, Signal::SIGKILL);
        }
        assert_eq!(http::post(server.port(), "/generate", &late).unwrap().status, 200);
    });
    for (answer, expected) in answers.iter().zip(&expected) {
        answer.check(expected).unwrap();
    }
    check_end(server, 2);
}

#[test]
fn a_shard_killed_while_nothing_runs_is_replaced_before_it_is_needed() {
    let server = server(&[]);
    let before = server.children("shard");
    process_tree::send(before[0], Signal::SIGKILL);
    wait_for("recovery", &server, || metric(&server, "quartet_recovery_count") == 1.0 && is_healthy(&server));
    assert_ne!(server.children("shard"), before);
    let answer = http::post(server.port(), "/generate", &json!({"inputs": "a"})).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    check_end(server, 1);
}

#[test]
fn a_killed_router_is_back_and_the_shards_have_dropped_its_batches() {
    let server = server(&["--num-shard", "2"]);
    let Known { requests, answers: expected, .. } = known(&server, STREAMS);
    let shards = server.children("shard");
    let answers = try_all(server.port(), &requests, || {
        process_tree::send(server.children("router")[0], Signal::SIGKILL);
    });
    // Whoever asks again is answered as soon as the new one listens.
    let next = json!({"inputs": "a", "parameters": {"max_new_tokens": 3}});
    wait_for("an answer", &server, || {
        http::post(server.port(), "/generate", &next).is_ok_and(|answer| answer.status == 200)
    });
    let is_lost = |answer: &Result<Answer, AskError>| matches!(answer, Err(AskError::Connection(_)));
    assert!(answers.iter().any(is_lost), "its connections die with it: {answers:?}");
    assert!(answers.iter().all(|answer| is_lost(answer) || answer.is_ok()), "{answers:?}");
    wait_for("recovery", &server, || server.log().contains("Recovering -> Serving"));
    assert_eq!(server.children("shard"), shards, "the weights stay loaded");
    assert_eq!(server.blocks_used().unwrap(), 0);
    for (answer, expected) in ask_all(server.port(), &requests, || ()).iter().zip(&expected) {
        answer.check(expected).unwrap();
    }
    check_end(server, 2);
}

#[test]
fn a_stopped_shard_is_found_killed_and_replaced() {
    let server = server(&["--num-shard", "2", "--stall-timeout", "10"]);
    let Known { requests, answers: expected, .. } = known(&server, STREAMS);
    let stopped = server.children("shard")[1];
    let answers = ask_all(server.port(), &requests, || process_tree::send(stopped, Signal::SIGSTOP));
    for (answer, expected) in answers.iter().zip(&expected) {
        answer.check(expected).unwrap();
    }
    assert!(!process_tree::is_alive(stopped));
    assert!(server.log().contains("stalled: it has not answered for"), "{}", server.log());
    check_end(server, 2);
}

#[test]
fn one_death_too_many_ends_streams_with_an_error_and_the_service_with_its_own_code() {
    let server = server(&["--max-restarts", "1"]);
    let family = server.children("router");
    process_tree::send(server.children("shard")[0], Signal::SIGKILL);
    wait_for("recovery", &server, || server.log().contains("Recovering -> Serving"));
    let answers = try_all(server.port(), &requests(STREAMS, LONG), || {
        process_tree::send(server.children("shard")[0], Signal::SIGKILL);
    });
    let is_told = |answer: &Result<Answer, AskError>| matches!(answer, Err(AskError::Refused(event)) if event.contains("\"error_type\":\"generation\""));
    assert!(answers.iter().any(is_told), "{answers:?}");
    assert!(answers.iter().all(|answer| is_told(answer) || answer.is_ok()), "{answers:?}");
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(16), "{}", exit.log);
    let cause = "shard rank 0 was ended by SIGKILL";
    let end = exit.log.trim_end().lines().rev().take(2).collect::<Vec<_>>().join("\n");
    assert!(end.contains(cause) && end.contains("failure 2 within 600 s"), "{end}");
    assert!(process_tree::wait_gone(&family, Duration::from_secs(2)).is_empty());
}

#[test]
fn a_stop_while_shards_are_replaced_still_finishes_the_streams() {
    let server = server(&[]);
    let Known { requests, answers: expected, .. } = known(&server, STREAMS);
    let answers = ask_all(server.port(), &requests, || {
        process_tree::send(server.children("shard")[0], Signal::SIGKILL);
        wait_for("recovery", &server, || server.log().contains("-> Recovering"));
        server.signal(Signal::SIGTERM);
    });
    for (answer, expected) in answers.iter().zip(&expected) {
        answer.check(expected).unwrap();
    }
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
}

#[test]
fn random_kills_are_noticed_by_nobody() {
    let choices = near_tie::CHOICES.to_string();
    let server = server(&["--num-shard", "2", "--max-restarts", "1000", "--max-top-n-tokens", &choices]);
    let known = known(&server, 12);
    let chaos = Chaos {
        streams: STREAMS,
        rounds: 12,
        longest_pause: Duration::from_millis(400),
        router_one_in: 0,
        stop_one_in: 0,
        seed: 7,
    };
    let report = chaos::run(&server, &chaos, &known).unwrap();
    assert!(report.errors.is_empty(), "{report:?}");
    assert_eq!((report.shard_kills, report.lost_with_router, report.blocks_left), (12, 0, 0));
    assert!(report.answers > 0);
    check_end(server, 2);
}

#[test]
fn a_near_tie_is_what_the_distribution_says_is_one() {
    let choices = near_tie::CHOICES.to_string();
    let server = server(&["--max-top-n-tokens", &choices]);
    let Known { requests, answers, .. } = known(&server, 8);
    let judge = |number: usize, answer: &Answer| {
        near_tie::parts_answers(server.port(), &requests[number], answer, &answers[number]).unwrap()
    };
    for (number, request) in requests.iter().enumerate() {
        // Some end early.
        let length = answers[number].tokens.len();
        for step in [0, 7, 20, length - 1].into_iter().filter(|&step| step < length) {
            // The draw and the distribution that are computed here are those the shard chose by.
            let fork = near_tie::fork(server.port(), request, step).unwrap();
            assert!(fork.is_near_tie(fork.chosen), "{request}, step {step}: {fork:?}");
            let unlikely = fork.choices.last().unwrap().0;
            let mut other = answers[number].clone();
            assert_eq!(other.tokens[step].id, fork.chosen);
            other.tokens[step].id = unlikely;
            assert_eq!(judge(number, &other), fork.is_near_tie(unlikely), "{request}, step {step}: {fork:?}");
        }
        let mut other = answers[number].clone();
        assert!(!judge(number, &other), "the same tokens part nowhere");
        // What comes before the step where answers part has no excuse.
        other.tokens[0].logprob += 1.0;
        other.tokens[1].id ^= 1;
        assert!(!judge(number, &other));
    }
    // Another draw than the seed's is no near-tie, although both answers are likely ones.
    let sampled = requests.iter().position(|request| request["parameters"]["do_sample"] == true).unwrap();
    let is_excused = (100..110).filter(|seed| {
        let mut request = requests[sampled].clone();
        request["parameters"]["seed"] = json!(seed);
        judge(sampled, &ask(server.port(), &request, || ()).unwrap())
    });
    assert_eq!(is_excused.count(), 0);
}
