//! The engine against a model that can be computed by hand.

use backend::sampling::SamplingParams;

use super::testing::*;
use super::*;

mod caller;
#[cfg(feature = "cuda")]
mod devices;
mod resume;
mod schedules;

fn ids(reply: &StepReply) -> Vec<(u64, u32)> {
    reply.generations.iter().map(|generation| (generation.request_id, generation.tokens.ids[0])).collect()
}

/// What a greedy request gets, one token after another.
fn expected_ids(request: &NewRequest, count: usize) -> Vec<u32> {
    let Prompt::Ids(mut history) = request.prompt.clone() else { panic!("tests give ids") };
    let prompt_len = history.len();
    for _ in 0..count {
        history.push(next_token(&history, &request.sampling).id);
    }
    history.split_off(prompt_len)
}

#[test]
fn prefill_and_decode_give_the_models_tokens() {
    let mut harness = Harness::new(options(), 32);
    let requests = vec![request(4, 5), request(9, 20)];
    let (first, second) = (expected_ids(&requests[0], 4), expected_ids(&requests[1], 4));
    let mut step = harness.prefill(7, requests, None).unwrap();
    for (position, (first, second)) in first.into_iter().zip(second).enumerate() {
        assert_eq!(ids(&step), [(4, first), (9, second)]);
        let is_last = position == 3;
        assert_eq!(step.batch.is_none(), is_last);
        assert_eq!(step.generations[0].generated_text.is_some(), is_last);
        if let Some(batch) = &step.batch {
            assert_eq!((batch.id, batch.request_ids.clone()), (7, vec![4, 9]));
            assert_eq!((batch.max_tokens, batch.current_tokens), (16 + 32, 2));
            step = harness.decode(&[7]).unwrap();
        }
    }
    assert_eq!(harness.blocks_used(), 0);
    assert_eq!(harness.decode(&[7]).unwrap_err(), "batch 7 is not cached");
}

#[test]
fn the_next_step_is_there_before_it_is_asked_for() {
    let mut harness = Harness::new(options(), 32);
    harness.passes();
    harness.prefill(1, vec![request(1, 5)], None).unwrap();
    assert_eq!(harness.passes(), [vec![5], vec![1]], "the prompt, then one step ahead");
    harness.decode(&[1]).unwrap();
    assert_eq!(harness.passes(), [vec![1]]);
    harness.decode(&[1]).unwrap();
    assert_eq!(harness.passes(), [vec![1]], "the last of four tokens");
    assert!(harness.decode(&[1]).unwrap().batch.is_none());
    assert!(harness.passes().is_empty(), "nothing is left to compute");
}

#[test]
fn a_joined_batch_computes_only_what_is_not_there_yet() {
    let mut harness = Harness::new(options(), 32);
    harness.prefill(1, vec![request(1, 5), request(2, 3)], None).unwrap();
    harness.passes();
    let step = harness.prefill(2, vec![request(3, 6)], Some(1)).unwrap();
    assert_eq!(harness.passes(), [vec![6], vec![1, 1, 1]]);
    let batch = step.batch.clone().unwrap();
    assert_eq!((batch.id, batch.request_ids), (1, vec![1, 2, 3]));
    assert_eq!(ids(&step).len(), 3);
    assert!(step.timings.concat.is_some());
}

#[test]
fn separate_prefills_are_joined_by_decode_under_the_first_id() {
    let mut harness = Harness::new(options(), 32);
    harness.prefill(5, vec![request(1, 5)], None).unwrap();
    harness.prefill(6, vec![request(2, 6)], None).unwrap();
    let step = harness.decode(&[6, 5]).unwrap();
    assert_eq!(step.batch.as_ref().unwrap().id, 6);
    assert_eq!(step.batch.unwrap().request_ids, [2, 1]);
    assert!(step.timings.concat.is_some() && step.timings.total >= step.timings.forward);
    assert!(harness.decode(&[5]).is_err());
}

#[test]
fn failed_calls_lose_the_batches_they_named_and_nothing_else() {
    let mut harness = Harness::new(options(), 32);
    harness.prefill(1, vec![request(1, 5)], None).unwrap();
    harness.prefill(2, vec![request(2, 5)], None).unwrap();
    assert_eq!(harness.decode(&[1, 99]).unwrap_err(), "batch 99 is not cached");
    assert_eq!(harness.decode(&[1]).unwrap_err(), "batch 1 is not cached");
    assert_eq!(
        harness.prefill(3, Vec::new(), Some(2)).unwrap_err(),
        "batch 3 has no requests, expected at least one"
    );
    assert!(harness.decode(&[2]).is_err());
    assert!(harness.decode(&[]).unwrap_err().contains("expected at least one"));
    assert_eq!(harness.blocks_used(), 0);
    harness.prefill(4, vec![request(4, 5)], None).unwrap();
}

