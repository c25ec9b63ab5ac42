//! `/generate_stream`.

use serde_json::json;

use crate::harness::TestRouter;

#[tokio::test]
async fn the_bytes_of_a_stream() {
    let router = TestRouter::plain().await;
    let body = r#"{"inputs":"a b","parameters":{"max_new_tokens":2,"details":true}}"#;
    let answer = router.post("/generate_stream", body).await;
    assert_eq!(
        answer.body,
        concat!(
            r#"data: {"index":1,"token":{"id":1,"text":" t1","logprob":-0.5,"special":false},"generated_text":null,"#,
            "\"details\":null}\n\n",
            r#"data: {"index":2,"token":{"id":2,"text":" t2","logprob":-0.5,"special":false},"#,
            r#""generated_text":" t1 t2","details":{"finish_reason":"length","generated_tokens":2,"seed":null,"#,
            "\"input_length\":2}}\n\n"
        )
    );
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
        ("x-compute-characters", "3"),
        ("x-compute-type", "gpu+optimized"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{name}");
    }
    assert_eq!(answer.header("x-total-time"), None);
}

#[tokio::test]
async fn details_only_if_asked_for_and_alternatives() {
    let router = TestRouter::plain().await;
    let body = r#"{"inputs":"a eos2","parameters":{"top_n_tokens":2}}"#;
    let events = router.post("/generate_stream", body).await.events();
    assert_eq!(events.len(), 2);
    assert_eq!(events[0]["top_tokens"].as_array().unwrap().len(), 2);
    assert_eq!((&events[1]["generated_text"], &events[1]["details"]), (&json!(" t1"), &json!(null)));
    assert_eq!(events[1]["token"]["text"], "</s>");
}

#[tokio::test]
async fn refusals_are_one_event_under_status_200() {
    let router = TestRouter::plain().await;
    for (parameters, error) in [
        (r#"{"best_of":2,"do_sample":true}"#, "`best_of` != 1 is not supported when streaming tokens"),
        (
            r#"{"decoder_input_details":true}"#,
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        (r#"{"top_p":1.0}"#, "`top_p` must be > 0.0 and < 1.0"),
    ] {
        let body = format!(r#"{{"inputs":"a","parameters":{parameters}}}"#);
        let answer = router.post("/generate_stream", &body).await;
        assert_eq!(answer.status, 200);
        let error = format!(r#"{{"error":"Input validation error: {error}","error_type":"validation"}}"#);
        assert_eq!(answer.body, format!("data: {error}\n\n"));
    }
}
