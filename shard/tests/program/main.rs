//! The real program with a made-up model: serving, several ranks, and every way to end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_gguf;
mod bad_models;
mod calls;
mod process;
mod threads;
mod tiny_model;

#[path = "../../src/engine/testing/byte_tokenizer.rs"]
mod byte_tokenizer;

use std::os::fd::AsRawFd;
use std::time::Duration;

use calls::{batch, request, serve_batch, warmup};
use process::{Place, Shard, exists, program, run};
use proto::v3::Generation;
use proto::{CallId, ShardClient, ShardedClient};

fn token(generation: &Generation) -> (u64, u32, f32) {
    let tokens = generation.tokens.as_ref().unwrap();
    (generation.request_id, tokens.ids[0], tokens.logprobs[0])
}

/// The ranks of a group serve the same batch; what they say together.
async fn answers(world_size: usize) -> Vec<Vec<(u64, u32, f32)>> {
    let place = Place::new();
    let shards: Vec<Shard> = (0..world_size).map(|rank| place.rank(rank, world_size)).collect();
    let mut clients = Vec::new();
    for shard in &shards {
        clients.push(shard.client().await);
    }
    let requests = vec![request(1, "once upon a time", 12), request(2, "x", 8), request(3, "the quick", 12)];
    let steps = serve_batch(&mut clients, &batch(1, requests)).await;
    let discovered = clients[0].service_discovery().await.unwrap();
    assert_eq!(discovered.len(), world_size);
    for (rank, path) in discovered.iter().enumerate() {
        assert_eq!(*path, place.socket(rank).to_str().unwrap());
    }
    steps.iter().map(|step| step.iter().map(token).collect()).collect()
}

#[tokio::test]
async fn two_ranks_say_what_one_says() {
    let (alone, together) = (answers(1).await, answers(2).await);
    assert_eq!(alone.len(), 12);
    assert_eq!(alone.len(), together.len());
    for (alone, together) in alone.iter().flatten().zip(together.iter().flatten()) {
        assert_eq!((alone.0, alone.1), (together.0, together.1));
        assert!((alone.2 - together.2).abs() < 1e-3, "{alone:?} {together:?}");
    }
}

#[tokio::test]
async fn a_prompt_in_chunks_gets_the_tokens_of_one_in_a_piece() {
    let place = Place::new();
    let shard = place.rank(0, 1);
    let mut clients = [shard.client().await];
    let mut text = request(1, "it was the best of times, it was the worst of times", 6);
    let whole = serve_batch(&mut clients, &batch(1, vec![text.clone()])).await;
    text.chunk_len = Some(7);
    let chunked = serve_batch(&mut clients, &batch(2, vec![text])).await;
    assert!(chunked[0].is_empty(), "the prompt is not done");
    let ids = |steps: &[Vec<Generation>]| steps.iter().flatten().map(|g| token(g).1).collect::<Vec<_>>();
    assert_eq!(ids(&whole), ids(&chunked));
}

#[tokio::test]
async fn tells_where_its_start_and_its_memory_went() {
    let place = Place::new();
    let mut command = place.command();
    command.args(["--instance-id", "abc"]);
    let shard = Shard::start(command, place.socket(0));
    let mut client = shard.client().await;
    assert_eq!(client.handshake().await.unwrap().instance_id, "abc");
    assert_eq!(client.info().await.unwrap().dtype, "torch.float32");
    client.warmup(warmup()).await.unwrap();
    let status = client.status().await.unwrap();
    assert!(status.startup.iter().any(|phase| phase.name == "weights" && phase.nanos > 0));
    assert!(status.memory.iter().any(|entry| entry.name == "kv_cache" && entry.bytes > 0));
}

#[tokio::test]
async fn signals_end_it_without_a_trace() {
    for signal in ["TERM", "INT"] {
        let place = Place::new();
        let shard = place.rank(0, 1);
        let _client = shard.client().await;
        shard.signal(signal);
        let (code, stdout, stderr) = shard.wait();
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        assert!(stdout.contains(&format!("SIG{signal} received")), "{stdout}");
        assert!(!exists(&place.socket(0)));
    }
}

#[tokio::test]
async fn the_end_of_the_lifeline_ends_it() {
    let place = Place::new();
    let (read, write) = std::io::pipe().unwrap();
    // Only the read end is for the child; the write end stays closed there by itself.
    let inherited = nix::unistd::dup(&read).unwrap();
    let mut command = place.command();
    command.env("QUARTET_LIFELINE_FD", inherited.as_raw_fd().to_string());
    let shard = Shard::start(command, place.socket(0));
    let _client = shard.client().await;
    drop(write);
    assert_eq!(shard.wait().0, Some(15));
    assert!(!exists(&place.socket(0)));
}

