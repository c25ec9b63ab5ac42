//! The first calls to the shards.

use std::path::PathBuf;

use proto::v3::{Batch, NextTokenChooserParameters, Request, StoppingCriteriaParameters, WarmupRequest};
use proto::{ClientError, ShardInfo, ShardedClient};

use crate::RouterError;
use crate::config::{BatchingConfig, Limits};
use crate::scheduler::text_chunk;

/// Shards that are ready, and what they answered.
pub struct WarmedUp {
    /// Connected to all ranks.
    pub client: ShardedClient,
    /// What they are.
    pub info: ShardInfo,
    /// The limits that hold.
    pub limits: Limits,
}

/// Connects to all ranks, drops what an earlier router may have left, and runs the worst legal prefill.
///
/// # Errors
/// A call failed, or the answers contradict the flags.
pub async fn connect_and_warm_up(
    master_shard_uds_path: PathBuf,
    flags: BatchingConfig,
) -> Result<WarmedUp, RouterError> {
    let failed = |step| move |source: ClientError| RouterError::Shards { step, source };
    let mut client =
        ShardedClient::connect(&master_shard_uds_path).await.map_err(failed("connecting to the shards"))?;
    client.clear_cache(None).await.map_err(failed("clearing the shards' cache"))?;
    let info = client.info().await.map_err(failed("asking the shards what they are"))?;
    let answer = client.warmup(warmup_request(&flags)).await.map_err(failed("warming up the shards"))?;
    let limits = Limits::settle(&flags, &info, &answer).map_err(RouterError::Configuration)?;
    if let Some(overruled) = flags.overruled(&answer) {
        tracing::warn!("{overruled}");
    }
    if info.support_chunking {
        tracing::debug!(
            "prompts are computed in pieces: waiting_served_ratio and max_waiting_tokens are not used"
        );
    }
    Ok(WarmedUp { client, info, limits })
}

/// As many requests of the longest prompt as one step may compute.
///
/// TGI's own shards tokenize `inputs`; ours take `input_ids`, and token 0 is in every vocabulary.
fn warmup_request(flags: &BatchingConfig) -> WarmupRequest {
    let max_prefill_tokens = flags.max_batch_prefill_tokens;
    let max_input_tokens = flags.max_input_tokens.map(saturating);
    let max_total_tokens = flags.max_total_tokens.map(saturating);
    let mut requests: Vec<Request> = Vec::new();
    let mut num_tokens = 0;
    while num_tokens < max_prefill_tokens && flags.max_batch_size.is_none_or(|max| requests.len() < max) {
        let truncate = (max_prefill_tokens - num_tokens).min(max_input_tokens.unwrap_or(u32::MAX)).max(1);
        let id = requests.len() as u64;
        requests.push(longest_request(id, truncate, max_total_tokens));
        num_tokens += truncate;
    }
    let batch = Batch {
        id: 0,
        size: u32::try_from(requests.len()).unwrap_or(u32::MAX),
        requests,
        max_tokens: max_input_tokens.unwrap_or(0),
        max_blocks: 0,
    };
    WarmupRequest { batch: Some(batch), max_input_tokens, max_prefill_tokens, max_total_tokens }
}

/// A request that uses everything a shard can be asked for.
fn longest_request(id: u64, truncate: u32, max_total_tokens: Option<u32>) -> Request {
    let inputs = "_test ".repeat(truncate as usize);
    let max_new_tokens = max_total_tokens.map_or(1, |total| total.saturating_sub(truncate).max(1));
    Request {
        id,
        input_chunks: Some(text_chunk(&inputs)),
        inputs,
        input_ids: vec![0; truncate as usize],
        truncate,
        parameters: Some(NextTokenChooserParameters {
            temperature: 0.9,
            top_k: 10,
            top_p: 0.9,
            typical_p: 0.9,
            do_sample: false,
            seed: 0,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            // Requests with a watermark are refused, so none has to be warmed up.
            watermark: false,
            ..Default::default()
        }),
        stopping_parameters: Some(StoppingCriteriaParameters {
            max_new_tokens,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        prefill_logprobs: true,
        top_n_tokens: 20,
        add_special_tokens: true,
        ..Default::default()
    }
}

fn saturating(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: BatchingConfig = BatchingConfig {
        max_input_tokens: Some(40),
        max_total_tokens: Some(60),
        max_batch_prefill_tokens: 100,
        max_batch_total_tokens: None,
        max_batch_size: None,
        waiting_served_ratio: 1.2,
        max_waiting_tokens: 20,
    };

    fn lengths(flags: &BatchingConfig) -> Vec<u32> {
        let request = warmup_request(flags);
        request.batch.unwrap().requests.iter().map(|request| request.truncate).collect()
    }

    #[test]
    fn requests_fill_the_prefill_budget() {
        assert_eq!(lengths(&FLAGS), [40, 40, 20]);
        assert_eq!(lengths(&BatchingConfig { max_batch_size: Some(2), ..FLAGS }), [40, 40]);
        assert_eq!(lengths(&BatchingConfig { max_input_tokens: None, ..FLAGS }), [100]);
        let request = warmup_request(&FLAGS);
        let last = &request.batch.as_ref().unwrap().requests[2];
        assert_eq!(last.stopping_parameters.as_ref().unwrap().max_new_tokens, 40);
        assert_eq!((last.input_ids.len(), last.inputs.len()), (20, 120));
        assert_eq!((request.max_input_tokens, request.max_total_tokens), (Some(40), Some(60)));
    }
}
