//! `generate.v3`: each call becomes a command of the engine and waits for its reply.

use std::sync::Arc;
use std::time::Instant;

use proto::CallId;
use proto::v3::text_generation_service_server::TextGenerationService;
use proto::v3::{
    ClearCacheRequest, ClearCacheResponse, DecodeRequest, DecodeResponse, FilterBatchRequest,
    FilterBatchResponse, HealthRequest, HealthResponse, InfoRequest, InfoResponse, PrefillRequest,
    PrefillResponse, ServiceDiscoveryRequest, ServiceDiscoveryResponse, WarmupRequest, WarmupResponse,
};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::convert;
use super::relay::{Call, Caller};
use crate::engine::{Command, EngineHandle, Reply};

/// The generation service.
pub(super) struct GenerationService {
    engine: EngineHandle,
    urls: Vec<String>,
}

impl GenerationService {
    pub(super) fn new(engine: EngineHandle, urls: Vec<String>) -> Self {
        Self { engine, urls }
    }

    /// Hands the command over at once and waits for the reply. A caller that goes away changes nothing: all ranks must
    /// carry out the same commands (see [`super::relay`]).
    async fn call<T: Send + 'static>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command + Send,
    ) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        let reply: Reply<T> = Box::new(move |answer| {
            // The caller has gone.
            let _ = sender.send(answer);
        });
        self.engine.send(command(reply));
        // The engine says that it is broken before it answers the call that broke it.
        match receiver.await {
            Ok(answer) => answer.map_err(|problem| self.failure(problem)),
            Err(_) => Err(lost("the engine of this shard has ended".to_string())),
        }
    }

    async fn run_warmup(&self, request: WarmupRequest) -> Result<WarmupResponse, Status> {
        let request = convert::warmup_request(request).map_err(refusal)?;
        let limits = self.call(|reply| Command::Warmup { request, reply }).await?;
        Ok(convert::warmup_response(limits))
    }

    async fn run_prefill(&self, request: PrefillRequest) -> Result<PrefillResponse, Status> {
        let received = Instant::now();
        let PrefillRequest { batch, cached_batch } = request;
        let batch = convert::new_batch(batch.ok_or_else(|| missing("batch"))?).map_err(refusal)?;
        let cached_batch = cached_batch.map(|batch| batch.id);
        let step = self.call(|reply| Command::Prefill { batch, cached_batch, received, reply }).await?;
        Ok(convert::prefill_response(step))
    }

    async fn run_decode(&self, request: DecodeRequest) -> Result<DecodeResponse, Status> {
        let received = Instant::now();
        let batch_ids = request.batches.into_iter().map(|batch| batch.id).collect();
        let step = self.call(|reply| Command::Decode { batch_ids, received, reply }).await?;
        Ok(convert::decode_response(step))
    }

    /// What a caller is told: that this call cannot be served, or that none will be any more.
    fn failure(&self, problem: String) -> Status {
        if self.engine.liveness().has_failed() { lost(problem) } else { refusal(problem) }
    }
}

/// Says that a call has come in which the ranks wait for one another.
fn begin<T: Clone>(request: &Request<T>, call: impl FnOnce(T) -> Call) -> Result<(), Status> {
    let Some(caller) = request.extensions().get::<Arc<Caller>>() else { return Ok(()) };
    caller.begin(CallId::of(request), || call(request.get_ref().clone()))
}

/// Upstream's shards answer every failure with this status.
fn refusal(problem: String) -> Status {
    tracing::error!("{problem}");
    Status::internal(problem)
}

/// Nothing that this shard holds will ever be of use again.
fn lost(problem: String) -> Status {
    tracing::error!("{problem}");
    Status::unavailable(problem)
}

fn missing(field: &str) -> Status {
    refusal(format!("{field} is missing in the request, expected one"))
}

#[tonic::async_trait]
impl TextGenerationService for GenerationService {
    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(convert::info(self.engine.model_info())))
    }

    async fn service_discovery(
        &self,
        _request: Request<ServiceDiscoveryRequest>,
    ) -> Result<Response<ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(ServiceDiscoveryResponse { urls: self.urls.clone() }))
    }

    async fn clear_cache(
        &self,
        request: Request<ClearCacheRequest>,
    ) -> Result<Response<ClearCacheResponse>, Status> {
        let batch_id = request.into_inner().id;
        self.call(|reply| Command::ClearCache { batch_id, reply }).await?;
        Ok(Response::new(ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        request: Request<FilterBatchRequest>,
    ) -> Result<Response<FilterBatchResponse>, Status> {
        let FilterBatchRequest { batch_id, request_ids } = request.into_inner();
        let batch = self.call(|reply| Command::FilterBatch { batch_id, request_ids, reply }).await?;
        Ok(Response::new(FilterBatchResponse { batch: Some(convert::cached_batch(batch)) }))
    }

    async fn warmup(&self, request: Request<WarmupRequest>) -> Result<Response<WarmupResponse>, Status> {
        begin(&request, Call::Warmup)?;
        self.run_warmup(request.into_inner()).await.map(Response::new)
    }

    async fn prefill(&self, request: Request<PrefillRequest>) -> Result<Response<PrefillResponse>, Status> {
        begin(&request, Call::Prefill)?;
        self.run_prefill(request.into_inner()).await.map(Response::new)
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        begin(&request, Call::Decode)?;
        self.run_decode(request.into_inner()).await.map(Response::new)
    }

    /// Never waits for a long prefill: the engine says beforehand when it has failed, and a step that hangs shows in the
    /// counters of the control service.
    async fn health(&self, _request: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        if self.engine.liveness().has_failed() {
            return Err(self.failure("the engine of this shard has failed".to_string()));
        }
        Ok(Response::new(HealthResponse {}))
    }
}
