//! `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

use serde_json::json;

use crate::harness::TestRouter;

const CHAT: &str = r#""messages":[{"role":"user","content":"a b"}]"#;

#[tokio::test]
async fn a_chat_answer() {
    let router = TestRouter::plain().await;
    let body = format!(
        r#"{{{CHAT},"model":"dummy","temperature":0,"max_tokens":2,"logprobs":true,"top_logprobs":1}}"#
    );
    let answer = router.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200);
    assert!(answer.header("x-compute-time").is_some());
    let mut json = answer.json();
    assert!(json["created"].as_u64().unwrap() > 1_700_000_000);
    json["created"] = json!(0);
    let logprob =
        |token: &str| json!({"token":token,"logprob":-0.5,"top_logprobs":[{"token":"top0","logprob":-1.0}]});
    assert_eq!(
        json,
        json!({
            "object": "chat.completion", "id": "", "created": 0, "model": "dummy",
            "system_fingerprint": format!("{}-native", env!("CARGO_PKG_VERSION")),
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": " t1 t2"},
                "logprobs": {"content": [logprob(" t1"), logprob(" t2")]}, "finish_reason": "length"
            }],
            "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
        })
    );
    let seen = router.shard.state.lock().unwrap().seen.clone();
    assert_eq!(seen[0].inputs, "<user> a b <assistant>");
    assert!(!seen[0].add_special_tokens);
    assert!(!seen[0].parameters.as_ref().unwrap().do_sample);
}

#[tokio::test]
async fn finish_reasons_are_openais_and_the_model_is_named() {
    let router = TestRouter::plain().await;
    let body = r#"{"model":"tgi","messages":[{"role":"user","content":"eos2"}],"stop":"x"}"#;
    let answer = router.post("/v1/chat/completions", body).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["message"]["content"], " t1");
    assert_eq!(answer["model"], "test/model");
    assert_eq!(answer["choices"][0]["logprobs"], json!(null));
    let body = r#"{"messages":[{"role":"user","content":"stop2"}],"stop":["x"]}"#;
    let answer = router.post("/v1/chat/completions", body).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop_sequence");
    let seen = router.shard.state.lock().unwrap().seen.clone();
    assert_eq!(seen[0].stopping_parameters.as_ref().unwrap().stop_sequences, ["x"]);
}

#[tokio::test]
async fn a_chat_stream() {
    let router = TestRouter::plain().await;
    let body = r#"{"messages":[{"role":"user","content":"eos2"}],"stream":true,"stream_options":{"include_usage":true}}"#;
    let answer = router.post("/v1/chat/completions", body).await;
    assert!(answer.body.ends_with("\n\ndata: [DONE]\n\n"), "{}", answer.body);
    let created = answer.events()[0]["created"].clone();
    let first = format!(
        concat!(
            r#"data: {{"object":"chat.completion.chunk","id":"","created":{},"model":"test/model","#,
            r#""system_fingerprint":"{}-native","choices":[{{"index":0,"delta":{{"role":"assistant","content":" t1"}},"#,
            r#""logprobs":null,"finish_reason":null}}],"usage":null}}"#
        ),
        created,
        env!("CARGO_PKG_VERSION")
    );
    assert!(answer.body.starts_with(&(first + "\n\n")), "{}", answer.body);
    let events = answer.events();
    assert_eq!(events.len(), 4);
    assert_eq!(
        events[1]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""}),
        "a special token"
    );
    assert_eq!(events[1]["choices"][0]["finish_reason"], "stop");
    assert_eq!(events[2]["choices"], json!([]));
    assert_eq!(events[2]["usage"], json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}));
    assert_eq!(events[3], "[DONE]");
}

