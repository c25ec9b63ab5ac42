//! Deaths of a scripted shard at every kind of call.

use crate::scheduler::testing::{fixture, texts, valid_request};

#[tokio::test]
async fn whoever_runs_goes_on_behind_its_last_token_whatever_call_the_shard_dies_of() {
    for chunking in [true, false] {
        for death in ["prefill 0 [0, 1]", "decode [0]", "filter 0 [0]"] {
            let fixture = fixture(chunking, |_| ());
            fixture.shard.0.lock().unwrap().deaths = [death].into();
            let (a, b) = (fixture.request(3, 5), fixture.request(3, 2));
            let (log, health) = fixture.run().await;
            assert_eq!(texts(a), Ok(vec![0, 1, 2, 3, 4]), "{death}: {log:?}");
            assert_eq!(texts(b), Ok(vec![0, 1]), "{death}: {log:?}");
            assert!(log.iter().any(|line| line == "reconnect"), "{death}: {log:?}");
            assert!(health.is_healthy());
        }
    }
}

#[tokio::test]
async fn the_order_of_arrival_survives() {
    let fixture = fixture(true, |knobs| knobs.max_batch_size = Some(2));
    fixture.shard.0.lock().unwrap().deaths = ["decode [0]"].into();
    let clients =
        [fixture.request(3, 3), fixture.request(3, 3), fixture.request(3, 1), fixture.request(3, 1)];
    let (log, _) = fixture.run().await;
    assert_eq!(
        log,
        ["prefill 0 [0, 1]", "decode [0]", "reconnect", "prefill 1 [0, 1]", "decode [1]", "prefill 2 [2, 3]"]
    );
    for client in clients {
        assert!(texts(client).is_ok());
    }
}

#[tokio::test]
async fn a_death_beside_a_separate_prefill_loses_neither_batch() {
    let fixture = fixture(false, |_| ());
    fixture.shard.0.lock().unwrap().deaths = ["prefill 1 [1]"].into();
    let (a, b) = (fixture.request(16, 4), fixture.request(16, 3));
    let (log, _) = fixture.run().await;
    assert_eq!((texts(a), texts(b)), (Ok(vec![0, 1, 2, 3]), Ok(vec![0, 1, 2])), "{log:?}");
}

#[tokio::test]
async fn a_death_while_nobody_computes_is_noticed() {
    let fixture = fixture(true, |_| ());
    fixture.shard.0.lock().unwrap().is_dead = true;
    let scheduler = fixture.scheduler.clone();
    let health = fixture.health.clone();
    let asked = tokio::spawn(async move { while !scheduler.probe().await {} });
    let (log, _) = fixture.run().await;
    asked.await.unwrap();
    assert_eq!(log[0], "reconnect");
    assert!(health.is_healthy());
}

#[tokio::test]
async fn requests_that_arrive_meanwhile_wait_and_probes_do_not() {
    let fixture = fixture(true, |_| ());
    let running = fixture.request(3, 4);
    let (sender, late) = std::sync::mpsc::channel();
    let (scheduler, health) = (fixture.scheduler.clone(), fixture.health.clone());
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.deaths = ["decode [0]"].into();
        state.meanwhile = Some(Box::new(move || {
            assert!(!health.is_healthy() && health.retry_after().is_some());
            let request = scheduler.schedule(valid_request(3, 2)).unwrap();
            let probe = tokio::spawn(async move { scheduler.probe().await });
            sender.send((request, probe)).unwrap();
        }));
    }
    let (log, health) = fixture.run().await;
    let (late, probe) = late.recv().unwrap();
    assert!(!probe.await.unwrap());
    assert_eq!((texts(running), texts(late)), (Ok(vec![0, 1, 2, 3]), Ok(vec![0, 1])));
    assert_eq!(log[2..4], ["reconnect", "prefill 1 [0, 1]"]);
    assert!(health.is_healthy());
}

