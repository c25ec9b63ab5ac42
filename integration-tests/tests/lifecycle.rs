//! Processes: nothing is left behind, nothing hangs, every end has its documented exit code.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::time::{Duration, Instant};

use integration_tests::golden::fixture;
use integration_tests::{Server, http, process_tree};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn long_request() -> Value {
    json!({"inputs": "a", "parameters": {"max_new_tokens": 400, "details": true, "do_sample": false}})
}

fn family(server: &Server) -> Vec<i32> {
    let mut pids = server.children("shard");
    pids.extend(server.children("router"));
    pids
}

#[test]
fn sigterm_lets_streams_finish_and_exits_with_0() {
    let server = Server::of(fixture("tiny-llama")).start().unwrap();
    let pids = family(&server);
    assert_eq!(pids.len(), 2);
    let mut stream = http::stream(server.port(), "/generate_stream", &long_request()).unwrap();
    stream.next().unwrap().unwrap();
    server.signal(Signal::SIGTERM);
    let events = stream.collect_events().unwrap();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert!(last["generated_text"].is_string(), "the stream did not reach its end: {last}");
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
    assert!(process_tree::wait_gone(&pids, Duration::from_secs(2)).is_empty());
}

#[test]
fn a_second_signal_ends_everything_at_once() {
    let server = Server::of(fixture("tiny-llama")).start().unwrap();
    let pids = family(&server);
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 2000, "do_sample": true, "seed": 1}});
    let mut stream = http::stream(server.port(), "/generate_stream", &body).unwrap();
    stream.next().unwrap().unwrap();
    server.signal(Signal::SIGINT);
    std::thread::sleep(Duration::from_millis(50));
    server.signal(Signal::SIGINT);
    server.wait().unwrap();
    assert!(process_tree::wait_gone(&pids, Duration::from_secs(2)).is_empty());
}

#[test]
fn without_restarts_a_killed_shard_takes_the_rest_down_and_is_reported() {
    let flags = ["--num-shard", "2", "--max-restarts", "0"];
    let server = Server::of(fixture("tiny-llama")).args(flags).start().unwrap();
    let pids = family(&server);
    assert_eq!(pids.len(), 3);
    process_tree::send(server.children("shard")[1], Signal::SIGKILL);
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", exit.log);
    assert!(exit.log.contains("ShardFailed"), "{}", exit.log);
    assert!(process_tree::wait_gone(&pids, Duration::from_secs(2)).is_empty());
}

#[test]
fn without_restarts_a_killed_router_takes_the_rest_down_and_is_reported() {
    let server = Server::of(fixture("tiny-llama")).args(["--max-restarts", "0"]).start().unwrap();
    let pids = family(&server);
    process_tree::send(server.children("router")[0], Signal::SIGKILL);
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", exit.log);
    assert!(exit.log.contains("WebserverFailed"), "{}", exit.log);
    assert!(process_tree::wait_gone(&pids, Duration::from_secs(2)).is_empty());
}

#[test]
fn a_killed_launcher_leaves_no_orphan() {
    let server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).start().unwrap();
    let pids = family(&server);
    assert_eq!(pids.len(), 3);
    server.signal(Signal::SIGKILL);
    assert_eq!(process_tree::wait_gone(&pids, Duration::from_secs(10)), Vec::<i32>::new());
}

#[test]
fn two_servers_of_one_model_run_side_by_side() {
    let first = Server::of(fixture("tiny-llama")).start().unwrap();
    let second = Server::of(fixture("tiny-llama")).start().unwrap();
    for server in [&first, &second] {
        let answer = http::post(server.port(), "/generate", &json!({"inputs": "a"})).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
}

/// Of the launcher alone, with two shards and a router that have nothing to do.
#[test]
fn an_idle_launcher_takes_less_than_15_mib_and_a_thousandth_of_a_core() {
    let server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).start().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    // What the start left to do may take a moment.
    loop {
        let (began, before) = (Instant::now(), process_tree::cpu_seconds(server.pid()));
        std::thread::sleep(Duration::from_secs(2));
        let share = (process_tree::cpu_seconds(server.pid()) - before) / began.elapsed().as_secs_f64();
        if share < 0.001 {
            break;
        }
        assert!(Instant::now() < deadline, "{:.3} % of a core for nothing", share * 100.0);
    }
    let resident = process_tree::resident_kib(server.pid());
    assert!((1..15 << 10).contains(&resident), "{resident} KiB");
}
