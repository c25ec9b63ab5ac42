//! Every way a client can leave gives its blocks back within a step.
//!
//! The cache has 32 blocks; a request of 1 + 61 tokens takes 16 of them. Two fill it, a third waits.

use std::time::Duration;

use tokio::io::AsyncReadExt;

use crate::harness::TestRouter;
use crate::http;

const STEP: Duration = Duration::from_millis(5);
const LARGE: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":63}}"#;

async fn all_blocks_are_free(router: &TestRouter) {
    router.until("the shard is idle", |shard| shard.num_running() == 0).await;
    let calls = (0..2).map(|_| router.post("/generate", LARGE));
    for answer in futures::future::join_all(calls).await {
        assert_eq!(answer.status, 200);
    }
}

async fn leaves_while_running(path: &str) {
    let router = TestRouter::slow(STEP, &[]).await;
    let running = [router.open(path, LARGE).await, router.open(path, LARGE).await];
    router.until("both run", |shard| shard.num_running() == 2).await;
    let waiting = router.open("/generate", r#"{"inputs":"b","parameters":{"max_new_tokens":63}}"#).await;
    tokio::time::sleep(4 * STEP).await;
    assert_eq!(router.shard.state.lock().unwrap().seen.len(), 2, "no room for a third");
    let steps = |router: &TestRouter| {
        let state = router.shard.state.lock().unwrap();
        state.calls.iter().filter(|call| **call == "decode").count()
    };
    let [leaves, stays] = running;
    drop(leaves);
    let before = steps(&router);
    router.until("the third runs", |shard| shard.seen.len() == 3).await;
    // One step to notice the closed connection may be under way, one delivers to nobody, and some slack for the
    // machine's scheduler.
    assert!(steps(&router) - before <= 6, "{} steps", steps(&router) - before);
    drop(stays);
    assert_eq!(http::read_answer(waiting).await.status, 200);
    all_blocks_are_free(&router).await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks() {
    leaves_while_running("/generate_stream").await;
}

#[tokio::test]
async fn a_dropped_unary_request_frees_its_blocks() {
    leaves_while_running("/generate").await;
}

#[tokio::test]
async fn a_client_that_read_some_tokens_leaves() {
    let router = TestRouter::slow(STEP, &[]).await;
    let mut stream = router.open("/generate_stream", LARGE).await;
    let mut some = [0; 400];
    stream.read_exact(&mut some).await.unwrap();
    drop(stream);
    all_blocks_are_free(&router).await;
}

#[tokio::test]
async fn who_leaves_the_queue_is_never_computed() {
    let router = TestRouter::slow(STEP, &[]).await;
    let running = [router.open("/generate", LARGE).await, router.open("/generate", LARGE).await];
    router.until("both run", |shard| shard.num_running() == 2).await;
    let queued = router.open("/generate", r#"{"inputs":"gone","parameters":{"max_new_tokens":63}}"#).await;
    tokio::time::sleep(2 * STEP).await;
    drop(queued);
    for stream in running {
        assert_eq!(http::read_answer(stream).await.status, 200);
    }
    all_blocks_are_free(&router).await;
    let seen = router.shard.state.lock().unwrap().seen.clone();
    assert!(seen.iter().all(|request| request.inputs != "gone"));
    assert_eq!(router.metric(r#"tgi_request_failure{err="dropped"}"#).await, 1.0);
    assert_eq!(router.metric("tgi_queue_size").await, 0.0);
}

#[tokio::test]
async fn a_failed_best_of_partner_takes_the_other_along() {
    let router = TestRouter::slow(STEP, &["--max-concurrent-requests", "3"]).await;
    let one = router.open("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":20}}"#).await;
    let two = router.open("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":20}}"#).await;
    router.until("both run", |shard| shard.num_running() == 2).await;
    // One permit is left: the first of the two sequences gets it, the second none.
    let best_of = r#"{"inputs":"best","parameters":{"best_of":2,"do_sample":true,"max_new_tokens":60}}"#;
    assert_eq!(router.post("/generate", best_of).await.status, 429);
    for stream in [one, two] {
        assert_eq!(http::read_answer(stream).await.status, 200);
    }
    let answer = router.post("/generate", best_of).await;
    assert_eq!(answer.status, 200, "every permit came back: {}", answer.body);
    all_blocks_are_free(&router).await;
}

#[tokio::test]
async fn shutting_down_finishes_what_runs_and_refuses_what_is_new() {
    // Long enough for everything that is asked meanwhile.
    let mut router = TestRouter::slow(10 * STEP, &[]).await;
    let running = router.open("/generate_stream", LARGE).await;
    router.until("it runs", |shard| shard.num_running() == 1).await;
    router.shut_down();
    while router.get("/ready").await.status == 200 {}
    for path in ["/generate", "/v1/completions"] {
        let refused = router.post(path, r#"{"inputs":"a","prompt":"a","model":"tgi"}"#).await;
        assert_eq!(refused.status, 503, "{}", refused.body);
        assert!(refused.body.contains(r#""error_type":"shutting_down""#), "{}", refused.body);
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    let answer = http::read_answer(running).await;
    assert_eq!(answer.events().len(), 63, "the stream is finished");
    tokio::time::timeout(Duration::from_secs(5), &mut router.server).await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(router.address).await.is_err(), "nobody listens any more");
}