#[tokio::test]
async fn shards_that_cannot_resume_fail_what_has_begun_and_nothing_else() {
    let fixture = fixture(true, |knobs| knobs.max_batch_size = Some(1)).without_resume();
    fixture.shard.0.lock().unwrap().deaths = ["decode [0]"].into();
    let (begun, waiting) = (fixture.request(3, 4), fixture.request(3, 2));
    fixture.run().await;
    assert_eq!(texts(begun), Err("Server error: it was killed".to_string()));
    assert_eq!(texts(waiting), Ok(vec![0, 1]));
}

#[tokio::test]
async fn a_request_at_which_the_engine_fails_three_times_without_a_token_is_taken_for_the_cause() {
    let deadly = fixture(true, |knobs| knobs.max_batch_size = Some(1));
    let deaths = ["prefill 0 [0]", "prefill 1 [0]", "prefill 2 [0]"];
    {
        let mut state = deadly.shard.0.lock().unwrap();
        (state.deaths, state.dies_with_a_word) = (deaths.into(), true);
    }
    let (cause, innocent) = (deadly.request(3, 4), deadly.request(3, 2));
    deadly.run().await;
    assert!(texts(cause).unwrap_err().contains("failed 3 times in a row while it computed this request"));
    assert_eq!(texts(innocent), Ok(vec![0, 1]));

    let killed = fixture(true, |_| ());
    killed.shard.0.lock().unwrap().deaths = deaths.into();
    let victim = killed.request(3, 4);
    killed.run().await;
    assert_eq!(texts(victim), Ok(vec![0, 1, 2, 3]), "who is killed from outside blames nobody");

    let fixture = fixture(true, |_| ());
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.deaths = ["decode [0]", "decode [1]", "decode [2]", "decode [3]"].into();
        state.dies_with_a_word = true;
    }
    let unlucky = fixture.request(3, 9);
    fixture.run().await;
    assert_eq!(texts(unlucky), Ok((0..9).collect()), "a token in between acquits");
}

#[tokio::test]
async fn a_smaller_cache_holds_what_it_can() {
    let fixture = fixture(true, |_| ());
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.deaths = ["decode [0]"].into();
        state.next_cache = 40;
    }
    let (short, long) = (fixture.request(3, 3), fixture.request(3, 60));
    fixture.run().await;
    assert_eq!(texts(short), Ok(vec![0, 1, 2]));
    let error = texts(long).unwrap_err();
    assert_eq!(error, "the request needs 62 token slots, the KV cache has 36");
}

#[tokio::test]
async fn successors_of_no_use_end_the_task_and_everybody_is_told() {
    let fixture = fixture(true, |knobs| knobs.max_batch_size = Some(1));
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.deaths = ["decode [0]"].into();
        state.unusable = Some("not enough memory");
    }
    let clients = [fixture.request(3, 3), fixture.request(3, 3)];
    let (_, health, ended) = fixture.run_to_end().await;
    let error = "the restarted shards cannot be used: not enough memory";
    assert_eq!(ended.unwrap_err().to_string(), error);
    for client in clients {
        assert_eq!(texts(client), Err(error.to_string()));
    }
    assert!(!health.is_healthy());
}

#[tokio::test]
async fn giving_up_ends_everybody_now_and_later() {
    let fixture = fixture(true, |_| ());
    let running = fixture.request(3, 4);
    let (sender, late) = std::sync::mpsc::channel();
    let scheduler = fixture.scheduler.clone();
    {
        let mut state = fixture.shard.0.lock().unwrap();
        state.deaths = ["decode [0]"].into();
        state.meanwhile = Some(Box::new(move || {
            scheduler.give_up("going down");
            let request = scheduler.schedule(valid_request(3, 2)).unwrap();
            sender.send(request).unwrap();
        }));
    }
    let (log, health) = fixture.run().await;
    for client in [running, late.recv().unwrap()] {
        assert_eq!(texts(client), Err("going down".to_string()));
    }
    assert_eq!(log, ["prefill 0 [0]", "decode [0]"]);
    assert!(!health.is_healthy());
}
