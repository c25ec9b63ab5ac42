//! Orders of calls, by the log of a scripted shard.

use crate::scheduler::testing::{fixture, texts};

#[tokio::test]
async fn a_batch_is_filtered_as_its_requests_finish() {
    let fixture = fixture(true, |_| ());
    let (a, b) = (fixture.request(3, 3), fixture.request(3, 2));
    let (log, health) = fixture.run().await;
    assert_eq!(log, ["prefill 0 [0, 1]", "decode [0]", "filter 0 [0]", "decode [0]"]);
    assert_eq!((texts(a), texts(b)), (Ok(vec![0, 1, 2]), Ok(vec![0, 1])));
    assert!(health.is_healthy());
}

#[tokio::test]
async fn chunked_prompts_ride_along_with_the_running_batch() {
    let fixture = fixture(true, |_| ());
    fixture.shard.0.lock().unwrap().chunk = 16;
    let (a, b) = (fixture.request(6, 4), fixture.request(40, 2));
    let (log, _) = fixture.run().await;
    assert_eq!(
        log,
        ["prefill 0 [0, 1]", "decode [0]", "decode [0]", "decode [0]"],
        "40 prompt tokens in steps of 16: no token for request 1 in the first two steps; both end in the fourth"
    );
    assert_eq!((texts(a), texts(b)), (Ok(vec![0, 1, 2, 3]), Ok(vec![0, 1])));
}

#[tokio::test]
async fn with_chunking_new_requests_join_in_one_prefill_call() {
    let fixture = fixture(true, |knobs| knobs.max_batch_size = Some(2));
    let clients = [fixture.request(16, 3), fixture.request(15, 3), fixture.request(1, 1)];
    let (log, _) = fixture.run().await;
    // 16 tokens fill the first step. Request 1 joins beside one running row (budget 15), and max_batch_size
    // keeps request 2 out until one of them is done.
    assert_eq!(
        log,
        ["prefill 0 [0]", "prefill 1 [1] with 0", "decode [0]", "filter 0 [1]", "prefill 2 [2] with 0"]
    );
    for client in clients {
        assert!(texts(client).is_ok());
    }
}

#[tokio::test]
async fn without_chunking_prompts_wait_for_their_share_or_their_time() {
    let hasty = fixture(false, |knobs| knobs.max_waiting_tokens = 3);
    let clients = [hasty.request(16, 6), hasty.request(16, 1)];
    let (log, _) = hasty.run().await;
    // ratio 1.2 of one running row asks for one waiting request: it is let in at once.
    assert_eq!(log[..3], ["prefill 0 [0]", "prefill 1 [1]", "decode [0]"]);
    for client in clients {
        assert!(texts(client).is_ok());
    }

    let patient = fixture(false, |knobs| {
        knobs.max_waiting_tokens = 3;
        knobs.waiting_served_ratio = 2.0;
    });
    let clients = [patient.request(16, 6), patient.request(16, 2)];
    let (log, _) = patient.run().await;
    assert_eq!(log[..4], ["prefill 0 [0]", "decode [0]", "decode [0]", "prefill 1 [1]"]);
    assert_eq!(log[4], "decode [0, 1]");
    for client in clients {
        assert!(texts(client).is_ok());
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_filtered_out_in_the_same_step() {
    let fixture = fixture(true, |_| ());
    let (a, b) = (fixture.request(3, 3), fixture.request(3, 50));
    drop(fixture.request(3, 50));
    fixture.shard.0.lock().unwrap().leaves = Some(("decode [0]", b));
    let (log, _) = fixture.run().await;
    assert_eq!(
        log,
        ["prefill 0 [0, 1]", "decode [0]", "filter 0 [0]", "decode [0]"],
        "who left before the first batch is not in it"
    );
    assert_eq!(texts(a), Ok(vec![0, 1, 2]));
}

#[tokio::test]
async fn the_last_client_to_leave_clears_the_batch() {
    let fixture = fixture(true, |_| ());
    let only = fixture.request(3, 50);
    fixture.shard.0.lock().unwrap().leaves = Some(("decode [0]", only));
    let (log, _) = fixture.run().await;
    assert_eq!(log, ["prefill 0 [0]", "decode [0]", "clear Some(0)"]);
}

#[tokio::test]
async fn everybody_in_a_failed_call_gets_the_error_and_the_next_request_is_served() {
    for (call, chunking) in [("prefill", true), ("decode", true), ("decode", false), ("filter", true)] {
        let fixture = fixture(chunking, |_| ());
        fixture.shard.0.lock().unwrap().fail = Some(call);
        let (a, b) = (fixture.request(3, 3), fixture.request(3, 2));
        let later = fixture.request(16, 2);
        let (log, health) = fixture.run().await;
        let error = Err(format!("Server error: {call} failed"));
        assert_eq!(texts(a), error, "{call}: {log:?}");
        if call != "filter" {
            assert_eq!(texts(b), error);
        }
        // Without chunking it may have been computed beside the failed ones, and then it is among them.
        let answer = texts(later);
        assert!(answer == Ok(vec![0, 1]) || answer == error, "{call}: {answer:?}");
        assert!(log.iter().any(|line| line.starts_with("clear")), "{log:?}");
        assert_eq!(health.is_healthy(), answer.is_ok(), "{call}: the last step decides");
    }
}

#[tokio::test]
async fn a_failing_clear_does_not_end_the_task() {
    let fixture = fixture(true, |_| ());
    let leaves = fixture.request(16, 50);
    let later = fixture.request(16, 1);
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.fail = Some("clear");
        state.leaves = Some(("prefill 0 [0]", leaves));
    }
    let (log, health) = fixture.run().await;
    assert_eq!(log, ["prefill 0 [0]", "clear Some(0)", "clear Some(0)", "prefill 1 [1]"]);
    assert_eq!(texts(later), Ok(vec![0]));
    assert!(health.is_healthy());
}

#[tokio::test]
async fn the_probe_is_a_prefill_of_its_own() {
    let fixture = fixture(true, |_| ());
    fixture.health.set(false);
    let scheduler = fixture.scheduler.clone();
    let probe = tokio::spawn(async move { scheduler.probe().await });
    let (log, health) = fixture.run().await;
    assert!(probe.await.unwrap());
    assert_eq!(log, [format!("prefill {} [{}]", u64::MAX, u64::MAX)]);
    assert!(health.is_healthy());
}
