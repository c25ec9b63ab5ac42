//! The router in front of real shards: chat, metrics, overload, clients that leave, the benchmark beside it.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::process::Command;
use std::time::{Duration, Instant};

use integration_tests::golden::fixture;
use integration_tests::{Server, http, program};
use proto::ShardClient;
use serde_json::{Value, json};

/// KV blocks held on rank 0.
fn blocks_used(server: &Server) -> u64 {
    let socket = server.socket(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = ShardClient::connect(socket).await.unwrap();
        client.status().await.unwrap().blocks_used
    })
}

fn metric(server: &Server, name: &str) -> f64 {
    let text = http::get(server.port(), "/metrics").unwrap().body;
    let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    value.unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse().unwrap()
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < end, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn chat_is_the_same_streamed_and_not() {
    let server = Server::of(fixture("tiny-llama")).start().unwrap();
    let mut body = json!({
        "model": "tgi",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 20, "temperature": 0.0,
    });
    let answer = http::post(server.port(), "/v1/chat/completions", &body).unwrap().json().unwrap();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["usage"]["completion_tokens"], 20);
    body["stream"] = json!(true);
    let events =
        http::stream(server.port(), "/v1/chat/completions", &body).unwrap().collect_events().unwrap();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks = events[..events.len() - 1].iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
    let streamed: String =
        chunks.map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap().to_string()).collect();
    assert_eq!(streamed, text);
}

#[test]
fn info_models_tokenize_and_metrics_answer() {
    let server = Server::of(fixture("tiny-llama")).start().unwrap();
    let info = http::get(server.port(), "/info").unwrap().json().unwrap();
    assert_eq!(info["max_total_tokens"], 2048);
    let models = http::get(server.port(), "/v1/models").unwrap().json().unwrap();
    assert_eq!(models["data"][0]["object"], "model");
    let tokens =
        http::post(server.port(), "/tokenize", &json!({"inputs": "the cat"})).unwrap().json().unwrap();
    let text: String =
        tokens.as_array().unwrap().iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text, "the cat");
    http::post(server.port(), "/generate", &json!({"inputs": "a", "parameters": {"max_new_tokens": 4}}))
        .unwrap();
    assert_eq!(metric(&server, "tgi_request_success"), 1.0);
}

#[test]
fn a_client_that_leaves_frees_its_blocks_and_its_place() {
    let server = Server::of(fixture("tiny-llama")).args(["--max-concurrent-requests", "2"]).start().unwrap();
    let body = json!({"inputs": "a", "parameters": {"max_new_tokens": 2000, "do_sample": true, "seed": 3}});
    let mut streams: Vec<_> =
        (0..2).map(|_| http::stream(server.port(), "/generate_stream", &body).unwrap()).collect();
    for stream in &mut streams {
        stream.next().unwrap().unwrap();
    }
    let full = http::post(server.port(), "/generate", &body).unwrap();
    assert_eq!(full.status, 429, "{}", full.body);
    assert_eq!(full.json().unwrap()["error"], "Model is overloaded");
    assert!(metric(&server, "tgi_batch_current_size") > 0.0);
    for stream in streams {
        stream.hang_up();
    }
    eventually("the batch is gone", || metric(&server, "tgi_batch_current_size") == 0.0);
    eventually("the shard holds no block", || blocks_used(&server) == 0);
    let short = json!({"inputs": "a", "parameters": {"max_new_tokens": 2}});
    assert_eq!(http::post(server.port(), "/generate", &short).unwrap().status, 200);
}

#[test]
fn long_prompts_join_a_running_batch_in_chunks() {
    let server =
        Server::of(fixture("tiny-llama")).args(["--max-batch-prefill-tokens", "64"]).start().unwrap();
    let ask = |words: usize| {
        let prompt = "the cat in the hat ".repeat(words);
        let body = json!({"inputs": prompt, "parameters": {"max_new_tokens": 16, "details": true, "do_sample": false}});
        let response = http::post(server.port(), "/generate", &body).unwrap();
        assert_eq!(response.status, 200, "{}", response.body);
        let tokens = response.json().unwrap()["details"]["tokens"].clone();
        tokens.as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    let sizes = [3, 20, 7, 40];
    let alone: Vec<_> = sizes.iter().map(|&words| ask(words)).collect();
    let ask = &ask;
    let together: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = sizes.iter().map(|&words| scope.spawn(move || ask(words))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn the_benchmark_attaches_to_the_same_shards() {
    let server = Server::of(fixture("tiny-llama")).args(["--num-shard", "2"]).start().unwrap();
    let report = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(program("benchmark"))
        .args(["--tokenizer-name".as_ref(), fixture("tiny-llama").as_os_str()])
        .args(["--master-shard-uds-path".as_ref(), server.socket(0).as_os_str()])
        .args(["--batch-size", "1", "--batch-size", "4", "--runs", "3", "--no-tui", "--output-json"])
        .arg(report.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for word in ["Parameter", "Decode (token)", "tokens/secs"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(report.path()).unwrap()).unwrap();
    assert!(report.is_object());
    let answer = http::post(server.port(), "/generate", &json!({"inputs": "a"})).unwrap();
    assert_eq!(answer.status, 200, "the server works on after a benchmark: {}", answer.body);
}