#[test]
fn filtering_keeps_order_and_results_that_ran_ahead() {
    let mut harness = Harness::new(options(), 32);
    let requests: Vec<_> = (1..=3).map(|id| request(id, 5)).collect();
    let expected: Vec<_> = requests.iter().map(|request| expected_ids(request, 2)[1]).collect();
    harness.prefill(1, requests, None).unwrap();
    harness.passes();
    let kept = harness.filter(1, &[3, 1]).unwrap();
    assert_eq!((kept.request_ids, kept.max_tokens), (vec![3, 1], 32));
    assert_eq!(ids(&harness.decode(&[1]).unwrap()), [(3, expected[2]), (1, expected[0])]);
    assert_eq!(harness.passes(), [vec![1, 1]], "only the step after");
    assert_eq!(harness.filter(1, &[1, 3]).unwrap().request_ids, [3, 1], "as many as before: unchanged");
    for (wrong, problem) in [
        (vec![], "batch 1 would keep no request, expected at least one"),
        (vec![8], "request 8 is not in batch 1"),
        (vec![1, 1], "request 1 of batch 1 is listed twice"),
    ] {
        assert_eq!(harness.filter(1, &wrong).unwrap_err(), problem);
    }
    assert_eq!(harness.filter(2, &[1]).unwrap_err(), "batch 2 is not cached");
    assert_eq!(harness.blocks_used(), 2);
    harness.clear(Some(1));
    assert_eq!(harness.blocks_used(), 0);
}

#[test]
fn prompts_in_chunks_say_nothing_until_they_are_done() {
    let mut harness = Harness::new(options(), 32);
    harness.passes();
    let mut chunked = request(1, 100);
    chunked.chunk_len = Some(10);
    chunked.prefill_logprobs = true;
    let expected = expected_ids(&chunked, 1);
    let Prompt::Ids(prompt) = chunked.prompt.clone() else { unreachable!() };
    let step = harness.prefill(1, vec![chunked], None).unwrap();
    assert!(step.generations.is_empty());
    assert_eq!(step.batch.unwrap().current_tokens, 48, "the prefill budget of the warm-up");
    let step = harness.prefill(2, vec![request(2, 3)], Some(1)).unwrap();
    assert_eq!(step.generations.len(), 1, "the new request only");
    assert_eq!(step.batch.unwrap().current_tokens, 42 + 1);
    let step = harness.decode(&[1]).unwrap();
    assert_eq!(ids(&step)[0], (1, expected[0]));
    assert_eq!(harness.passes(), [vec![10], vec![48], vec![3], vec![42, 1], vec![1, 1]]);
    let prompt_tokens = step.generations[0].prompt_tokens.as_ref().unwrap();
    assert_eq!(prompt_tokens.ids, prompt);
    assert!(prompt_tokens.logprobs[0].is_nan() && prompt_tokens.is_special.is_empty());
    for index in 1..100 {
        assert_eq!(prompt_tokens.logprobs[index], target_logprob(&prompt[..index], prompt[index]));
    }
}

#[test]
fn long_prompts_take_several_passes() {
    let mut harness = Harness::new(EngineOptions { run_ahead: false, ..options() }, 32);
    harness.passes();
    let requests = vec![request(1, 100), request(2, 40)];
    let expected: Vec<_> = requests.iter().map(|request| expected_ids(request, 1)[0]).collect();
    let step = harness.prefill(1, requests, None).unwrap();
    assert_eq!(ids(&step), [(1, expected[0]), (2, expected[1])]);
    assert_eq!(harness.passes(), [vec![64], vec![36, 28], vec![12]]);
}

#[test]
fn every_request_is_reported_by_one_rank() {
    let mut reported = Vec::new();
    for rank in 0..3 {
        let mut harness = Harness::new(EngineOptions { rank, world_size: 3, ..options() }, 64);
        let requests: Vec<_> = (0..6).map(|id| request(id, 4)).collect();
        let step = harness.prefill(1, requests, None).unwrap();
        assert_eq!(step.batch.as_ref().unwrap().request_ids.len(), 6);
        assert!(step.generations.iter().all(|generation| generation.request_id % 3 == rank as u64));
        reported.extend(ids(&step).iter().map(|(id, _)| *id));
    }
    assert_eq!(reported, [0, 3, 1, 4, 2, 5]);
}

