//! All ranks of one model as if they were one shard.
//!
//! Every rank receives the same calls in the same order. Each reports the generations of the requests with
//! `request_id % world_size == rank`; merged they are the whole batch. The next batch is the same on all ranks, and the
//! slowest rank's timings are the group's.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{join_all, select_all, try_join_all};

use crate::call_id::CallCounter;
use crate::v3::{
    Batch, CachedBatch, DecodeResponse, Generation, InfoResponse, PrefillResponse, WarmupRequest,
    WarmupResponse,
};
use crate::{ClientError, ShardClient};

/// How often ranks whose last calls differ are asked again: about five seconds for what takes milliseconds.
const IN_STEP_LOOKS: u32 = 1000;
/// Between two looks.
const IN_STEP_PAUSE: Duration = Duration::from_millis(5);

/// What the shards are.
pub type ShardInfo = InfoResponse;

/// Where the time of one step went, on the slowest rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTimings {
    /// Forward pass and sampling.
    pub forward: Duration,
    /// Host-side token and text work.
    pub decode: Duration,
    /// The whole call.
    pub total: Duration,
    /// Joining batches, when there were several.
    pub concat: Option<Duration>,
}

/// The answer to one prefill or decode, merged over the ranks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepResult {
    /// One entry a request that got a token in this step.
    pub generations: Vec<Generation>,
    /// The batch to decode next; absent when every request has stopped.
    pub next_batch: Option<CachedBatch>,
    /// Timings of the slowest rank.
    pub timings: StepTimings,
}

/// A client of all ranks. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct ShardedClient {
    clients: Vec<ShardClient>,
    calls: CallCounter,
}

impl ShardedClient {
    /// Connects to the master shard and, through it, to every rank.
    ///
    /// # Errors
    /// [`ClientError::Connection`] for a socket nobody listens on, [`ClientError::Disagreement`] for an empty list, for ranks
    /// that were not started together and for ranks that an earlier client left in different calls.
    pub async fn connect(master_uds_path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let urls = ShardClient::connect(master_uds_path).await?.service_discovery().await?;
        if urls.is_empty() {
            return Err(ClientError::Disagreement("service discovery returned no shard".to_string()));
        }
        let mut clients = try_join_all(urls.iter().map(ShardClient::connect)).await?;
        check_in_step(&mut clients).await?;
        Ok(Self { clients, calls: CallCounter::new() })
    }

    /// Resolves when the connection to any rank has ended: without one rank the others are of no use.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        select_all(self.clients.iter().map(|client| client.closed().boxed())).map(drop)
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.clients.len()
    }

    /// The clients of the single ranks, in rank order.
    pub fn ranks(&self) -> &[ShardClient] {
        &self.clients
    }

    /// The ranks' clients for one call in which the ranks wait for one another.
    fn for_one_call(&self) -> Vec<ShardClient> {
        let call = self.calls.next();
        self.clients.iter().map(|client| client.as_call(call)).collect()
    }

    /// What the shards are, in the last rank's words, as TGI's router takes it.
    pub async fn info(&mut self) -> Result<ShardInfo, ClientError> {
        last(try_join_all(self.clients.iter_mut().map(ShardClient::info)).await?)
    }

    /// Touches the device of every rank.
    pub async fn health(&mut self) -> Result<(), ClientError> {
        try_join_all(self.clients.iter_mut().map(ShardClient::health)).await.map(drop)
    }

    /// Drops one cached batch, or all, on every rank.
    pub async fn clear_cache(&mut self, batch_id: Option<u64>) -> Result<(), ClientError> {
        settle(join_all(self.clients.iter_mut().map(|client| client.clear_cache(batch_id))).await).map(drop)
    }

    /// Keeps `request_ids` of a cached batch on every rank.
    pub async fn filter_batch(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> Result<Option<CachedBatch>, ClientError> {
        let calls = self.clients.iter_mut().map(|client| client.filter_batch(batch_id, request_ids.clone()));
        last(settle(join_all(calls).await)?)
    }

    /// Warms up every rank; each limit is the smallest any rank reported.
    pub async fn warmup(&mut self, request: WarmupRequest) -> Result<WarmupResponse, ClientError> {
        let mut clients = self.for_one_call();
        let calls = clients.iter_mut().map(|client| client.warmup(request.clone()));
        settle(join_all(calls).await)?
            .into_iter()
            .reduce(|a, b| WarmupResponse {
                max_supported_total_tokens: a.max_supported_total_tokens.min(b.max_supported_total_tokens),
                max_input_tokens: a.max_input_tokens.min(b.max_input_tokens),
                max_total_tokens: a.max_total_tokens.min(b.max_total_tokens),
            })
            .ok_or_else(no_answer)
    }

    /// Computes the prompts of `batch` on every rank; with chunking, the running batch joins the same pass.
    pub async fn prefill(
        &mut self,
        batch: Batch,
        cached_batch: Option<CachedBatch>,
    ) -> Result<StepResult, ClientError> {
        let mut clients = self.for_one_call();
        let calls = clients.iter_mut().map(|client| client.prefill(batch.clone(), cached_batch.clone()));
        merge(settle(join_all(calls).await)?.into_iter().map(StepResult::from).collect())
    }

    /// One token for every request of `batches`, on every rank.
    pub async fn decode(&mut self, batches: Vec<CachedBatch>) -> Result<StepResult, ClientError> {
        let mut clients = self.for_one_call();
        let calls = clients.iter_mut().map(|client| client.decode(batches.clone()));
        merge(settle(join_all(calls).await)?.into_iter().map(StepResult::from).collect())
    }
}

