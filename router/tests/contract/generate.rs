//! `/generate` and `POST /`.

use serde_json::json;

use crate::harness::TestRouter;
use crate::shard::Script;

#[tokio::test]
async fn a_plain_answer_and_its_headers() {
    let router = TestRouter::plain().await;
    let answer = router.post("/generate", r#"{"inputs":"a ä","parameters":{"max_new_tokens":3}}"#).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, r#"{"generated_text":" t1 t2 t3"}"#);
    for (name, value) in [
        ("content-type", "application/json"),
        ("x-compute-type", "gpu+optimized"),
        ("x-compute-characters", "3"),
        ("x-prompt-tokens", "2"),
        ("x-generated-tokens", "3"),
        ("vary", "origin, access-control-request-method, access-control-request-headers"),
        ("access-control-allow-origin", "*"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{name}");
    }
    for name in ["x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"]
    {
        answer.header(name).unwrap().parse::<u64>().unwrap();
    }
    assert!(answer.header("x-compute-time").unwrap().parse::<f64>().unwrap() < 5.0);
    let seen = router.shard.state.lock().unwrap().seen.clone();
    assert_eq!((seen[0].input_ids.as_slice(), seen[0].inputs.as_str()), ([1, 0].as_slice(), "a ä"));
    assert_eq!((seen[0].blocks.len(), seen[0].slots.len()), (1, 4));
    assert!(seen[0].add_special_tokens);
    assert_eq!(seen[0].truncate, crate::shard::MAX_INPUT);
}

#[tokio::test]
async fn details_in_order() {
    let router = TestRouter::plain().await;
    let body = r#"{"inputs":"a eos2","parameters":{"details":true,"decoder_input_details":true,
        "top_n_tokens":1,"temperature":0.5,"seed":18446744073709551615}}"#;
    let answer = router.post("/generate", body).await;
    assert_eq!(
        answer.body,
        concat!(
            r#"{"generated_text":" t1","details":{"finish_reason":"eos_token","generated_tokens":2,"#,
            r#""seed":18446744073709551615,"prefill":[{"id":1,"text":"p1","logprob":null},"#,
            r#"{"id":0,"text":"p0","logprob":-2.0}],"tokens":[{"id":1,"text":" t1","logprob":-0.5,"special":false},"#,
            r#"{"id":2,"text":"</s>","logprob":-0.5,"special":true}],"#,
            r#""top_tokens":[[{"id":0,"text":"top0","logprob":-1.0,"special":false}],"#,
            r#"[{"id":0,"text":"top0","logprob":-1.0,"special":false}]]}}"#
        )
    );
    let greedy =
        router.post("/generate", r#"{"inputs":"a stop1","parameters":{"details":true,"stop":["x"]}}"#).await;
    let details = &greedy.json()["details"];
    assert_eq!((&details["seed"], &details["finish_reason"]), (&json!(null), &json!("stop_sequence")));
    assert_eq!(details["prefill"], json!([]));
    assert!(details.get("top_tokens").is_none() && details.get("best_of_sequences").is_none());
}

#[tokio::test]
async fn sampling_is_on_when_parameters_are_absent() {
    let router = TestRouter::plain().await;
    router.post("/generate", r#"{"inputs":"a eos1"}"#).await;
    router.post("/generate", r#"{"inputs":"a eos1","parameters":{}}"#).await;
    let seen = router.shard.state.lock().unwrap().seen.clone();
    let sampled: Vec<bool> = seen.iter().map(|r| r.parameters.as_ref().unwrap().do_sample).collect();
    assert_eq!(sampled, [true, false]);
    // Unset, the answer may fill the context.
    assert_eq!(seen[0].stopping_parameters.as_ref().unwrap().max_new_tokens, 62);
}

#[tokio::test]
async fn the_root_answers_with_a_list_and_the_prompt() {
    let router = TestRouter::plain().await;
    let body = r#"{"inputs":"a b","parameters":{"max_new_tokens":1}}"#;
    assert_eq!(router.post("/", body).await.body, r#"[{"generated_text":"a b t1"}]"#);
    let without = r#"{"inputs":"a b","parameters":{"max_new_tokens":1,"return_full_text":false}}"#;
    assert_eq!(router.post("/", without).await.body, r#"[{"generated_text":" t1"}]"#);
    let stream = r#"{"inputs":"a b","parameters":{"max_new_tokens":2},"stream":true}"#;
    let answer = router.post("/", stream).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    assert_eq!(answer.events()[1]["generated_text"], "a b t1 t2");
}

#[tokio::test]
async fn best_of_answers_with_the_others_too() {
    let router = TestRouter::plain().await;
    let body = r#"{"inputs":"a","parameters":{"best_of":2,"do_sample":true,"max_new_tokens":2,"details":true,
        "return_full_text":true}}"#;
    let answer = router.post("/generate", body).await.json();
    assert_eq!(answer["generated_text"], "a t1 t2");
    let others = answer["details"]["best_of_sequences"].as_array().unwrap();
    assert_eq!(others.len(), 1);
    assert_eq!((&others[0]["generated_text"], &others[0]["prefill"]), (&json!("a t1 t2"), &json!([])));
    assert_ne!(others[0]["seed"], answer["details"]["seed"], "random seeds");
}

#[tokio::test]
async fn truncation_keeps_the_end_and_long_answers_fill_the_context() {
    let router = TestRouter::plain().await;
    let words = vec!["a"; 40].join(" ");
    let body = format!(
        r#"{{"inputs":"{words} b","parameters":{{"truncate":2,"max_new_tokens":62,"details":true}}}}"#
    );
    let answer = router.post("/generate", &body).await.json();
    assert_eq!(answer["details"]["generated_tokens"], 62);
    let seen = router.shard.state.lock().unwrap().seen.clone();
    assert_eq!((seen[0].input_ids.as_slice(), seen[0].truncate), ([1, 2].as_slice(), 2));
}

#[tokio::test]
async fn many_at_once_with_and_without_chunking() {
    for supports_chunking in [true, false] {
        let script = Script { supports_chunking, ..Default::default() };
        let router = TestRouter::start(script, &["--max-waiting-tokens", "2", "--max-batch-size", "6"]).await;
        let calls = (1..=24).map(|n| {
            let words = vec!["a"; 1 + n % 20].join(" ");
            let body =
                format!(r#"{{"inputs":"{words}","parameters":{{"max_new_tokens":{},"details":true}}}}"#, n);
            let router = &router;
            async move { (n, router.post("/generate", &body).await.json()) }
        });
        for (n, answer) in futures::future::join_all(calls).await {
            assert_eq!(answer["details"]["generated_tokens"], n as u64);
            let text: String = (1..=n).map(|token| format!(" t{token}")).collect();
            assert_eq!(answer["generated_text"], text, "nothing lost or doubled");
        }
        assert_eq!(router.metric("tgi_request_success").await, 24.0);
        assert_eq!(router.metric("tgi_batch_current_size").await, 0.0);
        assert_eq!(router.shard.state.lock().unwrap().num_running(), 0);
    }
}
