//! A shard without a model: it counts tokens and notes what it was asked.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::control::shard_control_server::{ShardControl, ShardControlServer};
use proto::control::{HandshakeRequest, HandshakeResponse, StatusRequest, StatusResponse};
use proto::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};
use proto::v3::*;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request as Call, Response, Status};

/// How a fake shard behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    /// Ours answer the control service, TGI's do not.
    pub(crate) is_ours: bool,
    /// Whether somebody has warmed it up already.
    pub(crate) is_warm: bool,
    /// Tokens the KV cache holds.
    pub(crate) cache_tokens: u32,
    /// The decode call that fails, counted from 1.
    pub(crate) failing_decode: Option<usize>,
    /// Decode steps less than asked for.
    pub(crate) missing_steps: u32,
    /// Whether decode never answers.
    pub(crate) hangs: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            is_ours: true,
            is_warm: true,
            cache_tokens: 100_000,
            failing_decode: None,
            missing_steps: 0,
            hangs: false,
        }
    }
}

/// What was asked of it.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) clear_cache: usize,
    pub(crate) warmups: Vec<WarmupRequest>,
    pub(crate) prefills: Vec<Batch>,
    pub(crate) decodes: usize,
    /// Steps left of the cached batch.
    remaining: u32,
    is_warm: bool,
}

/// A running fake; it lives as long as this value.
pub(crate) struct FakeShard {
    pub(crate) path: PathBuf,
    pub(crate) seen: Arc<Mutex<Seen>>,
    _folder: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

#[derive(Clone)]
struct Service {
    behaviour: Behaviour,
    url: String,
    seen: Arc<Mutex<Seen>>,
}

impl FakeShard {
    /// Listens on a socket of its own.
    pub(crate) fn start(behaviour: Behaviour) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard-0");
        let seen = Arc::new(Mutex::new(Seen { is_warm: behaviour.is_warm, ..Default::default() }));
        let service =
            Service { behaviour, url: format!("unix://{}", path.display()), seen: Arc::clone(&seen) };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(async { UnixListener::bind(&path).unwrap() });
        runtime.spawn(async move {
            let control = behaviour.is_ours.then(|| ShardControlServer::new(service.clone()));
            tonic::transport::Server::builder()
                .add_service(TextGenerationServiceServer::new(service))
                .add_optional_service(control)
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
        });
        Self { path, seen, _folder: folder, _runtime: runtime }
    }
}

fn cached(size: u32) -> CachedBatch {
    CachedBatch {
        id: 0,
        request_ids: (0..u64::from(size)).collect(),
        size,
        max_tokens: 0,
        current_tokens: size,
    }
}

#[tonic::async_trait]
impl TextGenerationService for Service {
    async fn info(&self, _: Call<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            dtype: "torch.bfloat16".to_string(),
            device_type: "cpu".to_string(),
            attention_impl: "paged".to_string(),
            block_size: 16,
            ..Default::default()
        }))
    }

    async fn service_discovery(
        &self,
        _: Call<ServiceDiscoveryRequest>,
    ) -> Result<Response<ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(ServiceDiscoveryResponse { urls: vec![self.url.clone()] }))
    }

    async fn clear_cache(&self, _: Call<ClearCacheRequest>) -> Result<Response<ClearCacheResponse>, Status> {
        self.seen.lock().unwrap().clear_cache += 1;
        Ok(Response::new(ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        _: Call<FilterBatchRequest>,
    ) -> Result<Response<FilterBatchResponse>, Status> {
        Err(Status::internal("the benchmark never filters"))
    }

    async fn warmup(&self, call: Call<WarmupRequest>) -> Result<Response<WarmupResponse>, Status> {
        let mut seen = self.seen.lock().unwrap();
        seen.warmups.push(call.into_inner());
        seen.is_warm = true;
        Ok(Response::new(WarmupResponse {
            max_supported_total_tokens: Some(self.behaviour.cache_tokens),
            max_input_tokens: 2047,
            max_total_tokens: 2048,
        }))
    }

    async fn prefill(&self, call: Call<PrefillRequest>) -> Result<Response<PrefillResponse>, Status> {
        let batch = call.into_inner().batch.unwrap();
        let mut seen = self.seen.lock().unwrap();
        if !seen.is_warm {
            return Err(Status::internal("not warmed up"));
        }
        let steps = batch.requests[0].stopping_parameters.as_ref().unwrap().max_new_tokens - 1;
        seen.remaining = steps - self.behaviour.missing_steps;
        let next = (seen.remaining > 0).then(|| cached(batch.size));
        seen.prefills.push(batch);
        Ok(Response::new(PrefillResponse { batch: next, ..Default::default() }))
    }

    async fn decode(&self, call: Call<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        if self.behaviour.hangs {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        let mut seen = self.seen.lock().unwrap();
        seen.decodes += 1;
        if self.behaviour.failing_decode == Some(seen.decodes) {
            return Err(Status::internal("out of memory"));
        }
        seen.remaining -= 1;
        let next = (seen.remaining > 0).then(|| cached(call.into_inner().batches[0].size));
        Ok(Response::new(DecodeResponse { batch: next, ..Default::default() }))
    }

    async fn health(&self, _: Call<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(HealthResponse {}))
    }
}

#[tonic::async_trait]
impl ShardControl for Service {
    async fn handshake(&self, _: Call<HandshakeRequest>) -> Result<Response<HandshakeResponse>, Status> {
        Ok(Response::new(HandshakeResponse {
            world_size: 1,
            version: "0.1.0".to_string(),
            model_id: "some/model".to_string(),
            ..Default::default()
        }))
    }

    async fn status(&self, _: Call<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let is_warm = self.seen.lock().unwrap().is_warm;
        let blocks_total = if is_warm { u64::from(self.behaviour.cache_tokens) / 16 } else { 0 };
        Ok(Response::new(StatusResponse { blocks_total, ..Default::default() }))
    }
}
