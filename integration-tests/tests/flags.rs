//! Options of the launcher, by what they change in the program that uses them.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use integration_tests::golden::fixture;
use integration_tests::http::Response;
use integration_tests::{Server, http};
use nix::sys::signal::Signal;
use proto::ShardClient;
use proto::control::StatusResponse;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

fn serve(flags: &[&str]) -> Server {
    Server::of(fixture("tiny-llama")).args(flags.iter().copied()).start().unwrap()
}

fn generate(server: &Server, parameters: Value) -> Response {
    http::post(server.port(), "/generate", &json!({"inputs": "a", "parameters": parameters})).unwrap()
}

fn metric(server: &Server, name: &str) -> f64 {
    let text = http::get(server.port(), "/metrics").unwrap().body;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse().unwrap()
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the first shard says of itself: the type of its weights, and its counters.
fn shard(server: &Server) -> (String, StatusResponse) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = ShardClient::connect(server.socket(0)).await.unwrap();
        (client.info().await.unwrap().dtype, client.status().await.unwrap())
    })
}

/// Names of a process's threads that begin with `name`.
fn threads(pid: i32, name: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|found| found.starts_with(name)).count()
}

fn copy(from: &Path, to: &Path, names: &[&str]) {
    fs::create_dir_all(to).unwrap();
    for name in names {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// A tokenizer configuration whose chat template says `text`.
fn template(text: &str) -> String {
    json!({"chat_template": text, "bos_token": "<s>", "eos_token": "</s>"}).to_string()
}

fn templated(server: &Server) -> Value {
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    http::post(server.port(), "/chat_tokenize", &chat).unwrap().json().unwrap()["templated_text"].clone()
}

#[test]
fn requests_have_the_limits_of_the_flags() {
    let server = serve(&[
        "--max-best-of",
        "3",
        "--max-stop-sequences",
        "1",
        "--max-top-n-tokens",
        "2",
        "--max-client-batch-size",
        "2",
        "--payload-limit",
        "1000",
        "--max-input-length",
        "8",
        "--max-total-tokens",
        "40",
    ]);
    let port = server.port();
    let refused = |response: Response, text: &str| {
        assert_eq!(response.status, 422, "{}", response.body);
        assert!(response.body.contains(text), "no {text}: {}", response.body);
    };
    let accepted = |response: Response| assert_eq!(response.status, 200, "{}", response.body);
    accepted(generate(&server, json!({"best_of": 3, "do_sample": true, "max_new_tokens": 2})));
    refused(
        generate(&server, json!({"best_of": 4, "do_sample": true})),
        "`best_of` must be > 0 and <= 3. Given: 4",
    );
    accepted(generate(&server, json!({"stop": ["x"], "top_n_tokens": 2, "max_new_tokens": 2})));
    refused(
        generate(&server, json!({"stop": ["x", "y"]})),
        "`stop` supports up to 1 stop sequences. Given: 2",
    );
    refused(generate(&server, json!({"top_n_tokens": 3})), "`top_n_tokens` must be >= 0 and <= 2. Given: 3");
    refused(generate(&server, json!({"max_new_tokens": 40})), "must be <= 40");
    let prompt = |text: &str| {
        http::post(port, "/generate", &json!({"inputs": text, "parameters": {"max_new_tokens": 2}}))
    };
    let tokens = |text: &str| {
        let answer = http::post(port, "/tokenize", &json!({"inputs": text})).unwrap().json().unwrap();
        answer.as_array().unwrap().len()
    };
    let (short, long) = ("q".repeat(4), "q".repeat(30));
    assert!(tokens(&short) < 8 && tokens(&long) > 8);
    accepted(prompt(&short).unwrap());
    refused(prompt(&long).unwrap(), "`inputs` must have less than 8 tokens");
    let complete = |prompts: &[&str]| {
        http::post(port, "/v1/completions", &json!({"model": "tgi", "prompt": prompts, "max_tokens": 2}))
            .unwrap()
    };
    accepted(complete(&["a", "b"]));
    refused(complete(&["a", "b", "c"]), "2");
    assert_eq!(prompt(&"q".repeat(1000)).unwrap().status, 413);
    let info = http::get(port, "/info").unwrap().json().unwrap();
    for (name, value) in [("max_best_of", 3), ("max_stop_sequences", 1), ("max_input_tokens", 8)] {
        assert_eq!(info[name], value, "{info}");
    }
}

#[test]
fn programs_have_the_threads_they_are_given() {
    for (threads_of_shard, workers) in [(1, 1), (3, 5)] {
        let (shard_flag, router_flag) = (threads_of_shard.to_string(), workers.to_string());
        let server = serve(&["--threads", &shard_flag, "--validation-workers", &router_flag]);
        let (shard, router) = (server.children("shard")[0], server.children("router")[0]);
        let computing = threads(shard, "engine") + threads(shard, "cpu-worker");
        assert_eq!((computing, threads(router, "tokenizer-")), (threads_of_shard, workers));
    }
}

#[test]
fn weights_have_the_type_that_is_asked_for() {
    for (flags, dtype) in [
        (&[][..], "torch.float32"),
        (&["--dtype", "bfloat16"], "torch.bfloat16"),
        (&["--dtype", "float16"], "torch.float16"),
    ] {
        let server = serve(flags);
        assert_eq!(shard(&server).0, dtype, "{flags:?}");
        assert_eq!(generate(&server, json!({"max_new_tokens": 3})).status, 200);
    }
}

#[test]
fn the_cache_has_the_share_of_memory_that_it_is_given() {
    // Without the option it holds 128 sequences of full length, which take far more than this share of any machine.
    let usual = shard(&serve(&[])).1.blocks_total;
    let small = shard(&serve(&["--cuda-memory-fraction", "0.0001", "--max-batch-prefill-tokens", "16"]));
    let small = small.1.blocks_total;
    assert!(small > 0 && small < usual, "{small} of {usual}");
}

#[test]
fn a_prompt_is_computed_in_steps_of_the_size_that_is_given() {
    let server = serve(&["--max-batch-prefill-tokens", "16"]);
    let text = "the cat in the hat ".repeat(3);
    let tokens = http::post(server.port(), "/tokenize", &json!({"inputs": text})).unwrap().json().unwrap();
    let num_tokens = tokens.as_array().unwrap().len();
    assert!(num_tokens > 32, "{num_tokens}");
    let body = json!({"inputs": text, "parameters": {"max_new_tokens": 1}});
    assert_eq!(http::post(server.port(), "/generate", &body).unwrap().status, 200);
    let further = metric(&server, r#"tgi_batch_inference_count{method="decode"}"#);
    assert_eq!(
        further as usize,
        num_tokens.div_ceil(16) - 1,
        "pieces of {num_tokens} tokens after the first"
    );
}

#[test]
fn a_batch_has_as_many_requests_as_are_allowed() {
    let server = serve(&["--max-batch-size", "1"]);
    let open = || {
        let body =
            json!({"inputs": "a", "parameters": {"max_new_tokens": 2000, "do_sample": true, "seed": 1}});
        http::stream(server.port(), "/generate_stream", &body).unwrap()
    };
    let mut first = open();
    first.next().unwrap().unwrap();
    let mut second = open();
    eventually("the second waits", || metric(&server, "tgi_queue_size") == 1.0);
    assert_eq!(metric(&server, "tgi_batch_current_size"), 1.0);
    first.hang_up();
    second.next().unwrap().unwrap();
    assert_eq!(metric(&server, "tgi_batch_current_size"), 1.0);
    second.hang_up();
}

#[test]
fn the_tokenizer_configuration_is_replaced() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("other.json");
    fs::write(&path, template("the given one")).unwrap();
    let server = serve(&["--tokenizer-config-path", path.to_str().unwrap()]);
    assert_eq!(templated(&server), "the given one");
}

#[test]
fn weights_come_from_the_override_directory() {
    let place = tempfile::tempdir().unwrap();
    let (model, weights) = (place.path().join("model"), place.path().join("weights"));
    copy(&fixture("tiny-llama"), &model, &["config.json", "tokenizer.json", "tokenizer_config.json"]);
    copy(&fixture("tiny-llama"), &weights, &["model.safetensors"]);
    let server = Server::of(&model)
        .args([Path::new("--weights-cache-override"), &weights].map(|word| word.to_str().unwrap()));
    assert_eq!(generate(&server.start().unwrap(), json!({"max_new_tokens": 2})).status, 200);
    let without = Server::of(&model).run_to_exit().unwrap();
    assert_eq!(without.status.code(), Some(1), "{}", without.log);
}

#[test]
fn a_revision_in_the_given_cache_is_what_is_served() {
    let place = tempfile::tempdir().unwrap();
    let repository = place.path().join("models--org--tiny");
    for (revision, commit, files) in [
        ("refs/pr/7", "7".repeat(40), &["config.json", "tokenizer.json", "model.safetensors"][..]),
        ("main", "1".repeat(40), &["config.json"]),
    ] {
        let snapshot = repository.join("snapshots").join(&commit);
        copy(&fixture("tiny-llama"), &snapshot, files);
        fs::write(snapshot.join("tokenizer_config.json"), template(revision)).unwrap();
        let reference = repository.join("refs").join(revision);
        fs::create_dir_all(reference.parent().unwrap()).unwrap();
        fs::write(reference, commit).unwrap();
    }
    let cache = ["--huggingface-hub-cache", place.path().to_str().unwrap()];
    let server = Server::of("org/tiny").args(cache).args(["--revision", "refs/pr/7"]).start().unwrap();
    assert_eq!(templated(&server), "refs/pr/7");
    let info = http::get(server.port(), "/info").unwrap().json().unwrap();
    assert_eq!(info["model_sha"], "7".repeat(40), "{info}");
    assert_eq!(generate(&server, json!({"max_new_tokens": 2})).status, 200);
    let main = Server::of("org/tiny").args(cache).run_to_exit().unwrap();
    assert_eq!(main.status.code(), Some(1), "{}", main.log);
}

#[test]
fn nothing_is_opened_on_the_prometheus_port() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port().to_string();
    // A port that somebody else holds is no reason against the start.
    let server = serve(&["--prometheus-port", &port]);
    let line = format!("--prometheus-port {port} is accepted, but nothing listens there");
    assert!(server.log().contains(&line), "{}", server.log());
    holder.set_nonblocking(true).unwrap();
    assert!(holder.accept().is_err(), "somebody has connected");
    assert_eq!(http::get(server.port(), "/metrics").unwrap().status, 200);
}

#[test]
fn the_server_listens_on_the_given_address_only() {
    let server = serve(&[]);
    let connect = |host: &str| std::net::TcpStream::connect((host, server.port()));
    assert!(connect("127.0.0.1").is_ok());
    assert!(connect("127.0.0.2").is_err(), "the harness starts it with --hostname 127.0.0.1");
}

#[test]
fn a_token_budget_and_determinism_that_are_not_to_be_had_are_said() {
    let server = serve(&["--max-batch-total-tokens", "5000"]);
    let line = "--max-batch-total-tokens 5000 is not used: the shards have measured room for ";
    assert!(server.log().contains(line), "{}", server.log());
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().unwrap().status.code(), Some(0));

    let refused =
        Server::of(fixture("tiny-llama")).args(["--device", "cpu", "--deterministic"]).run_to_exit().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", refused.log);
    assert!(refused.log.contains("--deterministic is kept on CUDA only"), "{}", refused.log);
}
