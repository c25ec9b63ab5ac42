//! A shard that fails: the request is told, the server goes on.

use std::time::Duration;

use crate::harness::TestRouter;
use crate::shard::Script;

const BODY: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":3}}"#;
const ERROR: &str =
    r#"{"error":"Request failed during generation: Server error: boom","error_type":"generation"}"#;

#[tokio::test]
async fn a_failed_step_is_424_and_the_next_request_is_served() {
    for supports_chunking in [true, false] {
        let router = TestRouter::start(Script { supports_chunking, ..Default::default() }, &[]).await;
        for call in ["prefill", "decode"] {
            router.shard.state.lock().unwrap().fail = Some(call);
            let answer = router.post("/generate", BODY).await;
            assert_eq!((answer.status, answer.body.as_str()), (424, ERROR), "{call}");
            router.until("the batch is cleared", |shard| shard.num_running() == 0).await;
            assert_eq!(router.post("/generate", BODY).await.status, 200, "{call}");
        }
        assert_eq!(router.metric(r#"tgi_request_failure{err="generation"}"#).await, 2.0);
        assert_eq!(router.metric(r#"tgi_batch_inference_failure{method="decode"}"#).await, 1.0);
    }
}

#[tokio::test]
async fn a_failed_step_ends_a_stream_with_an_error_event() {
    let router = TestRouter::plain().await;
    router.shard.state.lock().unwrap().fail = Some("decode");
    let answer = router.post("/generate_stream", BODY).await;
    let events = answer.events();
    assert_eq!((answer.status, events.len()), (200, 2));
    assert_eq!(events[1].to_string(), ERROR);
    router.shard.state.lock().unwrap().fail = Some("decode");
    let chat = r#"{"messages":[{"role":"user","content":"a"}],"stream":true}"#;
    let events = router.post("/v1/chat/completions", chat).await.events();
    assert_eq!(events[1]["error"]["http_status_code"], 422);
    assert_eq!(events[2], "[DONE]");
}

#[tokio::test]
async fn failing_to_filter_or_clear_does_not_stop_the_service() {
    for call in ["filter_batch", "clear_cache"] {
        let router = TestRouter::slow(Duration::from_millis(5), &[]).await;
        let long = r#"{"inputs":"a","parameters":{"max_new_tokens":40}}"#;
        let stays = router.open("/generate", long).await;
        let leaves = router.open("/generate", long).await;
        router.until("both run", |shard| shard.num_running() == 2).await;
        router.shard.state.lock().unwrap().fail = Some(call);
        drop(leaves);
        if call == "clear_cache" {
            drop(stays);
        } else {
            let answer = crate::http::read_answer(stays).await;
            assert_eq!((answer.status, answer.body.as_str()), (424, ERROR));
        }
        router.until("the call failed", |shard| shard.fail.is_none()).await;
        assert_eq!(router.post("/generate", BODY).await.status, 200, "{call}");
        assert_eq!(router.get("/health").await.status, 200);
    }
}

#[tokio::test]
async fn health_follows_the_shards() {
    let router = TestRouter::plain().await;
    let healthy = router.get("/health").await;
    assert_eq!((healthy.status, healthy.body.as_str()), (200, ""));
    for path in ["/", "/ping"] {
        assert_eq!(router.get(path).await.status, 200);
    }
    router.shard.state.lock().unwrap().fail = Some("health");
    let unhealthy = router.get("/health").await;
    assert_eq!(
        (unhealthy.status, unhealthy.body.as_str()),
        (503, r#"{"error":"unhealthy","error_type":"healthcheck"}"#)
    );
    // Unhealthy: the next check computes a token, in block 0.
    router.shard.state.lock().unwrap().fail = Some("prefill");
    assert_eq!(router.get("/health").await.status, 503);
    assert_eq!(router.get("/health").await.status, 200);
    let probe = router.shard.state.lock().unwrap().seen.last().cloned().unwrap();
    assert_eq!((probe.id, probe.blocks.as_slice(), probe.slots.as_slice()), (u64::MAX, &[0][..], &[0][..]));
}