#[test]
fn the_last_step_carries_text_reason_and_the_seed_of_sampled_requests() {
    let mut harness = Harness::new(options(), 32);
    let mut sampled = request(2, 5);
    sampled.sampling = SamplingParams { do_sample: true, seed: 77, ..greedy() };
    sampled.top_n = 2;
    let mut one = request(1, 5);
    one.stopping.max_new_tokens = 1;
    sampled.stopping.max_new_tokens = 1;
    let step = harness.prefill(1, vec![one, sampled], None).unwrap();
    assert!(step.batch.is_none());
    let [first, second] = &step.generations[..] else { panic!("two generations") };
    let text = first.generated_text.as_ref().unwrap();
    assert_eq!((text.finish_reason, text.generated_tokens, text.seed), (FinishReason::Length, 1, None));
    assert_eq!(text.text, first.tokens.texts[0]);
    assert!(first.top_tokens.is_empty() && first.prompt_tokens.is_none());
    assert_eq!(second.generated_text.as_ref().unwrap().seed, Some(77));
    assert_eq!(second.top_tokens[0].ids, [b'a' as u32, b'b' as u32]);
    assert_eq!(second.top_tokens[0].texts, ["a", "b"]);
}

#[test]
fn bad_requests_are_named() {
    let fixture = Fixture::new();
    let problem = |change: &dyn Fn(&mut NewRequest)| {
        let mut request = request(3, 20);
        change(&mut request);
        fixture.try_sequence(request).unwrap_err()
    };
    let starts = |text: String, start: &str| assert!(text.starts_with(start), "{text}");
    starts(problem(&|r| r.prompt = Prompt::Ids(Vec::new())), "request 3: the prompt has no tokens");
    starts(
        problem(&|r| r.prompt = Prompt::Ids(vec![300])),
        "request 3: the prompt has token id 300, expected ids below",
    );
    starts(problem(&|r| r.chunk_len = Some(0)), "request 3: chunk_len is 0");
    starts(problem(&|r| r.cache_len = 3), "request 3: cache_len is 3 but no blocks are given");
    starts(
        problem(&|r| (r.cache_len, r.blocks) = (20, vec![1, 2])),
        "request 3: cache_len is 20, expected less",
    );
    starts(problem(&|r| r.blocks = vec![1]), "request 3: 16 slots in 1 blocks for a prompt of 20 tokens");
    starts(problem(&|r| r.blocks = vec![1, 99]), "request 3: block 99 is not one of the cache's 16 blocks");
    starts(
        problem(&|r| (r.blocks, r.slots) = (vec![1, 2], (15..40).collect())),
        "request 3: slot 0 is 15, expected 16",
    );
    starts(
        problem(&|r| r.stopping.max_new_tokens = 5000),
        "request 3: 20 prompt tokens and 5000 new ones make 5020",
    );
    starts(problem(&|r| r.stopping.max_new_tokens = 300), "request 3: needs 20 KV blocks, 15 are free");
}

#[test]
fn truncation_keeps_the_end_of_the_prompt() {
    let fixture = Fixture::new();
    let mut text = request(1, 1);
    text.prompt = Prompt::Text { text: "hello world".to_string(), add_special_tokens: true };
    text.truncate = 5;
    assert_eq!(fixture.sequence(text).ids, "world".bytes().map(u32::from).collect::<Vec<_>>());
    let mut given = request(1, 1);
    given.prompt = Prompt::Ids(vec![1, 2, 3]);
    given.truncate = 2;
    assert_eq!(fixture.sequence(given).ids, [2, 3]);
}

#[test]
fn a_full_cache_is_reported_when_the_token_is_asked_for() {
    let mut harness = Harness::new(options(), 32);
    let mut tight = request(1, 15);
    (tight.blocks, tight.slots) = (vec![3], (48..64).collect());
    harness.passes();
    harness.prefill(1, vec![tight], None).unwrap();
    harness.decode(&[1]).unwrap();
    assert_eq!(harness.passes(), [vec![15], vec![1]], "no room to run ahead any more");
    assert_eq!(
        harness.decode(&[1]).unwrap_err(),
        "request 1 has 16 slots in the KV cache, its next step needs 17"
    );
    assert_eq!(harness.blocks_used(), 0);
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut harness = Harness::new(options(), 32);
    let mut first = request(1, 20);
    (first.blocks, first.stopping.max_new_tokens) = (vec![3, 4], 1);
    harness.prefill(1, vec![first.clone()], None).unwrap();
    harness.passes();
    let mut second = first.clone();
    (second.id, second.blocks, second.cache_len) = (2, vec![3, 9], 16);
    let step = harness.prefill(2, vec![second], None).unwrap();
    assert_eq!(harness.passes(), [vec![4]]);
    assert_eq!(ids(&step), [(2, expected_ids(&first, 1)[0])]);
}

