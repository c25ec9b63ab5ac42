//! How many tokens a second go through the whole chain: shard, gRPC, router, HTTP, server-sent events, client.
//!
//! ```text
//! stream_load [--streams 64] [--tokens 500] [--runs 5] [--model DIR]
//! ```
//!
//! Starts a launcher on the tiny model of the tests (so that the chain is measured, not the model), opens the streams,
//! and counts `data:` events until all have ended. Prints one JSON line: medians and every run. The machine's cores are
//! shared by shard, router and this client.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use integration_tests::Server;
use integration_tests::golden::fixture;
use serde_json::json;

struct Load {
    streams: usize,
    tokens: usize,
    runs: usize,
    model: std::path::PathBuf,
}

impl Load {
    fn from_args() -> Result<Self> {
        let mut load = Load { streams: 64, tokens: 500, runs: 5, model: fixture("tiny-llama") };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let value = args.next().with_context(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--streams" => load.streams = value.parse()?,
                "--tokens" => load.tokens = value.parse()?,
                "--runs" => load.runs = value.parse()?,
                "--model" => load.model = value.into(),
                _ => anyhow::bail!("unknown flag {flag}; known: --streams, --tokens, --runs, --model"),
            }
        }
        Ok(load)
    }
}

/// Reads one stream to its end and counts its events.
fn read_stream(port: u16, seed: usize, tokens: usize) -> Result<usize> {
    let body = json!({
        "inputs": "The capital of France is",
        "parameters": {"max_new_tokens": tokens, "do_sample": true, "seed": seed},
    })
    .to_string();
    let mut socket = TcpStream::connect(("127.0.0.1", port))?;
    let head = "POST /generate_stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json";
    write!(socket, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    let mut buffer = vec![0; 64 << 10];
    let (mut events, mut tail) = (0, Vec::new());
    loop {
        let count = socket.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        tail.extend_from_slice(&buffer[..count]);
        events += tail.windows(6).filter(|window| window == b"data: ").count();
        // The last bytes may be the beginning of the next marker.
        let keep = tail.len().min(5);
        tail.drain(..tail.len() - keep);
    }
    Ok(events)
}

fn run(port: u16, load: &Load) -> Result<f64> {
    let start = Instant::now();
    let events: usize = std::thread::scope(|scope| {
        let streams: Vec<_> =
            (0..load.streams).map(|seed| scope.spawn(move || read_stream(port, seed, load.tokens))).collect();
        streams
            .into_iter()
            .map(|stream| stream.join().expect("a reader does not panic"))
            .sum::<Result<usize>>()
    })?;
    ensure!(events > 0, "no event came");
    Ok(events as f64 / start.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let load = Load::from_args()?;
    let server = Server::of(&load.model)
        .args(["--max-concurrent-requests".to_string(), (load.streams + 1).to_string()])
        .start()?;
    run(server.port(), &load)?; // the first run warms caches and is not counted
    let mut rates = (0..load.runs).map(|_| run(server.port(), &load)).collect::<Result<Vec<f64>>>()?;
    rates.sort_by(f64::total_cmp);
    let report = json!({
        "streams": load.streams,
        "tokens_per_stream": load.tokens,
        "tokens_per_second_median": rates[rates.len() / 2],
        "tokens_per_second_runs": rates,
    });
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}
