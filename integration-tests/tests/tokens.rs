//! The tokens are the reference's: on 1, 2 and 3 ranks, alone and 8 at a time, streamed and not.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::path::Path;

use integration_tests::conformance::{check_server, request};
use integration_tests::golden::{BFLOAT16, FLOAT32, Tolerance, cases, fixture, tokens_of};
use integration_tests::{Server, args, http};
use serde_json::json;

fn check_ranks(model: &Path, ranks: &[&str], golden: &str, tolerance: Tolerance) {
    let cases = cases(&fixture(golden)).unwrap();
    for &ranks in ranks {
        let server = Server::of(model).args(["--num-shard", ranks]).start().unwrap();
        assert_eq!(server.children("shard").len().to_string(), ranks);
        check_server(server.port(), &cases, tolerance).unwrap();
    }
}

#[test]
fn tiny_llama_matches_the_reference_on_1_2_and_3_ranks() {
    check_ranks(&fixture("tiny-llama"), &["1", "2", "3"], "tiny-llama/golden.jsonl", FLOAT32);
}

/// A fixture's model with the tokenizer of tiny-llama.
fn with_tokenizer(name: &str) -> tempfile::TempDir {
    let model = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, model.path().join(path.file_name().unwrap())).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(fixture("tiny-llama").join(name), model.path().join(name)).unwrap();
    }
    model
}

#[test]
fn pytorch_shards_match_the_reference() {
    let model = with_tokenizer("tiny-bin");
    let cases = cases(&fixture("tiny-bin/golden.jsonl")).unwrap();
    let server = Server::of(model.path()).args(["--num-shard", "2", "--dtype", "float32"]).start().unwrap();
    check_server(server.port(), &cases, FLOAT32).unwrap();
}

/// A family with neighbours turned together, fused projections and norms after the branches, from a `config.json` of
/// transformers 5 to the tokens that transformers gives.
#[test]
fn glm4_matches_transformers_on_1_and_2_ranks() {
    check_ranks(with_tokenizer("tiny-glm4").path(), &["1", "2"], "tiny-glm4/golden.json", FLOAT32);
}

/// A Falcon with grouped KV heads, whose converter takes queries, keys and values apart; its bfloat16 is exact.
#[test]
fn a_gguf_file_of_another_architecture_matches_the_reference() {
    let cases = cases(&fixture("tiny-gguf/golden.jsonl")).unwrap();
    let model = fixture("tiny-gguf/falcon.gguf");
    for ranks in ["1", "2"] {
        let server = Server::of(&model).args(["--num-shard", ranks, "--dtype", "float32"]).start().unwrap();
        check_server(server.port(), &cases, FLOAT32).unwrap();
    }
}

#[test]
fn smollm2_matches_the_reference_on_1_2_and_3_ranks() {
    check_ranks(&args::smollm2(), &["1", "2", "3"], "smollm2-golden.jsonl", BFLOAT16);
}

#[test]
fn prompt_logprobs_match_the_reference() {
    let server = Server::of(fixture("tiny-llama")).args(["--enable-prefill-logprobs"]).start().unwrap();
    for case in cases(&fixture("tiny-llama/golden.jsonl")).unwrap() {
        let mut body = request(&case);
        body["parameters"]["decoder_input_details"] = json!(true);
        let answer = http::post(server.port(), "/generate", &body).unwrap().json().unwrap();
        let prefill = answer["details"]["prefill"].as_array().unwrap();
        assert_eq!(prefill.len(), case.input_ids.len());
        for (index, (token, expected)) in prefill.iter().zip(&case.prefill).enumerate() {
            assert_eq!(token["id"], json!(case.input_ids[index]));
            match expected {
                None => assert!(token["logprob"].is_null(), "{token}"),
                Some(expected) => {
                    let error = (token["logprob"].as_f64().unwrap() - expected).abs();
                    assert!(error <= FLOAT32.logprob, "{token}: expected {expected}");
                }
            }
        }
    }
}

#[test]
fn a_seed_gives_the_same_tokens_alone_in_a_batch_and_on_other_ranks() {
    let body = json!({
        "inputs": "The capital of France is",
        "parameters": {"max_new_tokens": 24, "do_sample": true, "temperature": 0.9, "top_p": 0.95, "seed": 42, "details": true},
    });
    let mut seen: Vec<Vec<u32>> = Vec::new();
    for ranks in ["1", "3"] {
        let server = Server::of(fixture("tiny-llama")).args(["--num-shard", ranks]).start().unwrap();
        let ask = || {
            let answer = http::post(server.port(), "/generate", &body).unwrap().json().unwrap();
            tokens_of(&answer).unwrap().iter().map(|token| token.id).collect::<Vec<_>>()
        };
        seen.push(ask());
        std::thread::scope(|scope| {
            let answers: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
            seen.extend(answers.into_iter().map(|answer| answer.join().unwrap()));
        });
    }
    assert!(seen.iter().all(|ids| ids == &seen[0]), "{seen:?}");
    assert!(seen[0].len() >= 2);
}
