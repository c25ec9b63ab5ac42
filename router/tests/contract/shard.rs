//! A shard that answers by script, over a real Unix socket.
//!
//! It generates ` t1`, ` t2`, … and obeys words of the prompt: `eosN` ends with the end token as the Nth, `stopN` with a
//! stop sequence. It keeps TGI's rules about cached batches, and checks that blocks of running requests do not overlap.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::control::shard_control_server::{ShardControl, ShardControlServer};
use proto::control::{HandshakeRequest, HandshakeResponse, StatusRequest, StatusResponse};
use proto::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};
use proto::v3::{
    CachedBatch, ClearCacheRequest, ClearCacheResponse, DecodeRequest, DecodeResponse, FilterBatchRequest,
    FilterBatchResponse, FinishReason, GeneratedText, Generation, HealthRequest, HealthResponse, InfoRequest,
    InfoResponse, PrefillRequest, PrefillResponse, Request as WireRequest, ServiceDiscoveryRequest,
    ServiceDiscoveryResponse, Tokens, WarmupRequest, WarmupResponse,
};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

pub(crate) const BLOCK_SIZE: u32 = 4;
/// 32 blocks beside the reserved one.
pub(crate) const CACHE_TOKENS: u32 = 33 * BLOCK_SIZE;
pub(crate) const MAX_INPUT: u32 = 32;
pub(crate) const MAX_TOTAL: u32 = 64;

#[derive(Clone, Copy)]
pub(crate) struct Script {
    pub(crate) supports_chunking: bool,
    /// How long a decode step takes.
    pub(crate) step: Duration,
    /// Whether the step counters move meanwhile.
    pub(crate) moves: bool,
    pub(crate) cache_tokens: u32,
}

impl Default for Script {
    fn default() -> Self {
        Self { supports_chunking: true, step: Duration::ZERO, moves: false, cache_tokens: CACHE_TOKENS }
    }
}

#[derive(Default)]
pub(crate) struct State {
    /// Names of all calls.
    pub(crate) calls: Vec<&'static str>,
    /// The next call of this name fails with `boom`.
    pub(crate) fail: Option<&'static str>,
    /// All requests that were prefilled.
    pub(crate) seen: Vec<WireRequest>,
    cached: HashMap<u64, Vec<Row>>,
    /// Steps that `Status` has told of.
    steps_told: u64,
}

impl State {
    /// Requests in cached batches.
    pub(crate) fn num_running(&self) -> usize {
        self.cached.values().map(Vec::len).sum()
    }
}

#[derive(Clone)]
struct Row {
    request: WireRequest,
    prompt_left: u32,
    generated: u32,
    text: String,
    is_done: bool,
}

#[derive(Clone)]
pub(crate) struct FakeShard {
    script: Script,
    url: String,
    pub(crate) state: Arc<Mutex<State>>,
    /// Everything that serves, so that it can end at once, as a process does.
    life: Arc<Mutex<Option<Runtime>>>,
}

impl FakeShard {
    pub(crate) fn start(path: &Path, script: Script) -> Self {
        let life = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let url = format!("unix://{}", path.display());
        let shard = Self { script, url, state: Arc::default(), life: Arc::default() };
        let service = TextGenerationServiceServer::new(shard.clone());
        let control = ShardControlServer::new(shard.clone());
        let path = path.to_path_buf();
        life.spawn(async move {
            // The socket of the life before.
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(path).unwrap();
            let server = tonic::transport::Server::builder().add_service(service).add_service(control);
            server.serve_with_incoming(UnixListenerStream::new(listener)).await
        });
        *shard.life.lock().unwrap() = Some(life);
        shard
    }

    /// Ends all connections and leaves the socket's file, as `kill -9` does.
    pub(crate) fn kill(&self) {
        if let Some(life) = self.life.lock().unwrap().take() {
            life.shutdown_background();
        }
    }

    fn call(&self, name: &'static str) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        state.calls.push(name);
        if state.fail == Some(name) {
            state.fail = None;
            return Err(Status::internal("boom"));
        }
        Ok(())
    }

