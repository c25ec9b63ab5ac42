//! What a running launcher tells of itself: `launcher status`, as text and as JSON.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A running launcher and its children.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// How long it runs.
    pub uptime_seconds: f64,
    /// Where it is in its life: `Downloading`, `Starting`, `Warming`, `Serving`, `Recovering`, `Draining`.
    pub phase: String,
    /// For how long.
    pub phase_seconds: f64,
    /// The model, as it was asked for.
    pub model_id: String,
    /// What the shards run on; `None` before that is decided.
    pub device: Option<String>,
    /// The shards' sockets are this, `-` and the rank; `None` before it is claimed.
    pub socket_prefix: Option<String>,
    /// The restarts that count.
    pub restarts: RestartStatus,
    /// The router; `None` while none lives.
    pub router: Option<RouterStatus>,
    /// The shards that live, in rank order.
    pub ranks: Vec<RankStatus>,
}

/// Deaths and the budget for them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestartStatus {
    /// Deaths within the window.
    pub used: usize,
    /// `--max-restarts`.
    pub max: usize,
    /// `--restart-window`.
    pub window_seconds: u64,
}

/// A router that lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterStatus {
    /// Its process id.
    pub pid: Option<u32>,
    /// How long it runs.
    pub uptime_seconds: f64,
    /// Where it listens, or will.
    pub address: SocketAddr,
    /// Requests that it has let in and not answered to their end; `None` when it does not say.
    pub requests_in_flight: Option<u64>,
    /// Those of them that wait for their first step.
    pub requests_queued: Option<u64>,
}

/// A shard that lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Its rank.
    pub rank: usize,
    /// Its process id.
    pub pid: Option<u32>,
    /// How long it runs.
    pub uptime_seconds: f64,
    /// Steps begun since its start; `None` when it does not answer, as while it loads.
    pub steps_started: Option<u64>,
    /// Steps ended: as many when nothing runs.
    pub steps_finished: Option<u64>,
    /// KV blocks in all.
    pub blocks_total: Option<u64>,
    /// KV blocks that running requests hold.
    pub blocks_used: Option<u64>,
}

fn number(value: Option<u64>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| value.to_string())
}

fn process_id(pid: Option<u32>) -> String {
    number(pid.map(u64::from))
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, uptime_seconds: up, phase, phase_seconds: since, model_id, restarts, .. } = self;
        let device = self.device.as_ref().map_or_else(String::new, |device| format!(" on {device}"));
        writeln!(f, "launcher {pid}: {phase} for {since:.0} s (up {up:.0} s), {model_id}{device}")?;
        let RestartStatus { used, max, window_seconds } = restarts;
        write!(f, "  restarts: {used} of {max} within {window_seconds} s")?;
        if let Some(router) = &self.router {
            let (pid, up) = (process_id(router.pid), router.uptime_seconds);
            let (in_flight, queued) = (number(router.requests_in_flight), number(router.requests_queued));
            write!(
                f,
                "\n  router: pid {pid}, up {up:.0} s, http://{}, {in_flight} requests in flight, {queued} queued",
                router.address
            )?;
        }
        for shard in &self.ranks {
            let (pid, up) = (process_id(shard.pid), shard.uptime_seconds);
            let (begun, ended) = (number(shard.steps_started), number(shard.steps_finished));
            let (used, total) = (number(shard.blocks_used), number(shard.blocks_total));
            write!(
                f,
                "\n  shard rank {}: pid {pid}, up {up:.0} s, steps {ended} ended of {begun} begun, KV blocks {used} of \
                 {total}",
                shard.rank
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn status() -> Status {
        let rank = RankStatus {
            rank: 0,
            pid: Some(12),
            uptime_seconds: 59.6,
            steps_started: Some(8),
            steps_finished: Some(7),
            blocks_total: Some(100),
            blocks_used: Some(3),
        };
        let silent = RankStatus { rank: 1, steps_started: None, steps_finished: None, ..rank.clone() };
        Status {
            pid: 10,
            version: "1.2.3".to_owned(),
            uptime_seconds: 61.0,
            phase: "Serving".to_owned(),
            phase_seconds: 58.2,
            model_id: "org/model".to_owned(),
            device: Some("cpu".to_owned()),
            socket_prefix: Some("/tmp/s".to_owned()),
            restarts: RestartStatus { used: 1, max: 5, window_seconds: 600 },
            router: Some(RouterStatus {
                pid: Some(11),
                uptime_seconds: 60.4,
                address: "127.0.0.1:3000".parse().unwrap(),
                requests_in_flight: Some(4),
                requests_queued: Some(1),
            }),
            ranks: vec![rank, silent],
        }
    }

    #[test]
    fn the_text_has_a_line_for_each_process() {
        let expected = "launcher 10: Serving for 58 s (up 61 s), org/model on cpu\n  restarts: 1 of 5 within 600 s\n  \
                        router: pid 11, up 60 s, http://127.0.0.1:3000, 4 requests in flight, 1 queued\n  shard rank 0: \
                        pid 12, up 60 s, steps 7 ended of 8 begun, KV blocks 3 of 100\n  shard rank 1: pid 12, up 60 s, \
                        steps ? ended of ? begun, KV blocks 3 of 100";
        assert_eq!(status().to_string(), expected);
    }

    #[test]
    fn json_is_read_as_it_was_written() {
        let text = serde_json::to_string(&status()).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), status());
    }
}
