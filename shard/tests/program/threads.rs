//! Where the real program's threads run, and what they cost when there is nothing to do.

use std::collections::BTreeMap;
use std::fs;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::calls::{batch, request, serve_batch};
use crate::process::{PATIENCE, Place, Shard};

/// Of a process's threads by name: processors allowed, and nanoseconds of processor time.
fn threads(pid: u32) -> BTreeMap<String, (String, u64)> {
    let read = |task: &std::path::Path, file: &str| fs::read_to_string(task.join(file)).unwrap();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_task = |task: &std::path::Path| {
        let status = read(task, "status");
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        let time = read(task, "schedstat").split_whitespace().next().unwrap().parse().unwrap();
        (read(task, "comm").trim().to_owned(), (allowed.trim().to_owned(), time))
    };
    tasks.map(|task| of_task(&task.unwrap().path())).collect()
}

/// A shard with `num_threads` that has served a batch.
async fn shard_that_has_worked(place: &Place, num_threads: usize) -> Shard {
    let shard = Shard::start(place.command_of(num_threads), place.socket(0));
    let mut clients = [shard.client().await];
    serve_batch(&mut clients, &batch(1, vec![request(1, "once upon a time", 8)])).await;
    shard
}

#[tokio::test]
async fn computing_threads_have_a_core_each_and_the_others_any() {
    let cores = available_parallelism().unwrap().get();
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let all = own.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let place = Place::new();
    let shard = shard_that_has_worked(&place, cores).await;
    let threads = threads(shard.child.id());
    let computing = |name: &str| name == "engine" || name.starts_with("cpu-worker");
    let mut places: Vec<&str> = threads
        .iter()
        .filter(|(name, _)| computing(name))
        .map(|(_, (allowed, _))| allowed.as_str())
        .collect();
    assert_eq!(places.len(), cores, "{threads:?}");
    // A container may have less time than cores; its threads are left to the scheduler then.
    if places.iter().any(|place| *place != all) || cores == 1 {
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), cores, "each a core of its own: {threads:?}");
        assert!(places.iter().all(|place| place.parse::<usize>().is_ok()), "{threads:?}");
    }
    assert_eq!(threads["shard"].0, all, "what answers calls may run anywhere: {threads:?}");
}

#[tokio::test]
async fn an_idle_shard_costs_nothing() {
    let place = Place::new();
    let shard = shard_that_has_worked(&place, 2).await;
    let time = || threads(shard.child.id()).values().map(|(_, time)| time).sum::<u64>();
    let deadline = Instant::now() + PATIENCE;
    // What the last call left to do may take a moment.
    loop {
        let before = time();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let used = Duration::from_nanos(time() - before);
        if used < Duration::from_millis(5) {
            return;
        }
        assert!(Instant::now() < deadline, "{used:?} of processor time in half a second of doing nothing");
    }
}
