//! `/startup`, `/ready` and `/live`: what fails them, and what must not.

use std::time::{Duration, Instant};

use crate::harness::TestRouter;
use crate::http;
use crate::shard::Script;

const PROBES: [&str; 4] = ["/startup", "/ready", "/live", "/health"];

/// An answer that takes long where steps do.
const LONG: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":60}}"#;

async fn statuses(router: &TestRouter) -> [u16; 4] {
    let mut statuses = [0; 4];
    for (status, path) in statuses.iter_mut().zip(PROBES) {
        *status = router.get(path).await.status;
    }
    statuses
}

#[tokio::test]
async fn an_idle_server_passes_all_without_a_key() {
    let router = TestRouter::start(Script::default(), &["--api-key", "secret"]).await;
    assert_eq!(statuses(&router).await, [200; 4]);
    for path in PROBES {
        let answer = router.get(path).await;
        assert_eq!(answer.body, "", "{path}");
        assert_eq!(router.send("HEAD", path, &[], "").await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn a_full_server_passes_all() {
    let step = Duration::from_millis(50);
    let router = TestRouter::slow(step, &["--max-concurrent-requests", "1"]).await;
    let running = router.open("/generate", LONG).await;
    router.until("it runs", |shard| shard.num_running() == 1).await;
    assert_eq!(router.post("/generate", LONG).await.status, 429);
    assert_eq!(statuses(&router).await, [200; 4]);
    assert_eq!(http::read_answer(running).await.status, 200);
}

#[tokio::test]
async fn a_step_of_any_length_is_alive_while_the_counters_move() {
    let script = Script { step: Duration::from_secs(4), moves: true, ..Default::default() };
    let router = TestRouter::start(script, &["--liveness-timeout", "1"]).await;
    let running = router.open("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":2}}"#).await;
    router.until("it runs", |shard| shard.num_running() == 1).await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(statuses(&router).await, [200; 4]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(http::read_answer(running).await.status, 200);
}

#[tokio::test]
async fn a_step_that_hangs_fails_live_and_its_end_mends_it() {
    let script = Script { step: Duration::from_secs(8), ..Default::default() };
    let router = TestRouter::start(script, &["--liveness-timeout", "1"]).await;
    let running = router.open("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":2}}"#).await;
    router.until("it runs", |shard| shard.num_running() == 1).await;
    let began = Instant::now();
    let failed = loop {
        let answer = router.get("/live").await;
        if answer.status != 200 {
            break answer;
        }
        assert!(began.elapsed() < Duration::from_secs(8), "the step ended before anybody noticed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(began.elapsed() >= Duration::from_secs(1));
    let reason = "rank 0 has work and has not moved for 1.";
    assert!(failed.status == 503 && failed.body.contains(reason), "{}", failed.body);
    assert_eq!(http::read_answer(running).await.status, 200);
    assert_eq!(router.get("/live").await.status, 200, "nothing runs");
}

#[tokio::test]
async fn lost_shards_are_not_ready_and_yet_alive() {
    let mut router = TestRouter::plain().await;
    router.shard.kill();
    while router.get("/ready").await.status == 200 {}
    assert_eq!(statuses(&router).await, [200, 503, 200, 503]);
    router.revive(Script::default());
    while router.get("/ready").await.status != 200 {}
    assert_eq!(statuses(&router).await, [200; 4]);
}

#[tokio::test]
async fn a_stop_is_seen_by_ready_and_leaves_live_alone() {
    let mut router = TestRouter::slow(Duration::from_millis(50), &[]).await;
    let running = router.open("/generate", LONG).await;
    router.until("it runs", |shard| shard.num_running() == 1).await;
    router.shut_down();
    // Whoever is refused finds `/ready` failing already: never the other way round.
    while router.post("/tokenize", r#"{"inputs":"a"}"#).await.status == 200
        && router.get("/ready").await.status == 200
    {}
    assert_eq!(statuses(&router).await, [200, 503, 200, 503]);
    assert_eq!(http::read_answer(running).await.status, 200);
}