    fn take(&self, id: u64) -> Result<Vec<Row>, Status> {
        let rows = self.state.lock().unwrap().cached.remove(&id);
        rows.ok_or_else(|| Status::internal(format!("batch {id} is not cached")))
    }

    fn step(&self, id: u64, mut rows: Vec<Row>) -> (Vec<Generation>, Option<CachedBatch>) {
        let generations = rows.iter_mut().filter(|row| !row.is_done).filter_map(Row::next).collect();
        if rows.iter().all(|row| row.is_done) {
            return (generations, None);
        }
        let batch = cached_batch(id, &rows);
        let mut state = self.state.lock().unwrap();
        state.cached.insert(id, rows);
        let mut blocks = HashSet::new();
        for row in state.cached.values().flatten().filter(|row| !row.is_done) {
            let all_new = row.request.blocks.iter().all(|block| blocks.insert(*block));
            assert!(all_new, "two running requests share a block");
        }
        (generations, Some(batch))
    }
}

fn cached_batch(id: u64, rows: &[Row]) -> CachedBatch {
    CachedBatch {
        id,
        request_ids: rows.iter().map(|row| row.request.id).collect(),
        size: rows.len() as u32,
        max_tokens: rows.iter().map(|row| row.request.slots.len() as u32).sum(),
        current_tokens: rows.len() as u32,
    }
}

fn tokens(id: u32, text: &str, is_special: bool) -> Tokens {
    Tokens {
        ids: vec![id],
        logprobs: vec![-0.5],
        texts: vec![text.to_string()],
        is_special: vec![is_special],
    }
}

impl Row {
    fn new(request: WireRequest) -> Self {
        // Chunked prompts: the first step computes `chunk_len`, every other one 8.
        let generated = request.generated_ids.len() as u32;
        assert!(request.generated_ids.iter().copied().eq(1..=generated), "the answer so far");
        let known = request.input_ids.len() as u32 + generated;
        let prompt_left = request.chunk_len.map_or(0, |chunk_len| known - chunk_len);
        let text = (1..=generated).map(|id| format!(" t{id}")).collect();
        Self { request, prompt_left, generated, text, is_done: false }
    }

    /// The number in a word of the prompt that starts with `name`.
    fn directive(&self, name: &str) -> Option<u32> {
        self.request.inputs.split_whitespace().find_map(|word| word.strip_prefix(name)?.parse().ok())
    }

    fn next(&mut self) -> Option<Generation> {
        if self.prompt_left > 0 {
            self.prompt_left = self.prompt_left.saturating_sub(8);
            return None;
        }
        self.generated += 1;
        let stopping = self.request.stopping_parameters.as_ref().unwrap();
        let is_eos = self.directive("eos") == Some(self.generated);
        let finish_reason = if self.generated >= stopping.max_new_tokens {
            Some(FinishReason::Length)
        } else if is_eos {
            Some(FinishReason::EosToken)
        } else if self.directive("stop") == Some(self.generated) {
            Some(FinishReason::StopSequence)
        } else {
            None
        };
        let text = if is_eos { "</s>".to_string() } else { format!(" t{}", self.generated) };
        if !is_eos {
            self.text.push_str(&text);
        }
        self.is_done = finish_reason.is_some();
        let parameters = self.request.parameters.as_ref().unwrap();
        let is_sampled = parameters.do_sample || parameters.temperature != 1.0;
        let top = (0..self.request.top_n_tokens).map(|n| (n, format!("top{n}"))).fold(
            Tokens::default(),
            |mut top, (id, text)| {
                top.ids.push(id);
                top.logprobs.push(-1.0);
                top.texts.push(text);
                top.is_special.push(false);
                top
            },
        );
        let prefill_tokens = (self.request.prefill_logprobs && self.generated == 1).then(|| Tokens {
            ids: self.request.input_ids.clone(),
            logprobs: self
                .request
                .input_ids
                .iter()
                .enumerate()
                .map(|(n, _)| if n == 0 { f32::NAN } else { -2.0 })
                .collect(),
            texts: self.request.input_ids.iter().map(|id| format!("p{id}")).collect(),
            is_special: Vec::new(),
        });
        Some(Generation {
            request_id: self.request.id,
            prefill_tokens,
            tokens: Some(tokens(self.generated, &text, is_eos)),
            generated_text: finish_reason.map(|finish_reason| GeneratedText {
                text: self.text.clone(),
                generated_tokens: self.generated,
                finish_reason: finish_reason as i32,
                seed: is_sampled.then_some(parameters.seed),
            }),
            top_tokens: if self.request.top_n_tokens > 0 { vec![top] } else { Vec::new() },
        })
    }
}

