//! A shard or a router that does what a test wants: `FAKE_SHARD` and `FAKE_ROUTER` say how it misbehaves.
//!
//! It is the shard when its first argument is `serve`. It writes its process id into `FAKE_DIR` and appends a line to
//! `FAKE_DIR/ends` when it ends in order.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test's helper fails its test")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Parser;
use process::LogLine;
use proto::control::shard_control_server::{ShardControl, ShardControlServer};
use proto::control::{HandshakeRequest, HandshakeResponse, PhaseEntry, StatusRequest, StatusResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// What the launcher's contract and the tests put into the environment.
#[derive(Parser, Clone)]
struct Settings {
    #[arg(long, env = "FAKE_DIR")]
    fake_dir: PathBuf,
    #[arg(long, env = "FAKE_SHARD", default_value = "")]
    fake_shard: String,
    #[arg(long, env = "FAKE_ROUTER", default_value = "")]
    fake_router: String,
    #[arg(long, env = "RANK", default_value = "0")]
    rank: u32,
    #[arg(long, env = "WORLD_SIZE", default_value = "1")]
    world_size: u32,
    #[arg(long, env = "CUDA_VISIBLE_DEVICES")]
    cuda_visible_devices: Option<String>,
    #[arg(long, env = "QUARTET_CUDA_ORDINAL")]
    cuda_ordinal: Option<usize>,
    #[arg(long, env = "QUARTET_INSTANCE_ID", default_value = "")]
    instance_id: String,
    #[arg(long, env = "QUARTET_HOLD_UNTIL_INPUT_ENDS")]
    hold_until_input_ends: bool,
    #[arg(long, env = "QUARTET_LIFELINE_FD")]
    lifeline_fd: Option<i32>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let settings = Settings::parse_from(["fake"]);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "footprint") {
        println!("{}", footprint(settings.world_size, value(&arguments, "--free-bytes")));
    } else if arguments.first().is_some_and(|first| first == "serve") {
        shard(settings, &arguments).await;
    } else {
        router(settings, &arguments).await;
    }
}

fn value<'a>(arguments: &'a [String], option: &str) -> &'a str {
    let at =
        arguments.iter().position(|argument| argument == option).unwrap_or_else(|| panic!("no {option}"));
    &arguments[at + 1]
}

/// What a shard says of a model of 12 query heads on any number of ranks.
fn footprint(world_size: u32, free_bytes: &str) -> serde_json::Value {
    let free: Vec<u64> = free_bytes.split(',').map(|bytes| bytes.parse().unwrap()).collect();
    let ranks: Vec<_> = (0..world_size)
        .map(|rank| {
            let part = |len: u32| [rank * len / world_size, (rank + 1) * len / world_size];
            serde_json::json!({
                "weight_bytes": 1_u64 << 30, "workspace_bytes": 1 << 20, "logits_bytes": 1 << 20, "block_bytes": 1 << 20,
                "query_heads": part(12), "kv_heads": part(4), "feed_forward": part(1536), "vocabulary": part(49152),
                "cache": {"num_blocks": free[rank as usize % free.len()] >> 20, "total_tokens": 16000 + rank,
                    "max_total_tokens": 8192, "max_input_tokens": 8191},
            })
        })
        .collect();
    serde_json::json!({"device": "cuda", "dtype": "bfloat16", "kv_dtype": "bfloat16", "is_quantized": false, "num_layers": 4,
        "block_size": 16, "max_context": 8192, "ranks": ranks})
}

fn write_pid(dir: &Path, name: &str) {
    std::fs::write(dir.join(format!("{name}.pid")), std::process::id().to_string()).unwrap();
}

fn write_end(dir: &Path, name: &str) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("ends")).unwrap();
    writeln!(file, "{name}").unwrap();
}

fn log(level: tracing::Level, text: &str) {
    println!("{}", LogLine::new(level, text).render());
}

