//! A shard that dies under running requests: the client sees a pause.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::harness::TestRouter;
use crate::http;
use crate::shard::Script;

const STREAM: &str = r#"{"inputs":"a","parameters":{"max_new_tokens":36,"details":true}}"#;

/// So slow that no stream ends before the shard does, however busy the machine is.
fn slow() -> Script {
    Script { step: Duration::from_millis(150), ..Default::default() }
}

/// A stream that has had its first bytes.
async fn running(router: &TestRouter) -> (TcpStream, Vec<u8>) {
    let mut stream = router.open("/generate_stream", STREAM).await;
    let mut head = vec![0; 256];
    let read = stream.read(&mut head).await.unwrap();
    head.truncate(read);
    (stream, head)
}

async fn rest(stream: (TcpStream, Vec<u8>)) -> Vec<serde_json::Value> {
    let (mut stream, mut bytes) = stream;
    stream.read_to_end(&mut bytes).await.unwrap();
    http::parse_answer(&bytes).events()
}

fn ids(events: &[serde_json::Value]) -> Vec<u64> {
    events.iter().map(|event| event["token"]["id"].as_u64().unwrap_or_else(|| panic!("{event}"))).collect()
}

#[tokio::test]
async fn streams_go_on_behind_their_last_token() {
    let mut router = TestRouter::start(slow(), &["--max-concurrent-requests", "4"]).await;
    let streams = [running(&router).await, running(&router).await];
    let whole = router.open("/generate", STREAM).await;
    router.until("all run", |shard| shard.num_running() == 3).await;
    for next in [slow(), slow(), Script::default()] {
        tokio::time::sleep(Duration::from_millis(200)).await;
        router.shard.kill();
        while router.get("/health").await.status == 200 {}
        router.revive(next);
        router.until("all run again", |shard| shard.seen.len() == 3).await;
    }
    for stream in streams {
        let events = rest(stream).await;
        assert_eq!(ids(&events), (1..=36).collect::<Vec<u64>>(), "none lost, none twice");
        let text: String = (1..=36).map(|n| format!(" t{n}")).collect();
        assert_eq!(events[35]["generated_text"], text);
        assert_eq!(events[35]["details"]["generated_tokens"], 36);
    }
    assert_eq!(http::read_answer(whole).await.status, 200);
    assert_eq!(router.get("/health").await.status, 200);
    assert_eq!(router.metric("quartet_recovery_count").await, 3.0);
    assert_eq!(router.metric("quartet_request_resumed").await, 9.0);
    assert_eq!(router.metric("tgi_request_success").await, 3.0);
}

#[tokio::test]
async fn permits_decide_who_may_wait_for_new_shards() {
    let mut router = TestRouter::start(slow(), &["--max-concurrent-requests", "2"]).await;
    let stream = running(&router).await;
    router.shard.kill();
    while router.get("/health").await.status == 200 {}
    let waits = router.open("/generate", r#"{"inputs":"a","parameters":{"max_new_tokens":3}}"#).await;
    while router.metric("tgi_queue_size").await < 2.0 {}
    let refused = router.post("/generate", r#"{"inputs":"a"}"#).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.ends_with(r#""error_type":"recovering"}"#), "{}", refused.body);
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=5).contains(&seconds));
    router.revive(Script::default());
    assert_eq!(http::read_answer(waits).await.status, 200);
    assert_eq!(rest(stream).await.len(), 36);
}

#[tokio::test]
async fn giving_up_ends_streams_with_an_error_event() {
    let router = TestRouter::start(slow(), &[]).await;
    let stream = running(&router).await;
    router.shard.kill();
    while router.get("/health").await.status == 200 {}
    router.scheduler.give_up("going down");
    let events = rest(stream).await;
    assert_eq!(events.last().unwrap()["error"], "Request failed during generation: going down");
    let later = router.post("/generate", r#"{"inputs":"a"}"#).await;
    assert_eq!((later.status, router.get("/health").await.status), (424, 503));
}