#[tokio::test]
async fn chat_errors_are_statuses_before_and_events_in_a_stream() {
    let router = TestRouter::plain().await;
    let bad = r#"{"messages":[{"role":"bad","content":"x"}],"stream":true}"#;
    let answer = router.post("/v1/chat/completions", bad).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (
            422,
            r#"{"error":"Template error: syntax error: bad role (in <string>:1)","error_type":"template_error"}"#
        )
    );
    let tools = format!(r#"{{{CHAT},"tools":[{{"type":"function"}}]}}"#);
    let answer = router.post("/v1/chat/completions", &tools).await;
    assert_eq!((answer.status, &answer.json()["error_type"]), (422, &json!("tool_error")));
    let format = format!(r#"{{{CHAT},"response_format":{{"type":"json","value":{{}}}}}}"#);
    let answer = router.post("/v1/chat/completions", &format).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (422, r#"{"error":"Input validation error: grammar is not supported","error_type":"validation"}"#)
    );
    let top_p = format!(r#"{{{CHAT},"top_p":1.0,"stream":true}}"#);
    let answer = router.post("/v1/chat/completions", &top_p).await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.body,
        concat!(
            r#"data: {"error":{"message":"Input validation error: `top_p` must be > 0.0 and < 1.0","#,
            r#""http_status_code":422}}"#,
            "\n\ndata: [DONE]\n\n"
        )
    );
    assert_eq!(router.metric(r#"tgi_request_failure{err="template"}"#).await, 2.0);
}

#[tokio::test]
async fn completions_of_several_prompts() {
    let router = TestRouter::plain().await;
    let body = r#"{"prompt":["a eos2","b c"],"max_tokens":3,"model":"any"}"#;
    let answer = router.post("/v1/completions", body).await;
    assert_eq!((answer.status, answer.header("x-prompt-tokens")), (200, Some("4")));
    assert_eq!(answer.header("x-compute-time"), None);
    let json = answer.json();
    assert_eq!(json["object"], "text_completion");
    assert_eq!(
        json["choices"],
        json!([
            {"index": 0, "text": " t1", "logprobs": null, "finish_reason": "stop"},
            {"index": 1, "text": " t1 t2 t3", "logprobs": null, "finish_reason": "length"}
        ])
    );
    assert_eq!(json["usage"], json!({"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}));
    assert_eq!(json["model"], "test/model");
}

#[tokio::test]
async fn a_completions_stream_interleaves_the_prompts() {
    let router = TestRouter::plain().await;
    let body = r#"{"prompt":["a eos2","b"],"max_tokens":2,"stream":true}"#;
    let events = router.post("/v1/completions", body).await.events();
    assert_eq!(events.len(), 5);
    assert_eq!(events[4], "[DONE]");
    let of = |index: u64| -> Vec<_> {
        events[..4].iter().filter(|event| event["choices"][0]["index"] == index).collect()
    };
    assert_eq!(of(0)[0]["choices"][0], json!({"index":0,"text":" t1","logprobs":null,"finish_reason":""}));
    assert!(of(0)[0].get("usage").is_none());
    assert_eq!(of(0)[1]["choices"][0]["text"], "</s>");
    // Two tokens were allowed: the last one reports the length even though it is the end token.
    assert_eq!(of(0)[1]["choices"][0]["finish_reason"], "length");
    assert_eq!(of(1)[1]["usage"], json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}));
}

#[tokio::test]
async fn completions_refuse_what_they_cannot_do() {
    let router = TestRouter::plain().await;
    let answer = router.post("/v1/completions", r#"{"prompt":"a","suffix":"b"}"#).await;
    assert_eq!((answer.status, &answer.json()["error_type"]), (422, &json!("suffix not supported")));
    let answer = router.post("/v1/completions", r#"{"prompt":["a","a","a","a","a"]}"#).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (
            422,
            r#"{"error":"Number of prompts exceeds the maximum allowed batch size of 4","error_type":"batch size exceeded"}"#
        )
    );
    let answer = router.post("/v1/completions", r#"{"prompt":[]}"#).await;
    assert_eq!((answer.status, answer.header("content-type")), (422, Some("text/plain; charset=utf-8")));
}

#[tokio::test]
async fn the_model_list() {
    let router = TestRouter::plain().await;
    assert_eq!(
        router.get("/v1/models").await.body,
        r#"{"object":"list","data":[{"id":"test/model","object":"model","created":0,"owned_by":"test/model"}]}"#
    );
}
