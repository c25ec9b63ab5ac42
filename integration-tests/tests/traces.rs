//! Spans of real requests, as a collector gets them; and collectors that do not take them.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::net::TcpListener;
use std::time::{Duration, Instant};

use integration_tests::collector::{Collector, Span};
use integration_tests::golden::fixture;
use integration_tests::{Server, ServerBuilder, free_port, http};
use nix::sys::signal::Signal;
use serde_json::json;

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const PREFILL: &str = "/generate.v3.TextGenerationService/Prefill";
const DECODE: &str = "/generate.v3.TextGenerationService/Decode";

fn traced(endpoint: &str) -> ServerBuilder {
    // The SDK's own variable: spans come at once instead of every five seconds.
    Server::of(fixture("tiny-llama")).args(["--otlp-endpoint", endpoint]).env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

fn generate(server: &Server, headers: &[(&str, &str)]) {
    let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 4, "do_sample": true, "seed": 7}});
    let headers = [&[("content-type", "application/json")], headers].concat();
    let answer = http::post_raw(server.port(), "/generate", &headers, &body.to_string()).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The spans of that name, of the caller's trace.
fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.span.name == name && hex(&span.span.trace_id) == TRACE_ID).collect()
}

fn one<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found = named(spans, name);
    assert_eq!(found.len(), 1, "{name}: {found:#?}");
    found[0]
}

#[test]
fn a_request_is_one_trace_from_its_caller_to_every_rank() {
    let collector = Collector::start().unwrap();
    let server = traced(&collector.endpoint()).args(["--num-shard", "2"]).start().unwrap();
    generate(&server, &[("traceparent", &format!("00-{TRACE_ID}-{CALLER}-01"))]);
    let spans = collector
        .wait(|spans| named(spans, "POST /generate").len() == 1 && named(spans, DECODE).len() == 2 * 3)
        .unwrap();

    let request = one(&spans, "POST /generate");
    assert_eq!(hex(&request.span.parent_span_id), CALLER);
    assert_eq!(request.attribute("http.response.status_code").as_deref(), Some("200"));
    let handler = one(&spans, "generate");
    assert!(handler.is_below(request));
    for field in
        ["parameters", "total_time", "validation_time", "queue_time", "inference_time", "time_per_token"]
    {
        assert!(handler.attribute(field).is_some_and(|value| !value.is_empty()), "{field}: {handler:#?}");
    }
    assert_eq!(handler.attribute("seed").as_deref(), Some("Some(7)"));
    for stage in ["validate", "queued", "infer"] {
        assert!(one(&spans, stage).is_below(handler), "{stage}");
    }
    let steps: Vec<&Span> = [named(&spans, "prefill"), named(&spans, "decode")].concat();
    assert_eq!(steps.len(), 4, "four tokens are four steps");
    for step in &steps {
        assert!(step.is_below(one(&spans, "infer")), "{step:#?}");
    }
    let calls = [named(&spans, PREFILL), named(&spans, DECODE)].concat();
    for step in steps {
        let mut ranks: Vec<&str> =
            calls.iter().filter(|call| call.is_below(step)).map(|call| call.instance.as_str()).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, ["rank-0", "rank-1"]);
    }
    for call in calls {
        let attribute = |name: &str| call.attribute(name).unwrap_or_default();
        assert_eq!((attribute("rpc.system"), attribute("rpc.grpc.status_code")), ("grpc".into(), "0".into()));
    }
    // As in upstream, where the launcher hands one name to all.
    assert!(spans.iter().all(|span| span.service == "text-generation-inference.router"), "{spans:#?}");
}

#[test]
fn a_streamed_request_without_a_caller_is_a_trace_of_its_own() {
    let collector = Collector::start().unwrap();
    let server = traced(&collector.endpoint()).args(["--otlp-service-name", "llm"]).start().unwrap();
    let body = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 4}});
    http::stream(server.port(), "/generate_stream", &body).unwrap().collect_events().unwrap();
    let unknown = http::get(server.port(), "/health").unwrap();
    assert_eq!(unknown.status, 200);
    // What is left is delivered when the programs end.
    server.signal(Signal::SIGTERM);
    let exit = server.wait().unwrap();
    assert!(exit.status.success(), "{}", exit.log);
    let spans = collector.spans();
    let find = |name: &str| spans.iter().find(|span| span.span.name == name).unwrap();
    let (request, handler) = (find("POST /generate_stream"), find("generate_stream"));
    assert!(request.span.parent_span_id.is_empty() && handler.is_below(request));
    // Neither ends before the last token is out.
    let last_step =
        spans.iter().filter(|span| span.span.name == "decode").map(|span| span.span.start_time_unix_nano);
    let last_step = last_step.max().unwrap();
    assert!(handler.span.end_time_unix_nano > last_step && request.span.end_time_unix_nano > last_step);
    assert!(spans.iter().all(|span| span.service == "llm"), "{spans:#?}");
    assert!(!spans.iter().any(|span| span.span.name.contains("/health")), "probes are not traced");
}

#[test]
fn a_collector_that_is_away_or_hangs_costs_one_line_and_no_time() {
    // Connections are accepted by the kernel and answered by nobody.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hanging = format!("http://{}", silent.local_addr().unwrap());
    let away = format!("http://127.0.0.1:{}", free_port());
    for endpoint in [away, hanging] {
        let server = traced(&endpoint).start().unwrap();
        // Router and shard have something to deliver, again and again, and cannot.
        let complaint =
            format!("the OTLP collector at {endpoint} takes no spans, they are dropped until it does: ");
        let (complaint, end) = (complaint.as_str(), Instant::now() + Duration::from_secs(60));
        while server.log().matches(complaint).count() < 2 {
            assert!(Instant::now() < end, "{}", server.log());
            generate(&server, &[]);
            std::thread::sleep(Duration::from_millis(100));
        }
        generate(&server, &[]);
        let asked = Instant::now();
        server.signal(Signal::SIGTERM);
        let exit = server.wait().unwrap();
        let took = asked.elapsed();
        assert!(exit.status.success(), "{}", exit.log);
        // Two times 0.75 s; a delivery that is not cut short takes 5.
        assert!(took < Duration::from_secs(5), "{took:?}: {}", exit.log);
        assert_eq!(exit.log.matches(complaint).count(), 2, "one line a program: {}", exit.log);
    }
}

#[test]
fn an_address_that_is_none_is_told_before_anything_starts() {
    let exit = traced("ftp://collector").run_to_exit().unwrap();
    assert!(!exit.status.success());
    assert!(exit.log.contains("--otlp-endpoint is `ftp://collector`, expected the address"), "{}", exit.log);
    assert!(!exit.log.contains("Starting"), "{}", exit.log);
}