#[tonic::async_trait]
impl ShardControl for FakeShard {
    async fn handshake(&self, _: Request<HandshakeRequest>) -> Result<Response<HandshakeResponse>, Status> {
        Err(Status::unimplemented("as TGI's shards"))
    }

    /// In the middle of a step, always; of another one each time if they move.
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        state.steps_told += u64::from(self.script.moves);
        let (steps_started, steps_finished) = (state.steps_told + 1, state.steps_told);
        Ok(Response::new(StatusResponse { steps_started, steps_finished, ..Default::default() }))
    }
}

#[tonic::async_trait]
impl TextGenerationService for FakeShard {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            dtype: "torch.float32".to_string(),
            device_type: "cpu".to_string(),
            support_chunking: self.script.supports_chunking,
            attention_impl: "paged".to_string(),
            block_size: BLOCK_SIZE,
            supports_resume: true,
            ..Default::default()
        }))
    }

    async fn service_discovery(
        &self,
        _: Request<ServiceDiscoveryRequest>,
    ) -> Result<Response<ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(ServiceDiscoveryResponse { urls: vec![self.url.clone()] }))
    }

    async fn clear_cache(
        &self,
        request: Request<ClearCacheRequest>,
    ) -> Result<Response<ClearCacheResponse>, Status> {
        self.call("clear_cache")?;
        let mut state = self.state.lock().unwrap();
        match request.into_inner().id {
            Some(id) => drop(state.cached.remove(&id)),
            None => state.cached.clear(),
        }
        Ok(Response::new(ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        request: Request<FilterBatchRequest>,
    ) -> Result<Response<FilterBatchResponse>, Status> {
        self.call("filter_batch")?;
        let FilterBatchRequest { batch_id, request_ids } = request.into_inner();
        let mut rows = self.take(batch_id)?;
        rows.retain(|row| request_ids.contains(&row.request.id));
        let batch = Some(cached_batch(batch_id, &rows));
        self.state.lock().unwrap().cached.insert(batch_id, rows);
        Ok(Response::new(FilterBatchResponse { batch }))
    }

    async fn warmup(&self, _: Request<WarmupRequest>) -> Result<Response<WarmupResponse>, Status> {
        self.call("warmup")?;
        Ok(Response::new(WarmupResponse {
            max_supported_total_tokens: Some(self.script.cache_tokens),
            max_input_tokens: MAX_INPUT,
            max_total_tokens: MAX_TOTAL,
        }))
    }

    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<PrefillResponse>, Status> {
        self.call("prefill")?;
        let PrefillRequest { batch, cached_batch } = request.into_inner();
        let batch = batch.unwrap();
        let mut rows = match &cached_batch {
            Some(cached) => self.take(cached.id)?,
            None => Vec::new(),
        };
        self.state.lock().unwrap().seen.extend(batch.requests.iter().cloned());
        rows.extend(batch.requests.into_iter().map(Row::new));
        let id = cached_batch.map_or(batch.id, |cached| cached.id);
        let (generations, batch) = self.step(id, rows);
        Ok(Response::new(PrefillResponse { generations, batch, ..Default::default() }))
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        if !self.script.step.is_zero() {
            tokio::time::sleep(self.script.step).await;
        }
        self.call("decode")?;
        let batches = request.into_inner().batches;
        let mut rows = Vec::new();
        for batch in &batches {
            rows.extend(self.take(batch.id)?);
        }
        let (generations, batch) = self.step(batches[0].id, rows);
        Ok(Response::new(DecodeResponse { generations, batch, ..Default::default() }))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        self.call("health")?;
        Ok(Response::new(HealthResponse {}))
    }
}
