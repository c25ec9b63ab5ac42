//! A server behind an ngrok edge: its visitors are served as those of the port are, whatever becomes of the tunnel.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::time::{Duration, Instant};

use integration_tests::fake_ngrok::FakeNgrok;
use integration_tests::golden::fixture;
use integration_tests::{Server, ServerBuilder, free_port, http};
use nix::sys::signal::Signal;
use process::ExitCode;
use serde_json::{Value, json};

const TOKEN: &str = "2hunter2_hunter3";

/// A server whose edge is `ngrok`'s.
fn behind(ngrok: &FakeNgrok, token: &str) -> ServerBuilder {
    tunnelled(token, &ngrok.address(), &ngrok.root_cas().display().to_string())
}

fn tunnelled(token: &str, address: &str, root_cas: &str) -> ServerBuilder {
    Server::of(fixture("tiny-llama"))
        .args(["--ngrok", "--ngrok-edge", "edghts_1"])
        .env("NGROK_AUTHTOKEN", token)
        .env("NGROK_SERVER_ADDR", address)
        .env("NGROK_ROOT_CAS", root_cas)
}

fn request(max_new_tokens: usize) -> Value {
    json!({"inputs": "a", "parameters": {"max_new_tokens": max_new_tokens, "do_sample": true, "seed": 1}})
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the tunnel was opened for the `count`th time and visitors get through: those that come before the agent has read
/// ngrok's answer are turned away.
fn wait_open(ngrok: &FakeNgrok, count: usize) -> Vec<Value> {
    let labels = ngrok.wait_opened(count).unwrap();
    eventually("a visitor gets through", || http::get(ngrok.edge(), "/health").is_ok());
    labels
}

/// What a process was started with, as everybody on the machine can read it.
fn command_line(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap()
}

fn last_text(stream: http::EventStream) -> Value {
    let events = stream.collect_events().unwrap();
    serde_json::from_str::<Value>(events.last().unwrap()).unwrap()["generated_text"].clone()
}

#[test]
fn visitors_are_served_as_those_of_the_port_are() {
    let ngrok = FakeNgrok::start(TOKEN).unwrap();
    let server = behind(&ngrok, TOKEN).start().unwrap();
    assert_eq!(wait_open(&ngrok, 1), [json!({"edge": "edghts_1"})]);
    let generate = |port| http::post(port, "/generate", &request(20)).unwrap().json().unwrap();
    assert_eq!(generate(ngrok.edge()), generate(server.port()));
    assert_eq!(http::get(ngrok.edge(), "/no-such-path").unwrap().status, 404);
    let stream = |port| last_text(http::stream(port, "/generate_stream", &request(50)).unwrap());
    let text = stream(ngrok.edge());
    assert!(text.is_string() && text == stream(server.port()), "{text}");
    // More than a window of the tunnel, and many at once.
    let prompts = "q".repeat(1_500_000);
    let long = http::post(ngrok.edge(), "/tokenize", &json!({"inputs": prompts})).unwrap();
    assert_eq!(long.json().unwrap().as_array().unwrap().len(), {
        http::post(server.port(), "/tokenize", &json!({"inputs": prompts}))
            .unwrap()
            .json()
            .unwrap()
            .as_array()
            .unwrap()
            .len()
    });
    std::thread::scope(|scope| {
        let visitors: Vec<_> = (0..64).map(|_| scope.spawn(|| stream(ngrok.edge()))).collect();
        assert!(visitors.into_iter().all(|visitor| visitor.join().unwrap() == text));
    });
}

#[test]
fn the_key_holds_for_visitors_and_the_token_is_nowhere_to_be_read() {
    let ngrok = FakeNgrok::start(TOKEN).unwrap();
    let server = behind(&ngrok, TOKEN).args(["--api-key", "k"]).env("LOG_LEVEL", "trace").start().unwrap();
    wait_open(&ngrok, 1);
    let ask = |key: &str| {
        let headers = [("content-type", "application/json"), ("authorization", key)];
        http::post_raw(ngrok.edge(), "/generate", &headers, &request(2).to_string()).unwrap().status
    };
    assert_eq!((ask("Bearer k"), ask("Bearer wrong")), (200, 401));
    for pid in server.family() {
        let words = command_line(pid);
        assert!(!words.contains(TOKEN), "{words}");
    }
    let environment =
        std::fs::read_to_string(format!("/proc/{}/environ", server.children("shard")[0])).unwrap();
    assert!(!environment.contains(TOKEN), "a shard has no tunnel");
    assert!(!http::get(server.port(), "/info").unwrap().body.contains(TOKEN));
    let log = server.log();
    assert!(log.contains("The ngrok tunnel to the edge edghts_1 is open"), "{log}");
    assert!(!log.contains(TOKEN), "{log}");
}

#[test]
fn a_drain_finishes_the_streams_of_visitors() {
    let ngrok = FakeNgrok::start(TOKEN).unwrap();
    let server = behind(&ngrok, TOKEN).start().unwrap();
    wait_open(&ngrok, 1);
    let mut streams: Vec<_> =
        (0..8).map(|_| http::stream(ngrok.edge(), "/generate_stream", &request(1000)).unwrap()).collect();
    for stream in &mut streams {
        stream.next().unwrap().unwrap();
    }
    server.signal(Signal::SIGTERM);
    eventually("/ready knows of it", || http::get(ngrok.edge(), "/ready").unwrap().status == 503);
    let refused = http::post(ngrok.edge(), "/generate", &request(1)).unwrap();
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.contains("shutting_down"), "{}", refused.body);
    std::thread::scope(|scope| {
        let ends: Vec<_> = streams.into_iter().map(|stream| scope.spawn(|| last_text(stream))).collect();
        assert!(ends.into_iter().all(|end| end.join().unwrap().is_string()));
    });
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
    assert_eq!(ngrok.closed(), 1, "the tunnel was not given back:\n{}", exit.log);
}

