//! What is wrong gets one clear line or the right HTTP error, and the server stays up or exits with its code.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::fs;
use std::path::Path;

use integration_tests::golden::fixture;
use integration_tests::{Server, http};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of the tiny model, to be spoilt.
fn copy_of_model() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("tiny-llama")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// The launcher must end with `code` and say all of `words` in one line.
fn expect_exit(model: &Path, args: &[&str], code: i32, words: &[&str]) {
    let exit = Server::of(model).args(args.iter().copied()).run_to_exit().unwrap();
    assert_eq!(exit.status.code(), Some(code), "{}", exit.log);
    let said = exit.log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(said, "no line with {words:?} in:\n{}", exit.log);
    assert!(!exit.log.contains("panicked"), "{}", exit.log);
}

#[test]
fn unknown_architecture() {
    let model = copy_of_model();
    let path = model.path().join("config.json");
    let text = fs::read_to_string(&path)
        .unwrap()
        .replace("\"llama\"", "\"nosuch\"")
        .replace("LlamaFor", "NoSuchFor");
    fs::write(path, text).unwrap();
    expect_exit(model.path(), &[], 1, &["nosuch", "llama"]);
}

#[test]
fn truncated_weights() {
    let model = copy_of_model();
    let path = model.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    expect_exit(model.path(), &[], 1, &["model.safetensors"]);
}

#[test]
fn missing_tokenizer() {
    let model = copy_of_model();
    fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    expect_exit(model.path(), &[], 1, &["tokenizer.json"]);
}

#[test]
fn missing_model() {
    expect_exit(Path::new("/nonexistent/model"), &[], 1, &["/nonexistent/model"]);
}

#[test]
fn quantized_checkpoint_is_refused() {
    let model = copy_of_model();
    let path = model.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
    fs::write(path, config.to_string()).unwrap();
    expect_exit(model.path(), &[], 1, &["gptq"]);
}

#[test]
fn port_in_use() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    let exit = Server::of(fixture("tiny-llama")).port(port).run_to_exit().unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", exit.log);
    let said = exit.log.lines().any(|line| line.contains(&port.to_string()) && line.contains("--port"));
    assert!(said, "{}", exit.log);
}

#[test]
fn socket_path_too_long() {
    let long = format!("/tmp/{}", "x".repeat(120));
    expect_exit(&fixture("tiny-llama"), &["--shard-uds-path", &long], 2, &["--shard-uds-path"]);
}

#[test]
fn unknown_flag() {
    expect_exit(&fixture("tiny-llama"), &["--no-such-flag"], 2, &["--no-such-flag"]);
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let args = [
        "--max-input-tokens",
        "10",
        "--max-total-tokens",
        "10",
        "--validation-workers",
        "0",
        "--quantize",
        "gptq",
    ];
    let exit = Server::of(fixture("tiny-llama")).args(args).run_to_exit().unwrap();
    assert_eq!(exit.status.code(), Some(1), "{}", exit.log);
    for word in ["max_input_tokens", "validation_workers", "quantize"] {
        assert!(exit.log.replace('-', "_").contains(word), "{word} is not in:\n{}", exit.log);
    }
}

#[test]
fn requests_are_refused_as_tgi_refuses_them() {
    let server = Server::of(fixture("tiny-llama"))
        .args(["--max-input-tokens", "32", "--max-total-tokens", "64"])
        .start()
        .unwrap();
    let port = server.port();
    let json_type = [("content-type", "application/json")];
    let refused = |body: Value| {
        let response = http::post(port, "/generate", &body).unwrap();
        (response.status, response.json().unwrap())
    };
    let (status, body) = refused(json!({"inputs": ""}));
    assert_eq!(status, 422);
    assert_eq!(body["error"], "Input validation error: `inputs` cannot be empty");
    assert_eq!(body["error_type"], "validation");
    let (status, body) = refused(json!({"inputs": "x".repeat(100), "parameters": {"max_new_tokens": 1}}));
    assert_eq!(status, 422);
    assert!(body["error"].as_str().unwrap().starts_with("Input validation error: `inputs`"), "{body}");
    let (status, body) = refused(json!({"inputs": "a", "parameters": {"temperature": 0.0}}));
    assert_eq!(status, 422);
    assert_eq!(body["error"], "Input validation error: `temperature` must be strictly positive");

    let broken = http::post_raw(port, "/generate", &json_type, "{\"inputs\": ").unwrap();
    assert_eq!(broken.status, 400, "{}", broken.body);
    assert!(broken.body.starts_with("Failed to parse the request body as JSON: "), "{}", broken.body);
    let wrong = http::post_raw(port, "/generate", &json_type, "{\"inputs\": 3}").unwrap();
    assert_eq!(wrong.status, 422, "{}", wrong.body);
    let bare = http::post_raw(port, "/generate", &[], "{\"inputs\": \"a\"}").unwrap();
    assert_eq!(bare.status, 415, "{}", bare.body);
    assert_eq!(http::get(port, "/nowhere").unwrap().status, 404);
    assert_eq!(http::get(port, "/generate").unwrap().status, 405);

    // After all that it still serves.
    assert_eq!(refused(json!({"inputs": "a", "parameters": {"max_new_tokens": 3}})).0, 200);
}
