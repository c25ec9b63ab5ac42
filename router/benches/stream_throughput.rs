//! How many tokens a second the router moves from a shard to its clients, with a shard that computes nothing.
//!
//! `cargo bench -p router --bench stream_throughput [-- STREAMS TOKENS STEP_US]` starts the real router binary, a scripted
//! shard in a process of its own, and STREAMS clients of `/generate_stream` (64 of 1000 tokens by default). STEP_US is how
//! long the shard sleeps in a step: 0 shows the ceiling, a real step time the cost of a token when each is sent alone.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints, and fails by panicking")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use proto::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};
use proto::v3::{
    CachedBatch, ClearCacheRequest, ClearCacheResponse, DecodeRequest, DecodeResponse, FilterBatchRequest,
    FilterBatchResponse, GeneratedText, Generation, HealthRequest, HealthResponse, InfoRequest, InfoResponse,
    PrefillRequest, PrefillResponse, ServiceDiscoveryRequest, ServiceDiscoveryResponse, Tokens,
    WarmupRequest, WarmupResponse,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    if let [role, socket, step_us] = &arguments[..]
        && role == "shard"
    {
        let step = Duration::from_micros(step_us.parse().unwrap());
        return runtime.block_on(serve_shard(socket, step));
    }
    let number = |index: usize, default| arguments.get(index).map_or(default, |text| text.parse().unwrap());
    runtime.block_on(measure(number(0, 64), number(1, 1000), number(2, 0)));
}

async fn measure(num_streams: usize, num_tokens: usize, step_us: usize) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("shard-0");
    write_model(directory.path());
    let this = std::env::current_exe().unwrap();
    let _shard = Process::spawn(Command::new(this).arg("shard").arg(&socket).arg(step_us.to_string()));
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Bound and released: free for the router a moment later.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut router = Command::new(env!("CARGO_BIN_EXE_router"));
    router.arg("--port").arg(address.port().to_string()).arg("--hostname").arg("127.0.0.1");
    router.arg("--master-shard-uds-path").arg(&socket).arg("--tokenizer-name").arg(directory.path());
    let started = Instant::now();
    let router = Process::spawn(&mut router);
    while TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("router listens after {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    for round in 1..=5 {
        let cpu = router.cpu_seconds();
        let started = Instant::now();
        let streams = (0..num_streams).map(|_| tokio::spawn(read_stream(address, num_tokens)));
        for stream in futures::future::join_all(streams).await {
            assert_eq!(stream.unwrap(), num_tokens);
        }
        let seconds = started.elapsed().as_secs_f64();
        let total = (num_streams * num_tokens) as f64;
        let router_cpu = router.cpu_seconds() - cpu;
        println!(
            "round {round}: {:.0} tokens/s ({num_streams} streams); router {:.1} us of CPU a token",
            total / seconds,
            router_cpu / total * 1e6
        );
    }
}

/// Reads one stream to its end and counts its events.
async fn read_stream(address: SocketAddr, num_tokens: usize) -> usize {
    let body = format!(r#"{{"inputs":"a","parameters":{{"max_new_tokens":{num_tokens}}}}}"#);
    let head = "POST /generate_stream HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n";
    let length = body.len();
    let request = format!("{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 64 * 1024];
    let (mut events, mut last) = (0, 0);
    loop {
        let read = stream.read(&mut buffer).await.unwrap();
        if read == 0 {
            return events;
        }
        for byte in &buffer[..read] {
            events += usize::from(*byte == b'\n' && last == b'\n');
            last = *byte;
        }
    }
}

/// A model directory with a tokenizer of one word; nobody reads its weights.
fn write_model(root: &Path) {
    let write = |name: &str, text: &str| std::fs::write(root.join(name), text).unwrap();
    write("config.json", r#"{"model_type":"llama"}"#);
    write("model.safetensors", "\x02\0\0\0\0\0\0\0{}");
    write(
        "tokenizer.json",
        r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"[UNK]":0,"a":1},"unk_token":"[UNK]"}}"#,
    );
}

/// Killed when it goes out of scope.
struct Process(Child);

impl Process {
    fn spawn(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }

