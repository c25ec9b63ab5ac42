//! What is refused before anything is generated.

use std::time::Duration;

use crate::harness::TestRouter;

async fn rejected(router: &TestRouter, body: &str) -> (u16, String) {
    let answer = router.post("/generate", body).await;
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"), "{}", answer.body);
    (answer.status, answer.body)
}

#[tokio::test]
async fn bodies_that_do_not_parse_are_plain_text() {
    let router = TestRouter::start(Default::default(), &["--payload-limit", "1000"]).await;
    let (status, body) = rejected(&router, r#"{"inputs": }"#).await;
    assert_eq!(status, 400);
    assert!(body.starts_with("Failed to parse the request body as JSON: "), "{body}");
    for wrong in [
        r#"{"inputs":5}"#,
        r#"{}"#,
        r#"{"inputs":"a","parameters":{"stop":null}}"#,
        r#"{"inputs":"a","parameters":{"max_new_tokens":-1}}"#,
        r#"{"inputs":"a","parameters":{"stop":"text"}}"#,
    ] {
        let (status, body) = rejected(&router, wrong).await;
        assert_eq!(status, 422, "{wrong}");
        assert!(body.starts_with("Failed to deserialize the JSON body into the target type: "), "{body}");
        assert!(body.contains(" at line 1 column "), "{body}");
    }
    let long = format!(r#"{{"inputs":"{}"}}"#, "a".repeat(2000));
    let (status, body) = rejected(&router, &long).await;
    assert_eq!((status, body.as_str()), (413, "Failed to buffer the request body: length limit exceeded"));
    let answer = router.send("POST", "/generate", &[], r#"{"inputs":"a"}"#).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (415, "Expected request with `Content-Type: application/json`")
    );
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
}

#[tokio::test]
async fn broken_rules_are_json_with_their_text() {
    let router = TestRouter::plain().await;
    for (body, error) in [
        (r#"{"inputs":""}"#, "`inputs` cannot be empty"),
        (r#"{"inputs":"   "}"#, "`inputs` cannot be empty"),
        (r#"{"inputs":"a","parameters":{"max_new_tokens":0}}"#, "`max_new_tokens` must be strictly positive"),
        (
            r#"{"inputs":"a","parameters":{"max_new_tokens":64}}"#,
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 1 `inputs` tokens and 64 `max_new_tokens`",
        ),
        (r#"{"inputs":"a","parameters":{"best_of":3}}"#, "`best_of` must be > 0 and <= 2. Given: 3"),
        (r#"{"inputs":"a","parameters":{"best_of":0}}"#, "`best_of` must be > 0 and <= 2. Given: 0"),
        (
            r#"{"inputs":"a","parameters":{"watermark":true}}"#,
            "`watermark` is not supported: this server does not watermark; leave it unset or false",
        ),
    ] {
        let answer = router.post("/generate", body).await;
        let expected = format!(r#"{{"error":"Input validation error: {error}","error_type":"validation"}}"#);
        assert_eq!((answer.status, answer.body), (422, expected));
    }
    let words = vec!["a"; 40].join(" ");
    let body = format!(r#"{{"inputs":"{words}","parameters":{{"max_new_tokens":1}}}}"#);
    let answer = router.post("/generate", &body).await;
    assert!(answer.body.contains("`inputs` must have less than 32 tokens. Given: 40"), "{}", answer.body);
    assert_eq!(router.metric(r#"tgi_request_failure{err="validation"}"#).await, 8.0);
}

#[tokio::test]
async fn a_full_server_says_so_at_once() {
    let router = TestRouter::slow(Duration::from_millis(20), &["--max-concurrent-requests", "1"]).await;
    let running =
        router.open("/generate_stream", r#"{"inputs":"a","parameters":{"max_new_tokens":60}}"#).await;
    router.until("one request runs", |shard| shard.num_running() == 1).await;
    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":1}}"#;
    let overloaded = r#"{"error":"Model is overloaded","error_type":"overloaded"}"#;
    let answer = router.post("/generate", body).await;
    assert_eq!((answer.status, answer.body.as_str()), (429, overloaded));
    assert_eq!(answer.header("retry-after"), Some("1"));
    let answer = router.post("/generate_stream", body).await;
    assert_eq!((answer.status, answer.body), (200, format!("data: {overloaded}\n\n")));
    drop(running);
    router.until("the shard is idle", |shard| shard.num_running() == 0).await;
    assert_eq!(router.post("/generate", body).await.status, 200, "the permit came back");
    assert_eq!(router.metric(r#"tgi_request_failure{err="overloaded"}"#).await, 2.0);
}

#[tokio::test]
async fn paths_and_methods_that_do_not_exist() {
    let router = TestRouter::plain().await;
    let answer = router.get("/nothing").await;
    assert_eq!((answer.status, answer.body.as_str()), (404, ""));
    let answer = router.get("/generate").await;
    assert_eq!((answer.status, answer.body.as_str(), answer.header("allow")), (405, "", Some("POST")));
}
