//! The router's log as a log collector reads it: upstream's shape, with a line for each request.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use integration_tests::golden::fixture;
use integration_tests::{Server, http};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};

/// The router's JSON lines: those that have their fields at the top.
fn router_lines(log: &str) -> Vec<Map<String, Value>> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Map<String, Value>>(line).ok());
    lines.filter(|line| line.contains_key("message")).collect()
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_request_leaves_a_json_line_that_tells_where_its_time_went() {
    let server = Server::of(fixture("tiny-llama")).args(["--json-output"]).start().unwrap();
    let parameters = json!({"max_new_tokens": 3, "do_sample": true, "best_of": 2});
    let body = json!({"inputs": "Hello", "parameters": parameters});
    assert_eq!(http::post(server.port(), "/generate", &body).unwrap().status, 200);
    let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 3}});
    http::stream(server.port(), "/generate_stream", &body).unwrap().collect_events().unwrap();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3});
    assert_eq!(http::post(server.port(), "/v1/chat/completions", &chat).unwrap().status, 200);
    let body = json!({"inputs": "Hello", "stream": false, "parameters": {"max_new_tokens": 3}});
    assert_eq!(http::post(server.port(), "/", &body).unwrap().status, 200);
    let refused = json!({"inputs": "Hello", "parameters": {"temperature": -1.0}});
    assert_eq!(http::post(server.port(), "/generate", &refused).unwrap().status, 422);
    server.signal(Signal::SIGTERM);
    let log = server.wait().unwrap().log;

    let lines = router_lines(&log);
    let connected = lines.iter().find(|line| line["message"] == "Connected").unwrap();
    let shape = ["timestamp", "level", "message", "target", "filename", "line_number"];
    assert_eq!(keys(&Value::Object(connected.clone())), shape);
    let successes: Vec<&Map<String, Value>> =
        lines.iter().filter(|line| line["message"] == "Success").collect();
    let names: Vec<&Value> = successes.iter().map(|line| &line["span"]["name"]).collect();
    assert_eq!(
        names,
        ["generate", "generate_stream", "chat_completions", "generate"],
        "one line each: {log}"
    );
    for line in &successes {
        assert_eq!(keys(&Value::Object((*line).clone()))[..6], shape);
        assert_eq!((&line["level"], line["spans"].is_array()), (&json!("INFO"), true));
        for field in
            ["total_time", "validation_time", "queue_time", "inference_time", "time_per_token", "seed"]
        {
            assert!(line["span"][field].as_str().is_some_and(|value| !value.is_empty()), "{field}: {line:?}");
        }
    }
    let parameters = successes[0]["span"]["parameters"].as_str().unwrap();
    assert!(
        parameters.starts_with("GenerateParameters { best_of: Some(2), temperature: None, "),
        "{parameters}"
    );
    assert!(parameters.ends_with("grammar: None, adapter_id: None }"), "{parameters}");
    assert!(successes[0]["span"]["seed"].as_str().unwrap().starts_with("Some("), "{log}");
    assert_eq!(successes[1]["span"]["seed"], "None");
    let nested: Vec<&Value> =
        successes[3]["spans"].as_array().unwrap().iter().map(|span| &span["name"]).collect();
    assert_eq!(nested, ["compat_generate", "generate"]);
    let refusal =
        lines.iter().find(|line| line["message"].as_str().unwrap().starts_with("Input validation error"));
    assert_eq!(
        (&refusal.unwrap()["level"], &refusal.unwrap()["span"]["name"]),
        (&json!("INFO"), &json!("generate"))
    );
}

#[test]
fn the_text_log_has_the_request_in_front_of_its_line() {
    let server = Server::of(fixture("tiny-llama")).env("LOG_COLORIZE", "1").start().unwrap();
    let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 3}});
    assert_eq!(http::post(server.port(), "/generate", &body).unwrap().status, 200);
    server.signal(Signal::SIGTERM);
    let log = server.wait().unwrap().log;
    let line = log.lines().find(|line| line.ends_with(": Success")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(" INFO generate{parameters=GenerateParameters { best_of: None"), "{line}");
    for field in [
        " total_time=\"",
        " validation_time=\"",
        " queue_time=\"",
        " inference_time=\"",
        " time_per_token=\"",
    ] {
        assert_eq!(line.matches(field).count(), 1, "{field}: {line}");
    }
    assert!(line.contains(" seed=\"None\"}: router::"), "{line}");
}