    /// User and system time so far; clock ticks are hundredths of a second on Linux.
    fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn serve_shard(socket: &str, step: Duration) {
    let shard = Shard { url: format!("unix://{socket}"), step, cached: Mutex::default() };
    let listener = UnixListener::bind(socket).unwrap();
    tonic::transport::Server::builder()
        .add_service(TextGenerationServiceServer::new(shard))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .unwrap();
}

/// Request id, tokens generated, tokens wanted.
type Rows = Vec<(u64, u32, u32)>;

/// Generates the same token for everybody at once.
struct Shard {
    url: String,
    step: Duration,
    cached: Mutex<HashMap<u64, Rows>>,
}

impl Shard {
    fn take(&self, id: u64) -> Rows {
        self.cached.lock().unwrap().remove(&id).unwrap_or_default()
    }

    fn put(&self, id: u64, rows: Rows) -> CachedBatch {
        let size = rows.len() as u32;
        let request_ids = rows.iter().map(|row| row.0).collect();
        self.cached.lock().unwrap().insert(id, rows);
        CachedBatch { id, request_ids, size, max_tokens: size * 1024, current_tokens: size }
    }

    fn step(&self, id: u64, mut rows: Rows) -> (Vec<Generation>, Option<CachedBatch>) {
        let generations = rows.iter_mut().filter(|row| row.1 < row.2).map(generate).collect();
        let runs = rows.iter().any(|row| row.1 < row.2);
        (generations, runs.then(|| self.put(id, rows)))
    }
}

fn generate((request_id, generated, wanted): &mut (u64, u32, u32)) -> Generation {
    *generated += 1;
    let text = || " token".to_string();
    Generation {
        request_id: *request_id,
        tokens: Some(Tokens {
            ids: vec![1234],
            logprobs: vec![-0.123_456],
            texts: vec![text()],
            is_special: vec![false],
        }),
        generated_text: (generated == wanted).then(|| GeneratedText {
            text: text(),
            generated_tokens: *wanted,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tonic::async_trait]
impl TextGenerationService for Shard {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let info = InfoResponse { support_chunking: true, block_size: 16, ..Default::default() };
        Ok(Response::new(info))
    }

    async fn service_discovery(
        &self,
        _: Request<ServiceDiscoveryRequest>,
    ) -> Result<Response<ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(ServiceDiscoveryResponse { urls: vec![self.url.clone()] }))
    }

    async fn clear_cache(
        &self,
        _: Request<ClearCacheRequest>,
    ) -> Result<Response<ClearCacheResponse>, Status> {
        self.cached.lock().unwrap().clear();
        Ok(Response::new(ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        request: Request<FilterBatchRequest>,
    ) -> Result<Response<FilterBatchResponse>, Status> {
        let FilterBatchRequest { batch_id, request_ids } = request.into_inner();
        let mut rows = self.take(batch_id);
        rows.retain(|row| request_ids.contains(&row.0));
        Ok(Response::new(FilterBatchResponse { batch: Some(self.put(batch_id, rows)) }))
    }

    async fn warmup(&self, _: Request<WarmupRequest>) -> Result<Response<WarmupResponse>, Status> {
        Ok(Response::new(WarmupResponse {
            max_supported_total_tokens: Some(16 * 65_536),
            max_input_tokens: 2048,
            max_total_tokens: 8192,
        }))
    }

    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<PrefillResponse>, Status> {
        let PrefillRequest { batch, cached_batch } = request.into_inner();
        let batch = batch.unwrap_or_default();
        let id = cached_batch.as_ref().map_or(batch.id, |cached| cached.id);
        let mut rows = self.take(id);
        rows.extend(batch.requests.into_iter().map(|request| {
            (request.id, 0, request.stopping_parameters.map_or(1, |stopping| stopping.max_new_tokens))
        }));
        let (generations, batch) = self.step(id, rows);
        Ok(Response::new(PrefillResponse { generations, batch, ..Default::default() }))
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        if !self.step.is_zero() {
            tokio::time::sleep(self.step).await;
        }
        let id = request.into_inner().batches.first().map_or(0, |batch| batch.id);
        let (generations, batch) = self.step(id, self.take(id));
        Ok(Response::new(DecodeResponse { generations, batch, ..Default::default() }))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(HealthResponse {}))
    }
}
