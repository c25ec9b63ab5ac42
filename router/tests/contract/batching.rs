//! When waiting prompts interrupt a running batch: TGI's options, with a shard that does not compute prompts in pieces.

use std::time::Duration;

use tokio::net::TcpStream;

use crate::harness::TestRouter;
use crate::shard::Script;

/// Long enough that the first request runs for as long as anything here takes.
const STEP: Duration = Duration::from_millis(50);
const LONG: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":63}}"#;
const SHORT: &str = r#"{"inputs":"b","parameters":{"max_new_tokens":20}}"#;

/// A router whose shard computes a first request.
async fn busy(flags: &[&str]) -> (TestRouter, TcpStream) {
    let script = Script { supports_chunking: false, step: STEP, ..Default::default() };
    let router = TestRouter::start(script, flags).await;
    let running = router.open("/generate_stream", LONG).await;
    router.until("the first runs", |shard| shard.num_running() == 1).await;
    (router, running)
}

fn steps(router: &TestRouter) -> usize {
    let state = router.shard.state.lock().unwrap();
    state.calls.iter().filter(|call| **call == "decode").count()
}

#[tokio::test]
async fn waiting_prompts_interrupt_once_they_are_the_given_share_of_the_running_ones() {
    let (router, _first) = busy(&["--waiting-served-ratio", "2", "--max-waiting-tokens", "1000"]).await;
    let _second = router.open("/generate_stream", SHORT).await;
    while router.metric("tgi_queue_size").await != 1.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = steps(&router);
    while steps(&router) < before + 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(router.shard.state.lock().unwrap().seen.len(), 1, "one waits, the running one is worth two");
    let _third = router.open("/generate_stream", SHORT).await;
    router.until("all three run", |shard| shard.num_running() == 3).await;

    let (router, _first) = busy(&["--waiting-served-ratio", "0", "--max-waiting-tokens", "1000"]).await;
    let _second = router.open("/generate_stream", SHORT).await;
    router.until("both run", |shard| shard.num_running() == 2).await;
}

#[tokio::test]
async fn waiting_prompts_interrupt_after_the_given_number_of_steps() {
    let (router, _first) = busy(&["--waiting-served-ratio", "1000", "--max-waiting-tokens", "3"]).await;
    let _second = router.open("/generate_stream", SHORT).await;
    router.until("both run", |shard| shard.num_running() == 2).await;
}