#[test]
fn the_liveness_probe_lives_in_the_reserved_block() {
    let mut harness = Harness::new(options(), 2);
    let mut probe = request(u64::MAX, 1);
    probe.prompt = Prompt::Text { text: "liveness".to_string(), add_special_tokens: false };
    (probe.truncate, probe.blocks, probe.slots, probe.stopping.max_new_tokens) = (1, vec![0], vec![0], 1);
    assert!(harness.prefill(u64::MAX, vec![probe], None).unwrap().batch.is_none());
}

#[test]
fn the_first_call_must_be_a_warmup() {
    let mut harness = Harness::cold(options(), 8);
    assert!(harness.prefill(1, vec![request(1, 3)], None).unwrap_err().contains("expected a Warmup call"));
    let batch = NewBatch { id: 0, requests: vec![request(0, 4000); 3] };
    let request = WarmupRequest { batch, max_prefill_tokens: 4096, ..WarmupRequest::default() };
    let limits = harness.call(|reply| Command::Warmup { request: request.clone(), reply }).unwrap();
    assert_eq!(
        (limits.max_supported_total_tokens, limits.max_total_tokens, limits.max_input_tokens),
        (128, 112, 111)
    );
    assert_eq!(harness.passes(), [vec![8, 8], vec![1, 1]]);
    assert_eq!(harness.blocks_used(), 0);
    assert_eq!(harness.engine.liveness().blocks(), (8, 0));
    let again = harness.call(|reply| Command::Warmup { request, reply }).unwrap();
    assert_eq!(again, limits, "what the first cache took counts as free");
}

#[test]
fn a_failing_model_is_the_end() {
    let mut harness = Harness::new(EngineOptions { run_ahead: false, ..options() }, 32);
    harness.passes();
    harness.script.lock().unwrap().fail_at = Some(0);
    let batch = NewBatch { id: 1, requests: vec![request(1, 3)] };
    let (answer, outcome) = harness.try_call(|reply| Command::Prefill {
        batch,
        cached_batch: None,
        received: Instant::now(),
        reply,
    });
    assert_eq!(answer.unwrap_err(), "forward: the device has gone");
    assert!(outcome.is_err() && harness.engine.liveness().has_failed());
}

#[test]
fn a_step_that_fails_ahead_is_told_to_the_next_call() {
    let mut harness = Harness::new(options(), 32);
    harness.passes();
    harness.script.lock().unwrap().fail_at = Some(1);
    let step = harness.prefill(1, vec![request(1, 3)], None).unwrap();
    assert_eq!(step.generations.len(), 1);
    assert!(harness.engine.has_failed());
    let (answer, outcome) =
        harness.try_call(|reply| Command::Decode { batch_ids: vec![1], received: Instant::now(), reply });
    assert_eq!(answer.unwrap_err(), "forward: the device has gone");
    assert!(outcome.is_err());
}

#[test]
fn the_thread_says_how_it_ended() {
    let exit = |script: &dyn Fn(&mut Script)| {
        let harness = Harness::new(options(), 32);
        harness.passes();
        script(&mut harness.script.lock().unwrap());
        let (sender, receiver) = std::sync::mpsc::channel();
        let handle = spawn(harness.engine, move |exit| sender.send(exit).unwrap()).unwrap();
        let (answers, answer) = std::sync::mpsc::channel();
        handle.send(Command::Prefill {
            batch: NewBatch { id: 1, requests: vec![request(1, 3)] },
            cached_batch: None,
            received: Instant::now(),
            reply: Box::new(move |result| answers.send(result.map(drop)).unwrap()),
        });
        let answer = answer.recv();
        drop(handle);
        (answer, receiver.recv().unwrap())
    };
    let (answer, end) = exit(&|_| ());
    assert!(matches!((answer, end), (Ok(Ok(())), EngineExit::Stopped)));
    let (answer, end) = exit(&|script| script.fail_at = Some(0));
    assert!(matches!((answer, end), (Ok(Err(_)), EngineExit::Failed(_))));
    let (answer, end) = exit(&|script| script.fail_at = Some(1));
    assert!(matches!((answer, end), (Ok(Ok(())), EngineExit::Failed(_))), "nobody was left to tell");
    let (answer, end) = exit(&|script| script.panic_at = Some(0));
    assert!(answer.is_err(), "the reply is dropped");
    assert!(matches!(end, EngineExit::Panicked(text) if text == "scripted panic"));
}
