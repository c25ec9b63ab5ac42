//! Both services over a real socket, with the engine's test model.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use proto::ShardClient;
use proto::v3::{
    Batch, CachedBatch, GrammarType, Image, Input, InputChunk, NextTokenChooserParameters, Request,
    StoppingCriteriaParameters, WarmupRequest, input_chunk::Chunk,
};

use super::*;
use crate::engine::testing::{Harness, Script, options};

/// A shard in a thread of this process.
struct TestShard {
    path: PathBuf,
    ended: Receiver<Result<(), ShardError>>,
    _dir: tempfile::TempDir,
}

impl TestShard {
    fn start(script: impl FnOnce(&mut Script)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s-0");
        let socket = BoundSocket::bind(&path).unwrap();
        let harness = Harness::cold(options(), 64);
        script(&mut harness.script.lock().unwrap());
        let identity = Identity {
            instance_id: "me".to_string(),
            rank: 0,
            sockets: vec![path.clone()],
            model_id: "test/model".to_string(),
            startup: vec![("weights".to_string(), Duration::from_millis(3))],
        };
        let (sender, ended) = channel();
        std::thread::spawn(move || {
            let _ = sender.send(run(socket, harness.engine, identity));
        });
        Self { path, ended, _dir: dir }
    }

    async fn client(&self) -> ShardClient {
        ShardClient::connect(&self.path).await.unwrap()
    }
}

fn parameters() -> NextTokenChooserParameters {
    NextTokenChooserParameters {
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..NextTokenChooserParameters::default()
    }
}

fn request(id: u64) -> Request {
    Request {
        id,
        inputs: "hello".to_string(),
        truncate: 100,
        parameters: Some(parameters()),
        stopping_parameters: Some(StoppingCriteriaParameters {
            max_new_tokens: 3,
            ignore_eos_token: true,
            ..StoppingCriteriaParameters::default()
        }),
        ..Request::default()
    }
}

fn batch(id: u64, requests: Vec<Request>) -> Batch {
    Batch { id, size: requests.len() as u32, requests, ..Batch::default() }
}

/// What upstream's router sends: everything switched on, and an image.
fn warmup() -> WarmupRequest {
    let mut request = request(0);
    request.inputs = "_test ".repeat(1000);
    request.input_chunks = Some(Input {
        chunks: vec![
            InputChunk { chunk: Some(Chunk::Text(request.inputs.clone())) },
            InputChunk { chunk: Some(Chunk::Image(Image::default())) },
        ],
    });
    request.prefill_logprobs = true;
    request.top_n_tokens = 20;
    request.parameters = Some(NextTokenChooserParameters {
        temperature: 0.9,
        top_k: 10,
        top_p: 0.9,
        typical_p: 0.9,
        repetition_penalty: 1.2,
        frequency_penalty: 0.1,
        watermark: true,
        ..parameters()
    });
    WarmupRequest {
        batch: Some(batch(0, vec![request])),
        max_prefill_tokens: 1000,
        max_input_tokens: None,
        max_total_tokens: Some(512),
    }
}

fn cached(id: u64) -> CachedBatch {
    CachedBatch { id, ..CachedBatch::default() }
}

#[tokio::test]
async fn answers_what_upstreams_router_asks() {
    let shard = TestShard::start(|_| ());
    let mut client = shard.client().await;
    let info = client.info().await.unwrap();
    assert_eq!((info.dtype.as_str(), info.device_type.as_str()), ("torch.float32", "cpu"));
    assert!(!info.requires_padding && info.support_chunking && info.block_size == 16);
    assert_eq!(client.service_discovery().await.unwrap(), [shard.path.to_str().unwrap()]);
    client.health().await.unwrap();
    assert_eq!(client.status().await.unwrap().blocks_total, 0, "not warmed up");
    let limits = client.warmup(warmup()).await.unwrap();
    assert_eq!(limits.max_supported_total_tokens, Some(1024));
    assert_eq!((limits.max_total_tokens, limits.max_input_tokens), (512, 511));

    let answer = client.prefill(batch(5, vec![request(8), request(9)]), None).await.unwrap();
    let next = answer.batch.unwrap();
    assert_eq!((next.id, next.size, next.request_ids.clone()), (5, 2, vec![8, 9]));
    assert_eq!(answer.generations.len(), 2);
    assert!(answer.total_ns >= answer.forward_ns && answer.concat_ns.is_none());
    assert_eq!(client.filter_batch(5, vec![9]).await.unwrap().unwrap().size, 1);
    client.decode(vec![next.clone()]).await.unwrap();
    let last = client.decode(vec![next]).await.unwrap();
    assert!(last.batch.is_none());
    let text = last.generations[0].generated_text.as_ref().unwrap();
    assert_eq!((last.generations[0].request_id, text.generated_tokens, text.seed), (9, 3, None));
    client.clear_cache(None).await.unwrap();
}

