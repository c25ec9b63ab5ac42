//! Loads a running server over HTTP with streamed requests in a closed loop, and says what its clients saw.
//!
//! ```text
//! http_load --port 3000 [--requests 256] [--concurrency 32] [--prompt-tokens 1024] [--max-new-tokens 128] [--vocab 128256] [--json FILE]
//! ```
//!
//! Prompts are random words `t17`, which are one token each in models made by `random_model`; every prompt differs from its
//! first token on. TTFT: from the request to the first event. ITL: between events. TPOT: (last - first event) / (tokens - 1).

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration_tests::http;
use serde_json::{Value, json};

#[derive(Clone)]
struct Load {
    port: u16,
    requests: usize,
    concurrency: usize,
    prompt_tokens: usize,
    max_new_tokens: usize,
    vocab: u64,
    json: Option<String>,
}

impl Load {
    fn from_args() -> Result<Self> {
        let mut load = Load {
            port: 3000,
            requests: 256,
            concurrency: 32,
            prompt_tokens: 1024,
            max_new_tokens: 128,
            vocab: 128_256,
            json: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args.next().with_context(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--port" => load.port = value.parse()?,
                "--requests" => load.requests = value.parse()?,
                "--concurrency" => load.concurrency = value.parse::<usize>()?.max(1),
                "--prompt-tokens" => load.prompt_tokens = value.parse()?,
                "--max-new-tokens" => load.max_new_tokens = value.parse()?,
                "--vocab" => load.vocab = value.parse()?,
                "--json" => load.json = Some(value),
                _ => bail!("unknown flag {flag}"),
            }
        }
        Ok(load)
    }

    /// A prompt that no other request has.
    fn prompt(&self, request: usize) -> String {
        let mut state = (request as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let words = (0..self.prompt_tokens).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            format!("t{}", (state >> 20) % self.vocab)
        });
        words.collect::<Vec<_>>().join(" ")
    }
}

/// When the events of one request came, from its start.
struct Timeline {
    events: Vec<Duration>,
}

fn one(load: &Load, request: usize) -> Result<Timeline> {
    let body = json!({
        "inputs": load.prompt(request),
        "parameters": {"max_new_tokens": load.max_new_tokens, "do_sample": false},
    });
    let begin = Instant::now();
    let mut events = Vec::with_capacity(load.max_new_tokens);
    for event in http::stream(load.port, "/generate_stream", &body)? {
        let event = event?;
        ensure!(!event.starts_with("{\"error\""), "request {request}: {event}");
        events.push(begin.elapsed());
    }
    ensure!(events.len() == load.max_new_tokens, "request {request} had {} events", events.len());
    Ok(Timeline { events })
}

fn main() -> Result<()> {
    let load = Load::from_args()?;
    let next = AtomicUsize::new(0);
    let begin = Instant::now();
    let timelines: Vec<Timeline> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..load.concurrency.min(load.requests))
            .map(|_| {
                scope.spawn(|| {
                    let mut timelines = Vec::new();
                    loop {
                        let request = next.fetch_add(1, Ordering::Relaxed);
                        if request >= load.requests {
                            return Ok::<_, anyhow::Error>(timelines);
                        }
                        timelines.push(one(&load, request)?);
                    }
                })
            })
            .collect();
        let all = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
        all.collect::<Result<Vec<_>>>().map(|all| all.into_iter().flatten().collect())
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let report = report(&load, &timelines, seconds);
    writeln!(std::io::stdout(), "{report}")?;
    if let Some(path) = &load.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

fn report(load: &Load, timelines: &[Timeline], seconds: f64) -> Value {
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let ttft: Vec<f64> = timelines.iter().map(|timeline| ms(timeline.events[0])).collect();
    let itl: Vec<f64> = timelines
        .iter()
        .flat_map(|timeline| timeline.events.windows(2).map(|pair| ms(pair[1] - pair[0])))
        .collect();
    let tpot: Vec<f64> = timelines
        .iter()
        .map(|Timeline { events }| {
            ms(events[events.len() - 1] - events[0]) / (events.len() - 1).max(1) as f64
        })
        .collect();
    json!({
        "requests": load.requests,
        "concurrency": load.concurrency,
        "prompt_tokens": load.prompt_tokens,
        "max_new_tokens": load.max_new_tokens,
        "seconds": seconds,
        "requests_per_second": timelines.len() as f64 / seconds,
        "output_tokens_per_second": (timelines.len() * load.max_new_tokens) as f64 / seconds,
        "ttft_ms": percentiles(ttft),
        "itl_ms": percentiles(itl),
        "tpot_ms": percentiles(tpot),
    })
}

fn percentiles(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len() as f64 - 1.0) * share).round() as usize).copied();
    json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)})
}
