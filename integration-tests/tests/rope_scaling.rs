//! `--rope-scaling` and `--rope-factor` do what the same scaling in config.json does.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use integration_tests::golden::fixture;
use integration_tests::{Server, http};
use serde_json::{Value, json};

/// Positions of the model before any scaling: less than the longer prompt.
const CONTEXT: usize = 64;

/// The tiny model with a short context and `scaling` in its configuration.
fn model(scaling: &Value) -> tempfile::TempDir {
    let model = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("tiny-llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = model.path().join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(CONTEXT);
    config["rope_scaling"] = scaling.clone();
    std::fs::write(path, config.to_string()).unwrap();
    model
}

/// Longest sequence, and the tokens after a prompt within the context and after one beyond it.
fn answers(model: &tempfile::TempDir, arguments: &[&str]) -> (Value, Vec<Value>) {
    let server = Server::of(model.path()).args(arguments.iter().copied()).start().unwrap();
    let prompts = ["Once upon a time".to_owned(), "the quick brown fox jumps over a lazy dog; ".repeat(4)];
    let tokens = prompts.map(|prompt| {
        let body = json!({"inputs": prompt, "parameters": {"max_new_tokens": 12, "details": true}});
        let answer = http::post(server.port(), "/generate", &body).unwrap().json().unwrap();
        answer["details"]["tokens"].clone()
    });
    let info = http::get(server.port(), "/info").unwrap().json().unwrap();
    (info["max_total_tokens"].clone(), tokens.to_vec())
}

#[test]
fn flags_answer_as_the_configuration_does() {
    let plain = model(&json!(null));
    let mut long_answers = Vec::new();
    for kind in ["linear", "dynamic"] {
        let written = model(&json!({"rope_type": kind, "factor": 8.0}));
        let expected = answers(&written, &[]);
        assert_eq!(expected.0, json!(8 * CONTEXT), "{kind}");
        assert!(expected.1.iter().all(|tokens| tokens.as_array().is_some_and(|tokens| tokens.len() == 12)));
        for ranks in ["1", "2"] {
            let flags = ["--rope-scaling", kind, "--rope-factor", "8", "--num-shard", ranks];
            let found = answers(&plain, &flags);
            assert_eq!(found.0, expected.0, "{kind}");
            let ids = |answers: &[Value]| -> Vec<Value> {
                answers
                    .iter()
                    .flat_map(|tokens| tokens.as_array().unwrap())
                    .map(|token| token["id"].clone())
                    .collect()
            };
            assert_eq!(ids(&found.1), ids(&expected.1), "{kind} on {ranks} ranks");
        }
        long_answers.push(expected.1);
    }
    assert_ne!(long_answers[0][1], long_answers[1][1], "two rules");
    let unscaled = answers(&plain, &["--rope-scaling", "linear"]);
    assert_eq!(unscaled.0, json!(CONTEXT), "a kind alone has the factor 1");
    assert_eq!(unscaled.1[0], long_answers[1][0], "dynamic scaling leaves short prompts as they are");
    assert_ne!(unscaled.1[0], long_answers[0][0]);
    assert!(unscaled.1[1].is_null(), "the long prompt does not fit");
}