#[tokio::test]
async fn tells_who_it_is_and_that_it_moves() {
    let shard = TestShard::start(|_| ());
    let mut client = shard.client().await;
    let handshake = client.handshake().await.unwrap();
    assert_eq!((handshake.instance_id.as_str(), handshake.rank, handshake.world_size), ("me", 0, 1));
    assert_eq!((handshake.pid, handshake.model_id.as_str()), (std::process::id(), "test/model"));
    client.warmup(warmup()).await.unwrap();
    client.prefill(batch(1, vec![request(1)]), None).await.unwrap();
    client.clear_cache(Some(1)).await.unwrap();
    let status = client.status().await.unwrap();
    assert_eq!((status.steps_started, status.steps_finished), (4, 4), "two to warm up, a prefill, one ahead");
    assert_eq!((status.blocks_total, status.blocks_used), (64, 0));
    assert_eq!((status.startup[0].name.as_str(), status.startup[0].nanos), ("weights", 3_000_000));
    let memory: Vec<&str> = status.memory.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(memory, ["weights", "kv_cache"]);
}

#[tokio::test]
async fn bad_requests_fail_alone_and_say_why() {
    let shard = TestShard::start(|_| ());
    let mut client = shard.client().await;
    client.warmup(warmup()).await.unwrap();
    client.prefill(batch(1, vec![request(1)]), None).await.unwrap();
    let with = |change: &dyn Fn(&mut Request, &mut NextTokenChooserParameters)| {
        let (mut request, mut parameters) = (request(3), parameters());
        change(&mut request, &mut parameters);
        request.parameters = Some(parameters);
        request
    };
    for (request, problem) in [
        (with(&|_, p| p.grammar_type = GrammarType::Json as i32), "grammars are not supported"),
        (with(&|_, p| p.watermark = true), "watermarks are not supported"),
        (with(&|r, _| r.adapter_id = Some("a".to_string())), "adapter \"a\" is asked for"),
        (with(&|_, p| p.temperature = 0.0), "temperature is 0, expected more than 0"),
        (with(&|_, p| p.top_p = 1.5), "top_p is 1.5, expected more than 0 and at most 1"),
        (with(&|_, p| p.repetition_penalty = f32::NAN), "repetition_penalty is NaN"),
        (with(&|r, _| r.stopping_parameters = None), "stopping_parameters are missing"),
        (with(&|r, _| r.inputs = String::new()), "the prompt has no tokens"),
    ] {
        let error = client.prefill(batch(2, vec![request]), None).await.unwrap_err().to_string();
        assert!(error.contains("request 3: ") && error.contains(problem), "{error}");
    }
    assert!(client.decode(Vec::new()).await.unwrap_err().to_string().contains("no batches"));
    client.decode(vec![cached(1)]).await.unwrap();
}

#[tokio::test]
async fn a_failing_model_is_reported_and_ends_the_shard() {
    // The short passes of the warm-up are number 0 and 1.
    let shard = TestShard::start(|script| script.fail_at = Some(2));
    let mut client = shard.client().await;
    client.warmup(warmup()).await.unwrap();
    let error = client.prefill(batch(1, vec![request(1)]), None).await.unwrap_err();
    assert_eq!(error.to_string(), "Server error: forward: the device has gone");
    assert!(error.is_lost());
    let ended = shard.ended.recv_timeout(Duration::from_secs(5)).unwrap().unwrap_err();
    assert_eq!(ended.exit_code(), process::ExitCode::EngineFailed);
    assert!(!shard.path.exists());
}

#[tokio::test]
async fn a_panic_is_reported_and_ends_the_shard() {
    let shard = TestShard::start(|script| script.panic_at = Some(2));
    let mut client = shard.client().await;
    client.warmup(warmup()).await.unwrap();
    let error = client.prefill(batch(1, vec![request(1)]), None).await.unwrap_err();
    assert_eq!(error.to_string(), "Server error: the engine of this shard has ended");
    assert!(error.is_lost());
    let ended = shard.ended.recv_timeout(Duration::from_secs(5)).unwrap().unwrap_err();
    assert_eq!(ended.to_string(), "the engine panicked: scripted panic");
}

#[tokio::test]
async fn reflection_lists_both_services() {
    use tonic_reflection::pb::v1alpha::ServerReflectionRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;

    let shard = TestShard::start(|_| {});
    let channel = tonic::transport::Endpoint::try_from(format!("unix:{}", shard.path.display())).unwrap();
    let mut client = ServerReflectionClient::new(channel.connect().await.unwrap());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"generate.v3.TextGenerationService"), "{names:?}");
    assert!(names.contains(&"quartet.v1.ShardControl"), "{names:?}");
}
