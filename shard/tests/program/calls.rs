//! What a router sends.

use proto::ShardClient;
use proto::v3::{
    Batch, Generation, NextTokenChooserParameters, Request, StoppingCriteriaParameters, WarmupRequest,
};

pub(crate) fn request(id: u64, text: &str, max_new_tokens: u32) -> Request {
    Request {
        id,
        inputs: text.to_string(),
        truncate: 400,
        parameters: Some(NextTokenChooserParameters {
            temperature: 1.0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            ..Default::default()
        }),
        stopping_parameters: Some(StoppingCriteriaParameters {
            max_new_tokens,
            ignore_eos_token: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(crate) fn batch(id: u64, requests: Vec<Request>) -> Batch {
    Batch { id, size: requests.len() as u32, requests, ..Default::default() }
}

pub(crate) fn warmup() -> WarmupRequest {
    WarmupRequest {
        batch: Some(batch(0, vec![request(0, "_test _test _test ", 1)])),
        max_prefill_tokens: 256,
        max_input_tokens: Some(128),
        max_total_tokens: Some(256),
    }
}

/// Warms all ranks up and serves one batch to its end; answers the generations of each step, in request order.
pub(crate) async fn serve_batch(clients: &mut [ShardClient], batch: &Batch) -> Vec<Vec<Generation>> {
    let warmups = clients.iter_mut().map(|client| client.warmup(warmup()));
    futures_join(warmups).await;
    let mut answers: Vec<_> =
        futures_join(clients.iter_mut().map(|client| client.prefill(batch.clone(), None)))
            .await
            .into_iter()
            .map(|answer| (answer.generations, answer.batch))
            .collect();
    let mut steps = Vec::new();
    loop {
        let next = answers[0].1.clone();
        let mut step: Vec<Generation> =
            answers.into_iter().flat_map(|(generations, _)| generations).collect();
        step.sort_by_key(|generation| generation.request_id);
        steps.push(step);
        let Some(next) = next else { return steps };
        answers = futures_join(clients.iter_mut().map(|client| client.decode(vec![next.clone()])))
            .await
            .into_iter()
            .map(|answer| (answer.generations, answer.batch))
            .collect();
    }
}

/// Sends the calls to all ranks at once: in their collectives they wait for one another.
async fn futures_join<T, E: std::fmt::Debug>(
    calls: impl Iterator<Item = impl Future<Output = Result<T, E>>>,
) -> Vec<T> {
    futures::future::join_all(calls).await.into_iter().map(Result::unwrap).collect()
}