#[test]
fn a_wrong_token_is_one_line_and_nothing_starts_again() {
    let ngrok = FakeNgrok::start(TOKEN).unwrap();
    let exit = behind(&ngrok, "2wrong_wrong").run_to_exit().unwrap();
    // As upstream's launcher ends when its router cannot run; a restart would not change anything.
    assert_eq!(exit.status.code(), Some(ExitCode::Failure.into()), "{}", exit.log);
    assert_eq!(exit.log.matches("Starting router").count(), 1, "{}", exit.log);
    let ended = format!("router exited with code {} (", ExitCode::Usage.code());
    assert!(exit.log.contains(&ended), "{}", exit.log);
    let told = "ngrok does not take the token of --ngrok-authtoken (NGROK_AUTHTOKEN): ";
    let line = exit.log.lines().find(|line| line.contains(told)).unwrap();
    assert!(line.ends_with("it is invalid. Your authtoken: *** (ERR_NGROK_107)"), "{line}");
    assert!(!exit.log.contains("wrong_wrong") && !exit.log.contains("panicked"), "{}", exit.log);
}

#[test]
fn a_tunnel_that_breaks_or_falls_silent_is_opened_again() {
    let ngrok = FakeNgrok::start(TOKEN).unwrap();
    let server = behind(&ngrok, TOKEN).start().unwrap();
    wait_open(&ngrok, 1);
    let mut at_port = http::stream(server.port(), "/generate_stream", &request(1000)).unwrap();
    at_port.next().unwrap().unwrap();
    ngrok.cut();
    wait_open(&ngrok, 2);
    assert_eq!(http::post(ngrok.edge(), "/generate", &request(2)).unwrap().status, 200);
    assert!(last_text(at_port).is_string(), "the port has nothing to do with it");
    ngrok.set_silent(true);
    ngrok.wait_opened(3).unwrap();
    ngrok.set_silent(false);
    wait_open(&ngrok, 3);
    assert_eq!(http::post(ngrok.edge(), "/generate", &request(2)).unwrap().status, 200);
    let log = server.log();
    assert_eq!(log.matches("The ngrok tunnel broke: ").count(), 2, "{log}");
    assert_eq!(log.matches("ngrok gives no sign of life; next try in ").count(), 1, "{log}");
    // A visitor whose agent is gone costs nothing here.
    eventually("all blocks are free", || server.blocks_used().unwrap() == 0);
}

#[test]
fn an_ngrok_that_is_away_is_waited_for() {
    let port = free_port();
    let folder = tempfile::tempdir().unwrap();
    let root_cas = folder.path().join("ca.pem");
    std::fs::write(&root_cas, "").unwrap();
    let server =
        tunnelled(TOKEN, &format!("localhost:{port}"), &root_cas.display().to_string()).start().unwrap();
    assert_eq!(http::post(server.port(), "/generate", &request(2)).unwrap().status, 200);
    eventually("it is said", || server.log().contains("No ngrok tunnel: failed to establish tcp connection"));
    let away = server.log();
    assert!(away.contains("; next try in "), "{away}");
    let ngrok = FakeNgrok::start_at(TOKEN, port).unwrap();
    // Somebody else's certificate is somebody else's ngrok.
    eventually("it is not trusted", || server.log().contains("No ngrok tunnel: tls handshake error"));
    assert!(ngrok.wait_opened(0).unwrap().is_empty());
}
