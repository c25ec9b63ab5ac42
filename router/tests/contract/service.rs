//! `/tokenize`, `/chat_tokenize`, `/info`, `/metrics`, CORS, and limits that come from the shards.

use serde_json::json;

use crate::harness::TestRouter;
use crate::shard::Script;

#[tokio::test]
async fn tokenize_answers_with_slices() {
    let router = TestRouter::plain().await;
    assert_eq!(
        router.post("/tokenize", r#"{"inputs":"ä b"}"#).await.body,
        r#"[{"id":0,"text":"ä","start":0,"stop":2},{"id":2,"text":"b","start":3,"stop":4}]"#
    );
    let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
    let answer = router.post("/chat_tokenize", chat).await.json();
    assert_eq!(answer["templated_text"], "<user> a <assistant>");
    assert_eq!(answer["tokenize_response"][1], json!({"id": 1, "text": "a", "start": 7, "stop": 8}));
}

#[tokio::test]
async fn info_has_every_field() {
    let router = TestRouter::plain().await;
    assert_eq!(
        router.get("/info").await.json(),
        json!({
            "model_id": "test/model", "model_sha": null, "model_pipeline_tag": null,
            "max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4,
            "max_input_tokens": 32, "max_total_tokens": 64, "validation_workers": 2,
            "max_client_batch_size": 4, "router": "text-generation-router",
            "version": env!("CARGO_PKG_VERSION"), "sha": null, "docker_label": null
        })
    );
}

#[tokio::test]
async fn a_cache_too_small_for_the_context_lowers_the_limit() {
    // 15 usable blocks: a request of 61 tokens fills them, because its last token needs no slot.
    let router = TestRouter::start(Script { cache_tokens: 64, ..Default::default() }, &[]).await;
    assert_eq!(router.get("/info").await.json()["max_total_tokens"], 61);
    let answer = router.post("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":60}}"#).await;
    assert_eq!(answer.status, 200);
    let answer = router.post("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":61}}"#).await;
    assert_eq!(answer.status, 422);
}

#[tokio::test]
async fn metrics_count_as_tgi_does() {
    let router = TestRouter::plain().await;
    router.post("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":3}}"#).await;
    assert_eq!(router.metric("tgi_request_count").await, 1.0);
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"max_tokens":2}"#;
    router.post("/v1/chat/completions", chat).await;
    assert_eq!(router.metric("tgi_request_count").await, 3.0, "chat counts twice");
    assert_eq!(router.metric("tgi_request_success").await, 2.0);
    assert_eq!(router.metric("tgi_request_generated_tokens_sum").await, 5.0);
    assert_eq!(router.metric("tgi_request_input_length_count").await, 2.0);
    assert_eq!(router.metric(r#"tgi_batch_inference_count{method="prefill"}"#).await, 2.0);
    assert_eq!(router.metric(r#"tgi_batch_inference_success{method="decode"}"#).await, 3.0);
    assert_eq!(router.metric("tgi_batch_max_total_tokens").await, 132.0);
    let answer = router.get("/metrics").await;
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    for line in answer.body.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        assert!(line.starts_with("tgi_") || line.starts_with("quartet_"), "{line}");
    }
}

#[tokio::test]
async fn cors_is_for_the_given_origins() {
    let router = TestRouter::start(
        Default::default(),
        &["--cors-allow-origin", "http://a", "--cors-allow-origin", "http://b"],
    )
    .await;
    let preflight = [("origin", "http://b"), ("access-control-request-method", "POST")];
    let answer = router.send("OPTIONS", "/generate", &preflight, "").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("http://b"));
    assert_eq!(answer.header("access-control-allow-methods"), Some("GET,POST"));
    assert_eq!(answer.header("access-control-allow-headers"), Some("content-type"));
    let stranger = router.send("GET", "/info", &[("origin", "http://c")], "").await;
    assert_eq!(stranger.header("access-control-allow-origin"), None);
}