impl From<PrefillResponse> for StepResult {
    fn from(response: PrefillResponse) -> Self {
        StepResult {
            generations: response.generations,
            next_batch: response.batch,
            timings: StepTimings {
                forward: Duration::from_nanos(response.forward_ns),
                decode: Duration::from_nanos(response.decode_ns),
                total: Duration::from_nanos(response.total_ns),
                concat: response.concat_ns.map(Duration::from_nanos),
            },
        }
    }
}

impl From<DecodeResponse> for StepResult {
    fn from(response: DecodeResponse) -> Self {
        StepResult {
            generations: response.generations,
            next_batch: response.batch,
            timings: StepTimings {
                forward: Duration::from_nanos(response.forward_ns),
                decode: Duration::from_nanos(response.decode_ns),
                total: Duration::from_nanos(response.total_ns),
                concat: response.concat_ns.map(Duration::from_nanos),
            },
        }
    }
}

/// While a group is being restarted, a rank of the old one may still answer beside one of the new; and after the death of
/// another client, a rank may wait in a call that the others are about to be told of. Shards that are not Quartet's do not
/// know the question.
async fn check_in_step(clients: &mut [ShardClient]) -> Result<(), ClientError> {
    if clients.len() < 2 {
        return Ok(());
    }
    for _ in 0..IN_STEP_LOOKS {
        let answers = match try_join_all(clients.iter_mut().map(ShardClient::handshake)).await {
            Err(error) if error.is_lost() => return Err(error),
            Err(_) => return Ok(()),
            Ok(answers) => answers,
        };
        if let Some(other) = answers.iter().find(|answer| answer.instance_id != answers[0].instance_id) {
            return Err(ClientError::Disagreement(format!(
                "rank {} was started as a part of {:?}, rank {} of {:?}",
                answers[0].rank, answers[0].instance_id, other.rank, other.instance_id
            )));
        }
        if answers.iter().all(|answer| answer.last_call == answers[0].last_call) {
            return Ok(());
        }
        tokio::time::sleep(IN_STEP_PAUSE).await;
    }
    Err(ClientError::Disagreement("their last calls differ and stay different".to_string()))
}

/// Waits for all ranks before it reports an error: a call that went to one rank must have ended on all of them
/// before the next one starts, or their order would differ from rank to rank. That a rank is lost outranks what others
/// say, because it ends all of them; and that it has gone without a word outranks engines that failed, because theirs
/// fail when they miss it.
fn settle<T>(answers: Vec<Result<T, ClientError>>) -> Result<Vec<T>, ClientError> {
    let mut values = Vec::with_capacity(answers.len());
    let mut failure: Option<ClientError> = None;
    for answer in answers {
        match answer {
            Ok(value) => values.push(value),
            Err(error) if failure.as_ref().is_none_or(|known| weight(&error) > weight(known)) => {
                failure = Some(error);
            }
            Err(_) => {}
        }
    }
    failure.map_or(Ok(values), Err)
}

fn weight(error: &ClientError) -> u8 {
    match error {
        ClientError::Lost(_) | ClientError::Connection { .. } => 2,
        ClientError::EngineFailed(_) => 1,
        ClientError::Generation(_) | ClientError::Disagreement(_) => 0,
    }
}

fn merge(steps: Vec<StepResult>) -> Result<StepResult, ClientError> {
    let mut merged = StepResult::default();
    let mut answered = false;
    for step in steps {
        answered = true;
        merged.generations.extend(step.generations);
        merged.next_batch = step.next_batch;
        if step.timings.total >= merged.timings.total {
            merged.timings = step.timings;
        }
    }
    if answered { Ok(merged) } else { Err(no_answer()) }
}

fn last<T>(answers: Vec<T>) -> Result<T, ClientError> {
    answers.into_iter().next_back().ok_or_else(no_answer)
}

fn no_answer() -> ClientError {
    ClientError::Disagreement("no shard answered".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(request_ids: &[u64], total_ms: u64) -> StepResult {
        StepResult {
            generations: request_ids
                .iter()
                .map(|&request_id| Generation { request_id, ..Default::default() })
                .collect(),
            next_batch: Some(CachedBatch { id: 7, ..Default::default() }),
            timings: StepTimings { total: Duration::from_millis(total_ms), ..Default::default() },
        }
    }

    #[test]
    fn merging_keeps_every_ranks_generations_and_the_slowest_timings() {
        let merged = merge(vec![step(&[0, 2], 5), step(&[1], 9)]).unwrap();
        let ids: Vec<u64> = merged.generations.iter().map(|generation| generation.request_id).collect();
        assert_eq!(ids, [0, 2, 1]);
        assert_eq!(merged.timings.total, Duration::from_millis(9));
        assert_eq!(merged.next_batch.map(|batch| batch.id), Some(7));
    }

    #[test]
    fn one_failing_rank_fails_the_call() {
        let answers = vec![Ok(1), Err(ClientError::Generation("out of memory".to_string()))];
        assert_eq!(settle(answers).unwrap_err().to_string(), "Server error: out of memory");
    }

    #[test]
    fn a_lost_rank_outranks_what_the_others_say() {
        let refused = || Err::<u32, _>(ClientError::Generation("batch 1 is not cached".to_string()));
        let failed = || Err(ClientError::EngineFailed("rank 1 is lost".to_string()));
        let answers = vec![refused(), failed(), Ok(1), Err(ClientError::Lost("gone".to_string())), failed()];
        assert!(matches!(settle(answers), Err(ClientError::Lost(_))));
        assert!(matches!(settle(vec![refused(), failed()]), Err(ClientError::EngineFailed(_))));
    }

    #[test]
    fn no_rank_is_an_error() {
        assert!(merge(Vec::new()).is_err());
    }
}
