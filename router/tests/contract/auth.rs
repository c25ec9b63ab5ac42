//! The API key.

use crate::harness::TestRouter;

#[tokio::test]
async fn the_key_guards_everything_but_the_open_routes() {
    let router = TestRouter::start(Default::default(), &["--api-key", "Secret"]).await;
    let json = ("content-type", "application/json");
    let body = r#"{"inputs":"a","parameters":{"max_new_tokens":1}}"#;
    for path in ["/", "/generate", "/generate_stream", "/tokenize", "/v1/chat/completions", "/v1/completions"]
    {
        for wrong in
            [&[json][..], &[json, ("authorization", "Bearer nope")], &[json, ("authorization", "Secret")]]
        {
            let answer = router.send("POST", path, wrong, body).await;
            assert_eq!((answer.status, answer.body.as_str()), (401, ""), "{path}");
        }
    }
    assert_eq!(router.get("/generate").await.status, 401, "a wrong method, too");
    for path in ["/", "/health", "/ping", "/info", "/metrics", "/v1/models"] {
        assert_eq!(router.get(path).await.status, 200, "{path}");
    }
    assert_eq!(router.get("/nothing").await.status, 404);
    let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
    assert_eq!(router.post("/chat_tokenize", chat).await.status, 200);
    let right = [json, ("authorization", "bearer secret")];
    assert_eq!(router.send("POST", "/generate", &right, body).await.status, 200);
}
