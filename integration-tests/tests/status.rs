//! `launcher status`, the probes and the start-up ledger of the real programs.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::time::{Duration, Instant};

use integration_tests::golden::fixture;
use integration_tests::{Server, http, process_tree};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn ask(server: &Server) -> Value {
    let (code, text) = server.status(&["--json"]).unwrap();
    assert_eq!(code, Some(0), "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_running_launcher_tells_what_it_does() {
    let mut server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).start().unwrap();
    let mut stream = http::stream(
        server.port(),
        "/generate_stream",
        &json!({"inputs": "a", "parameters": {"max_new_tokens": 2000, "do_sample": true, "seed": 1}}),
    )
    .unwrap();
    stream.next().unwrap().unwrap();
    let found = ask(&server);
    assert_eq!(found.as_array().unwrap().len(), 1);
    let status = &found[0];
    assert_eq!(status["pid"], server.pid());
    assert_eq!(status["router"]["address"], format!("127.0.0.1:{}", server.port()));
    assert_eq!(status["router"]["pid"], server.children("router")[0]);
    assert_eq!(status["router"]["requests_in_flight"], 1, "{status}");
    assert_eq!(status["device"], "cpu");
    for (rank, pid) in server.children("shard").into_iter().enumerate() {
        let shard = &status["ranks"][rank];
        assert_eq!((&shard["rank"], &shard["pid"]), (&json!(rank), &json!(pid)), "{status}");
        assert!(shard["steps_started"].as_u64() >= Some(1) && shard["blocks_used"].as_u64() >= Some(1));
    }
    stream.hang_up();

    process_tree::send(server.children("shard")[1], Signal::SIGKILL);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = ask(&server);
        if status[0]["phase"] == "Serving" && status[0]["restarts"]["used"] == 1 {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
    }
    let text = server.status(&[]).unwrap().1;
    assert!(text.contains("restarts: 1 of ") && text.contains("shard rank 1: pid "), "{text}");

    // A launcher that was killed is found by nobody.
    server.signal(Signal::SIGKILL);
    while server.try_wait().unwrap().is_none() {}
    assert_eq!(server.status(&["--json"]).unwrap(), (Some(1), "[]\n".to_string()));
}

#[test]
fn a_launcher_that_waits_for_its_model_tells_so() {
    // A Hub that takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let server = Server::of("org/model")
        .env("HF_HUB_OFFLINE", "0")
        .env("HF_ENDPOINT", format!("http://{}", silent.local_addr().unwrap()))
        .env("HUGGINGFACE_HUB_CACHE", cache.path().display().to_string())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.status(&["--json"]).unwrap().0 != Some(0) {
        assert!(Instant::now() < deadline, "{}", server.log());
    }
    let status = ask(&server);
    assert_eq!((&status[0]["phase"], &status[0]["router"]), (&json!("Downloading"), &Value::Null));
    server.signal(Signal::SIGTERM);
    let exit = server.wait().unwrap();
    assert_eq!(exit.status.code(), Some(0), "{}", exit.log);
}

/// In milliseconds.
fn sum(phases: &Value) -> f64 {
    let phases = phases.as_array().unwrap_or_else(|| panic!("no phases: {phases}"));
    phases.iter().map(|phase| phase["ms"].as_f64().unwrap()).sum()
}

#[test]
fn the_phases_of_the_start_sum_to_its_time() {
    let began = Instant::now();
    let server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).start().unwrap();
    let outside = began.elapsed().as_secs_f64() * 1e3;
    let info = http::get(server.port(), "/info").unwrap().json().unwrap();
    let startup = &info["startup"];
    let total = startup["total_ms"].as_f64().unwrap();
    let difference = (sum(&startup["phases"]) - total).abs();
    assert!(difference <= 0.05 * total, "{difference} ms of {total} are nobody's: {startup}");
    assert!(total <= outside, "{total} ms within {outside} ms");
    let name = |phase: &Value| phase["phase"].as_str().unwrap().to_string();
    let names: Vec<String> = startup["phases"].as_array().unwrap().iter().map(name).collect();
    assert_eq!(names, ["checks", "model files and plan", "shards", "warm-up", "tokenizer", "listen"]);

    // The slowest rank is what the phase `shards` waited for.
    let shards = startup["phases"][2]["ms"].as_f64().unwrap();
    let ranks = startup["ranks"].as_array().unwrap();
    let slowest = ranks.iter().map(|rank| sum(&rank["phases"])).fold(0.0, f64::max);
    assert_eq!(ranks.len(), 2);
    // Between the end of a rank's last phase and the launcher's knowing it lies the scheduler: milliseconds, of a start of fifty.
    assert!(slowest <= shards + 0.05 * total, "{shards} and {slowest}: {startup}");
    assert!(slowest >= 0.5 * shards, "{shards} and {slowest}: {startup}");
    let metrics = http::get(server.port(), "/metrics").unwrap().body;
    for series in [
        "quartet_startup_seconds ",
        "quartet_startup_phase_seconds{process=\"all\",rank=\"\",phase=\"shards\"} ",
        "quartet_startup_phase_seconds{process=\"shard\",rank=\"1\",phase=\"weights\"} ",
        "quartet_startup_phase_seconds{process=\"router\",rank=\"\",phase=\"tokenizer and template\"} ",
    ] {
        assert!(metrics.contains(series), "no {series} in {metrics}");
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while !["Start-up of shard rank 1: process ", "Start-up of the router: "]
        .iter()
        .all(|line| server.log().contains(line))
    {
        assert!(Instant::now() < deadline, "{}", server.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}
