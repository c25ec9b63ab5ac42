//! A service that is asked to stop: nobody is cut off within the time, everybody is told at its end.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::time::{Duration, Instant};

use integration_tests::golden::fixture;
use integration_tests::{Server, http, process_tree};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const STREAMS: usize = 64;

fn request(max_new_tokens: usize, seed: usize) -> Value {
    json!({"inputs": "a", "parameters": {"max_new_tokens": max_new_tokens, "do_sample": true, "seed": seed}})
}

/// Streams that have had their first token.
fn begin(server: &Server, max_new_tokens: usize) -> Vec<http::EventStream> {
    let mut streams: Vec<_> = (0..STREAMS)
        .map(|seed| http::stream(server.port(), "/generate_stream", &request(max_new_tokens, seed)).unwrap())
        .collect();
    for stream in &mut streams {
        stream.next().unwrap().unwrap();
    }
    streams
}

/// The last event of each stream.
fn ends(streams: Vec<http::EventStream>) -> Vec<Value> {
    let last = |stream: http::EventStream| {
        let events = stream.collect_events().unwrap();
        serde_json::from_str(events.last().expect("an event")).unwrap()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || last(stream))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn server(flags: &[&str]) -> Server {
    Server::of(fixture("tiny-llama")).args(flags.iter().copied()).start().unwrap()
}

#[test]
fn sixty_four_streams_are_finished_and_what_is_new_is_refused() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let server = server(&["--num-shard", "2"]);
        let family = server.family();
        let streams = begin(&server, 1000);
        server.signal(signal);
        let deadline = Instant::now() + Duration::from_secs(60);
        while http::get(server.port(), "/ready").unwrap().status == 200 {
            assert!(Instant::now() < deadline, "/ready does not know of {signal}");
        }
        let refused = http::post(server.port(), "/generate", &request(1, 0)).unwrap();
        assert_eq!(refused.status, 503, "{}", refused.body);
        assert!(refused.body.contains("shutting_down"), "{}", refused.body);
        assert_eq!(http::get(server.port(), "/live").unwrap().status, 200);
        for end in ends(streams) {
            assert!(end["generated_text"].is_string(), "a stream did not reach its end: {end}");
        }
        let exit = server.wait().unwrap();
        assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
        assert!(process_tree::wait_gone(&family, Duration::from_secs(10)).is_empty());
    }
}

#[test]
fn at_the_deadline_each_stream_ends_with_an_error_event() {
    let server = server(&["--graceful-termination-timeout", "0"]);
    let family = server.family();
    let streams = begin(&server, 2000);
    server.signal(Signal::SIGTERM);
    let ends = ends(streams);
    let is_told = |end: &&Value| end["error_type"] == "generation";
    assert!(ends.iter().any(|end| is_told(&end)), "{ends:?}");
    for end in &ends {
        assert!(is_told(&end) || end["generated_text"].is_string(), "{end}");
    }
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
    assert!(process_tree::wait_gone(&family, Duration::from_secs(10)).is_empty());
}