#[tokio::test]
async fn a_second_one_leaves_the_first_alone() {
    let place = Place::new();
    let first = place.rank(0, 1);
    let mut client = first.client().await;
    let (code, stderr) = run(place.command());
    assert_eq!(code, Some(12));
    assert!(stderr.contains("another process listens there"), "{stderr}");
    client.health().await.unwrap();
}

#[tokio::test]
async fn a_lost_rank_ends_the_other_with_its_own_code() {
    let place = Place::new();
    let (first, second) = (place.rank(0, 2), place.rank(1, 2));
    let mut client = first.client().await;
    let mut other = second.client().await;
    let (left, right) = tokio::join!(client.warmup(warmup()), other.warmup(warmup()));
    left.unwrap();
    right.unwrap();
    second.signal("KILL");
    let error = client.prefill(batch(1, vec![request(1, "hello", 4)]), None).await.unwrap_err().to_string();
    assert!(error.contains("rank 1 lost"), "{error}");
    assert_eq!(first.wait().0, Some(14));
}

/// Two ranks, and what they say of a batch as long as they are in step.
struct Pair {
    shards: [Shard; 2],
    clients: [ShardClient; 2],
    undisturbed: Vec<(u64, u32, f32)>,
    place: Place,
}

impl Pair {
    async fn new() -> Self {
        let place = Place::new();
        let shards = [place.rank(0, 2), place.rank(1, 2)];
        let clients = [shards[0].client().await, shards[1].client().await];
        let mut pair = Self { shards, clients, undisturbed: Vec::new(), place };
        pair.undisturbed = pair.tokens().await;
        pair
    }

    async fn tokens(&mut self) -> Vec<(u64, u32, f32)> {
        let steps = serve_batch(&mut self.clients, &batch(1, vec![request(1, "hello", 4)])).await;
        steps.iter().flatten().map(token).collect()
    }

    /// Were the ranks apart, this would never be answered.
    async fn check(&mut self) {
        let mut next = ShardedClient::connect(self.place.socket(0)).await.unwrap();
        next.clear_cache(None).await.unwrap();
        let undisturbed = self.undisturbed.clone();
        assert_eq!(self.tokens().await, undisturbed);
    }
}

#[tokio::test]
async fn a_caller_that_dies_between_two_ranks_leaves_both_in_step() {
    let mut pair = Pair::new().await;
    for (number, reached) in [(1, 0), (2, 1)] {
        let mut watch = pair.shards[reached].client().await;
        let before = watch.status().await.unwrap().steps_started;
        // A connection of its own, which ends with it.
        let mut half = pair.shards[reached].client().await.as_call(CallId { client: 7, number });
        let lost = batch(2, vec![request(2, "lost", 4)]);
        let call = tokio::spawn(async move { half.prefill(lost, None).await });
        while watch.status().await.unwrap().steps_started == before {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        call.abort();
        pair.check().await;
    }
}

#[tokio::test]
async fn a_caller_that_dies_after_the_answer_of_one_rank_leaves_both_in_step() {
    let mut pair = Pair::new().await;
    for (number, reached) in [(2, 0), (4, 1)] {
        let call = |number| CallId { client: 7, number };
        let callers = [pair.shards[0].client().await, pair.shards[1].client().await];
        let lost = || batch(2, vec![request(2, "lost", 9)]);
        let mut both = callers.each_ref().map(|caller| caller.as_call(call(number - 1)));
        let [first, second] = &mut both;
        let (first, second) = tokio::join!(first.prefill(lost(), None), second.prefill(lost(), None));
        let next = first.unwrap().batch.unwrap();
        second.unwrap();
        // The answer was computed ahead, and the step after it needs the other rank.
        callers[reached].as_call(call(number)).decode(vec![next]).await.unwrap();
        drop((callers, both));
        pair.check().await;
    }
}

#[test]
fn wrong_starts_have_codes_and_reasons() {
    let place = Place::new();
    let mut usage = place.command();
    usage.args(["--quantize", "gptq", "--device", "tpu"]);
    let (code, stderr) = run(usage);
    assert_eq!((code, stderr.lines().count()), (Some(2), 2), "{stderr}");

    let mut unknown = program();
    unknown.args(["serve", "/nowhere/model", "--uds-path"]).arg(place.dir.path().join("s"));
    assert_eq!(run(unknown).0, Some(10));

    let mut long = program();
    long.arg("serve").arg(place.model()).arg("--uds-path").arg(place.dir.path().join("x".repeat(120)));
    let (code, stderr) = run(long);
    assert_eq!(code, Some(12));
    assert!(stderr.contains("expected at most 107"), "{stderr}");

    let mut local = program();
    local.arg("download-weights").arg(place.model()).args(["--extension", ".safetensors", "--merge-lora"]);
    assert_eq!(run(local).0, Some(0));
}
