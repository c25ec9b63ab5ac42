//! One connection to one shard.

use std::future::Future;
use std::path::Path;

use opentelemetry::propagation::Injector;
use opentelemetry::{Context, global};
use tonic::metadata::{MetadataKey, MetadataMap};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::ClientError;
use crate::call_id::CallId;
use crate::connection::{self, Closed};
use crate::control::shard_control_client::ShardControlClient;
use crate::control::{HandshakeRequest, HandshakeResponse, StatusRequest, StatusResponse};
use crate::v3::text_generation_service_client::TextGenerationServiceClient;
use crate::v3::{
    Batch, CachedBatch, ClearCacheRequest, DecodeRequest, DecodeResponse, FilterBatchRequest, HealthRequest,
    InfoRequest, InfoResponse, PrefillRequest, PrefillResponse, ServiceDiscoveryRequest, WarmupRequest,
    WarmupResponse,
};

/// A shard accepts messages of up to 2^31 - 1 bytes, as TGI's does; answers of prompt log-probabilities are large too.
const MAX_MESSAGE_BYTES: usize = (1 << 31) - 1;

/// A client of one shard over its Unix socket. Cloning is cheap: clones share the connection.
///
/// It never connects again: once the shard has gone, every call answers [`ClientError::Lost`].
#[derive(Debug, Clone)]
pub struct ShardClient {
    closed: Closed,
    /// The call that is made next.
    call: Option<CallId>,
    generation: TextGenerationServiceClient<InterceptedService<Channel, TellTrace>>,
    control: ShardControlClient<Channel>,
}

impl ShardClient {
    /// Connects to the shard that listens on `uds_path`.
    ///
    /// # Errors
    /// [`ClientError::Connection`] when nobody listens there.
    pub async fn connect(uds_path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = uds_path.as_ref();
        let (channel, closed) = connection::connect(path).await.map_err(|error| ClientError::Connection {
            uds_path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            closed,
            call: None,
            generation: TextGenerationServiceClient::with_interceptor(
                channel.clone(),
                tell_trace as TellTrace,
            )
            .max_decoding_message_size(MAX_MESSAGE_BYTES),
            control: ShardControlClient::new(channel),
        })
    }

    /// The same client for one call of this name, which other ranks get too: a shard whose caller goes away while it computes
    /// hands the call on to those that it did not reach.
    pub fn as_call(&self, call: CallId) -> Self {
        Self { call: Some(call), ..self.clone() }
    }

    fn named<T>(&self, message: T) -> Request<T> {
        match self.call {
            Some(call) => call.name(message),
            None => Request::new(message),
        }
    }

    /// Resolves when the connection has ended, which is when the shard has.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        self.closed.clone().wait()
    }

    /// Who answers on this socket.
    pub async fn handshake(&mut self) -> Result<HandshakeResponse, ClientError> {
        Ok(self.control.handshake(HandshakeRequest {}).await?.into_inner())
    }

    /// Step counters and ledgers; never waits for the engine.
    pub async fn status(&mut self) -> Result<StatusResponse, ClientError> {
        Ok(self.control.status(StatusRequest {}).await?.into_inner())
    }

    /// What the shard is.
    pub async fn info(&mut self) -> Result<InfoResponse, ClientError> {
        Ok(self.generation.info(InfoRequest {}).await?.into_inner())
    }

    /// Socket paths of all ranks, in rank order, without the `unix://` prefix.
    pub async fn service_discovery(&mut self) -> Result<Vec<String>, ClientError> {
        let response = self.generation.service_discovery(ServiceDiscoveryRequest {}).await?.into_inner();
        Ok(response
            .urls
            .into_iter()
            .map(|url| url.strip_prefix("unix://").map(str::to_string).unwrap_or(url))
            .collect())
    }

    /// Touches the device.
    pub async fn health(&mut self) -> Result<(), ClientError> {
        self.generation.health(HealthRequest {}).await?;
        Ok(())
    }

    /// Drops one cached batch, or all.
    pub async fn clear_cache(&mut self, batch_id: Option<u64>) -> Result<(), ClientError> {
        self.generation.clear_cache(ClearCacheRequest { id: batch_id }).await?;
        Ok(())
    }

    /// Keeps `request_ids` of a cached batch.
    pub async fn filter_batch(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> Result<Option<CachedBatch>, ClientError> {
        let request = FilterBatchRequest { batch_id, request_ids };
        Ok(self.generation.filter_batch(request).await?.into_inner().batch)
    }

    /// Runs the worst legal prefill and sizes the KV cache.
    pub async fn warmup(&mut self, request: WarmupRequest) -> Result<WarmupResponse, ClientError> {
        let request = self.named(request);
        Ok(self.generation.warmup(request).await?.into_inner())
    }

    /// Computes the prompts of `batch`; with chunking, the running batch's next tokens too.
    pub async fn prefill(
        &mut self,
        batch: Batch,
        cached_batch: Option<CachedBatch>,
    ) -> Result<PrefillResponse, ClientError> {
        let request = self.named(PrefillRequest { batch: Some(batch), cached_batch });
        Ok(self.generation.prefill(request).await?.into_inner())
    }

    /// One token for every request of `batches`.
    pub async fn decode(&mut self, batches: Vec<CachedBatch>) -> Result<DecodeResponse, ClientError> {
        let request = self.named(DecodeRequest { batches });
        Ok(self.generation.decode(request).await?.into_inner())
    }
}

type TellTrace = fn(Request<()>) -> Result<Request<()>, Status>;

/// Tells the shard which span it works for, in the metadata of each call: W3C trace context. Adds nothing where no spans
/// are exported.
fn tell_trace(mut request: Request<()>) -> Result<Request<()>, Status> {
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&Context::current(), &mut Metadata(request.metadata_mut()));
    });
    Ok(request)
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        // Both are ASCII: trace context has no other.
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), value.parse()) {
            self.0.insert(key, value);
        }
    }
}
