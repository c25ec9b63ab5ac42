//! Messages of the shard protocol: decoded, converted to the engine's types, and written again.

use prost::Message;
use proto::v3;

use crate::message::check_line;

/// Reads the bytes as each message that a shard receives.
pub fn run(input: &[u8]) {
    if let Some(request) = decode::<v3::PrefillRequest>(input) {
        convert(request.batch.unwrap_or_default());
    }
    if let Some(request) = decode::<v3::WarmupRequest>(input) {
        let _ = shard::server::warmup_request(request).inspect_err(|error| check_line(error));
    }
    if let Some(batch) = decode::<v3::Batch>(input) {
        convert(batch);
    }
    decode::<v3::DecodeRequest>(input);
    decode::<v3::FilterBatchRequest>(input);
    decode::<v3::ClearCacheRequest>(input);
    // What a router and a launcher receive.
    decode::<v3::PrefillResponse>(input);
    decode::<v3::DecodeResponse>(input);
    decode::<v3::InfoResponse>(input);
    decode::<v3::WarmupResponse>(input);
}

fn convert(batch: v3::Batch) {
    let num_requests = batch.requests.len();
    match shard::server::new_batch(batch) {
        Ok(batch) => assert_eq!(batch.requests.len(), num_requests),
        Err(error) => check_line(&error),
    }
}

/// The message, if it is one. Written and read again it must be the same.
fn decode<M: Message + Default>(input: &[u8]) -> Option<M> {
    let message = M::decode(input).ok()?;
    let bytes = message.encode_to_vec();
    let again = M::decode(bytes.as_slice()).expect("what was written can be read");
    assert_eq!(again.encode_to_vec(), bytes);
    Some(message)
}