async fn shard(settings: Settings, arguments: &[String]) {
    let name = format!("shard-{}", settings.rank);
    write_pid(&settings.fake_dir, &name);
    let device = format!("{:?} {:?}", settings.cuda_visible_devices, settings.cuda_ordinal);
    std::fs::write(settings.fake_dir.join(format!("{name}.device")), device).unwrap();
    log(tracing::Level::INFO, &format!("hello from rank {}", settings.rank));
    let is_last = settings.rank + 1 == settings.world_size;
    match settings.fake_shard.as_str() {
        "crash-at-restart" if settings.fake_dir.join("served").exists() => {
            eprintln!("the device has gone");
            std::process::exit(13);
        }
        "crash-at-start" if is_last => {
            log(tracing::Level::ERROR, "tensor lm_head.weight is missing");
            eprintln!("the file is truncated");
            std::process::exit(10);
        }
        "peer-lost" if !is_last => {
            // The consequence is noticed before its cause.
            std::process::exit(14);
        }
        "peer-lost" => {
            tokio::time::sleep(Duration::from_millis(100)).await;
            eprintln!("the cause");
            std::process::exit(13);
        }
        "has-a-child" => leave_orphans(&settings.fake_dir),
        "never-ready" => ended_by_signal(&settings, &name, false).await,
        _ => {}
    }
    assert_lifeline(settings.lifeline_fd);
    let socket = format!("{}-{}", value(arguments, "--uds-path"), settings.rank);
    // The one before may have been killed.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(socket).unwrap();
    let service = ShardControlServer::new(Control { settings: settings.clone() });
    let serving = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener));
    tokio::select! {
        served = serving => served.unwrap(),
        () = ended_by_signal(&settings, &name, settings.fake_shard == "ignore-term") => {}
    }
}

/// Starts two processes that lose their parent at once and stay in this one's group; the second one ends soon.
fn leave_orphans(dir: &Path) {
    let pid_file = |name: &str| dir.join(format!("{name}.pid")).display().to_string();
    let (orphan, brief) = (pid_file("orphan"), pid_file("brief"));
    let command = format!("sleep 1000 & echo -n $! > '{orphan}'; sleep 0.01 & echo -n $! > '{brief}'");
    let status = std::process::Command::new("/bin/sh").args(["-c", &command]).stdout(Stdio::null()).status();
    assert!(status.unwrap().success());
}

/// The launcher must have made the pipe inheritable, and only this end of it.
fn assert_lifeline(lifeline: Option<i32>) {
    let lifeline = lifeline.expect("no QUARTET_LIFELINE_FD");
    let target = std::fs::read_link(format!("/proc/self/fd/{lifeline}")).expect("the lifeline is not open");
    let ends = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    assert_eq!(ends.filter(|end| *end == target).count(), 1, "the write end leaked");
}

async fn ended_by_signal(settings: &Settings, name: &str, ignores: bool) {
    loop {
        process::shutdown_signal().await;
        if !ignores {
            break;
        }
    }
    write_end(&settings.fake_dir, name);
    std::process::exit(0);
}

async fn router(settings: Settings, arguments: &[String]) {
    write_pid(&settings.fake_dir, "router");
    if settings.fake_router == "crash-at-start" {
        eprintln!("no tokenizer.json");
        std::process::exit(1);
    }
    if settings.hold_until_input_ends {
        let input = tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin()));
        tokio::select! {
            read = input => drop(read.unwrap().unwrap()),
            () = ended_by_signal(&settings, "router", false) => {}
        }
        std::fs::write(settings.fake_dir.join("released"), "").unwrap();
    }
    let listener = TcpListener::bind(format!("127.0.0.1:{}", value(arguments, "--port"))).await.unwrap();
    println!("Connected");
    let serving = async {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        }
    };
    let mut told_to_give_up = process::GiveUpSignal::new().unwrap();
    let giving_up = async {
        told_to_give_up.received().await;
        println!("every stream has its error event");
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = serving => {}
        () = giving_up => {}
        () = ended_by_signal(&settings, "router", settings.fake_router == "ignore-term") => {}
    }
}

struct Control {
    settings: Settings,
}

#[tonic::async_trait]
impl ShardControl for Control {
    async fn handshake(&self, _: Request<HandshakeRequest>) -> Result<Response<HandshakeResponse>, Status> {
        Ok(Response::new(HandshakeResponse {
            instance_id: self.settings.instance_id.clone(),
            rank: self.settings.rank,
            world_size: self.settings.world_size,
            pid: std::process::id(),
            ..Default::default()
        }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let startup = vec![PhaseEntry { name: "pretend".to_owned(), nanos: 1_500_000 }];
        Ok(Response::new(StatusResponse { startup, ..Default::default() }))
    }
}
