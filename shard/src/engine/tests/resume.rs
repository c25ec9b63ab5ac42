//! Requests that were interrupted elsewhere go on as if nothing had happened.

use super::schedules::{alone, random_request};
use super::*;

/// Runs a batch to its end; what each request was told, in order.
fn run_to_end(harness: &mut Harness, requests: Vec<NewRequest>) -> Vec<Generation> {
    let mut step = harness.prefill(1, requests, None).unwrap();
    let mut told = step.generations;
    while step.batch.is_some() {
        step = harness.decode(&[1]).unwrap();
        told.append(&mut step.generations);
    }
    told
}

/// `request` after it was told the first `count` of the tokens in `told`.
fn interrupted(request: &NewRequest, told: &[Generation], count: usize) -> NewRequest {
    let generated = told[..count].iter().flat_map(|generation| generation.tokens.ids.clone()).collect();
    NewRequest { generated, ..request.clone() }
}

/// For every kind of request and every place to cut it: the same ids, log-probabilities, texts and end.
#[test]
fn resumed_requests_are_told_the_rest_of_what_they_get_undisturbed() {
    let mut lots = Lots(42);
    let vocabulary = byte_vocabulary(&["<end>"]);
    let mut harness = Harness::new(options(), 400);
    let (mut resumed, mut with_half_a_character, mut stopped) = (0, 0, 0);
    for id in 0..400 {
        let request = random_request(id, &mut lots);
        let told: Vec<Generation> = alone(&request, &vocabulary).into();
        if told.len() < 2 {
            continue;
        }
        let cut = 1 + lots.below(told.len() - 1);
        let request = interrupted(&request, &told, cut);
        with_half_a_character += usize::from(request.generated.last() == Some(&0xc3));
        let end = told.last().and_then(|last| last.generated_text.as_ref()).unwrap();
        stopped += usize::from(end.finish_reason == FinishReason::StopSequence);
        assert_eq!(run_to_end(&mut harness, vec![request]), told[cut..], "request {id} cut after {cut}");
        assert_eq!(harness.blocks_used(), 0);
        resumed += 1;
    }
    assert!(resumed > 200 && with_half_a_character > 5 && stopped > 5, "the lots reach the awkward cases");
}

#[test]
fn resumed_and_new_requests_share_a_batch_and_a_step_budget() {
    let mut harness = Harness::new(EngineOptions { run_ahead: false, ..options() }, 64);
    let vocabulary = byte_vocabulary(&["<end>"]);
    let mut long = request(1, 30);
    long.stopping.max_new_tokens = 60;
    let told: Vec<Generation> = alone(&long, &vocabulary).into();
    let mut long = interrupted(&long, &told, 40);
    long.chunk_len = Some(20);
    harness.passes();
    let step = harness.prefill(1, vec![long, request(2, 5)], None).unwrap();
    assert_eq!((step.generations.len(), step.batch.unwrap().current_tokens), (1, 48 + 1));
    let step = harness.decode(&[1]).unwrap();
    assert_eq!(ids(&step).len(), 1, "70 tokens: 20 at first, then the budget's 48, then 2");
    let step = harness.decode(&[1]).unwrap();
    assert_eq!(step.generations[0], told[40]);
    assert_eq!(harness.passes(), [vec![20, 5], vec![48, 1], vec![2, 1]]);
}

#[test]
fn resume_points_that_cannot_be_are_refused() {
    let fixture = Fixture::new();
    let problem = |change: &dyn Fn(&mut NewRequest)| {
        let mut request = request(3, 20);
        change(&mut request);
        fixture.try_sequence(request).unwrap_err()
    };
    let expected = "request 3: generated_ids end the text with the 4. of their 5 tokens (Length), expected an answer \
                    that goes on";
    assert_eq!(problem(&|r| r.generated = vec![97; 5]), expected);
    let ends = problem(&|r| (r.generated, r.stopping.ignore_eos) = (vec![EOS], false));
    assert!(ends.contains("the 1. of their 1 tokens (EosToken)"), "{ends}");
    let unknown = problem(&|r| r.generated = vec![300]);
    assert!(unknown.contains("token id 300, expected ids below"), "{unknown}");
    let cached = problem(&|r| (r.generated, r.cache_len, r.blocks) = (vec![97], 21, vec![1, 2]));
    assert!(cached.contains("cache_len is 21, expected less than the 21 tokens"), "{cached}");
}
