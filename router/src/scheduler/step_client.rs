//! What the batching task asks of the shards.

use std::future::Future;

use proto::v3::{Batch, CachedBatch};
use proto::{ClientError, ShardedClient, StepResult};

/// The four calls of a batch's life. Tests put a scripted shard in their place.
pub trait StepClient: Send + 'static {
    /// Computes the prompts of `batch`; with chunking, the running batch joins the same pass.
    fn prefill(
        &mut self,
        batch: Batch,
        cached_batch: Option<CachedBatch>,
    ) -> impl Future<Output = Result<StepResult, ClientError>> + Send;

    /// One token for every request of `batches`, which become one batch.
    fn decode(
        &mut self,
        batches: Vec<CachedBatch>,
    ) -> impl Future<Output = Result<StepResult, ClientError>> + Send;

    /// Keeps `request_ids` of a cached batch.
    fn filter_batch(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> impl Future<Output = Result<Option<CachedBatch>, ClientError>> + Send;

    /// Drops one cached batch, or all.
    fn clear_cache(&mut self, batch_id: Option<u64>) -> impl Future<Output = Result<(), ClientError>> + Send;
}

impl StepClient for ShardedClient {
    async fn prefill(
        &mut self,
        batch: Batch,
        cached_batch: Option<CachedBatch>,
    ) -> Result<StepResult, ClientError> {
        ShardedClient::prefill(self, batch, cached_batch).await
    }

    async fn decode(&mut self, batches: Vec<CachedBatch>) -> Result<StepResult, ClientError> {
        ShardedClient::decode(self, batches).await
    }

    async fn filter_batch(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> Result<Option<CachedBatch>, ClientError> {
        ShardedClient::filter_batch(self, batch_id, request_ids).await
    }

    async fn clear_cache(&mut self, batch_id: Option<u64>) -> Result<(), ClientError> {
        ShardedClient::clear_cache(self, batch_id).await
    }
}
