//! What was measured: plain values, and the series that statistics and charts are made of.

use std::time::Duration;

use crate::runner::Event;

/// The shards the numbers belong to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Shards {
    /// Number of ranks.
    pub world_size: usize,
    /// What they say of themselves.
    pub info: proto::ShardInfo,
    /// The model they serve; empty when the shard is not ours.
    pub model_id: String,
    /// Their version; empty when the shard is not ours.
    pub version: String,
    /// Tokens the KV cache holds, where known.
    pub cache_tokens: Option<u64>,
    /// How long warming them up took, if this program had to do it.
    pub warmup: Option<Duration>,
}

/// One prefill call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prefill {
    /// Wall time of the call.
    pub latency: Duration,
    /// Prompt tokens a second.
    pub throughput: f64,
}

/// The decode calls of one run; there is at least one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decode {
    /// Number of calls.
    pub steps: u32,
    /// Wall time of the whole loop.
    pub latency: Duration,
    /// The same a step.
    pub token_latency: Duration,
    /// Generated tokens a second.
    pub throughput: f64,
}

/// A prefill and its decode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// The prompt.
    pub prefill: Prefill,
    /// The answer; absent when the prefill's token was the only one asked for.
    pub decode: Option<Decode>,
}

/// All runs of one batch size.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchMeasurements {
    /// Requests in the batch.
    pub batch_size: u32,
    /// In the order measured.
    pub runs: Vec<Run>,
}

impl BatchMeasurements {
    /// Milliseconds of each prefill.
    pub fn prefill_latencies(&self) -> Vec<f64> {
        self.runs.iter().map(|run| milliseconds(run.prefill.latency)).collect()
    }

    /// Tokens a second of each prefill.
    pub fn prefill_throughputs(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.prefill.throughput).collect()
    }

    /// Milliseconds of each decode loop.
    pub fn decode_latencies(&self) -> Vec<f64> {
        self.decodes().map(|decode| milliseconds(decode.latency)).collect()
    }

    /// Milliseconds a decode step, one value a run.
    pub fn decode_token_latencies(&self) -> Vec<f64> {
        self.decodes().map(|decode| milliseconds(decode.token_latency)).collect()
    }

    /// Tokens a second of each decode loop.
    pub fn decode_throughputs(&self) -> Vec<f64> {
        self.decodes().map(|decode| decode.throughput).collect()
    }

    fn decodes(&self) -> impl Iterator<Item = &Decode> {
        self.runs.iter().filter_map(|run| run.decode.as_ref())
    }
}

/// Everything a session has reported so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurements {
    /// Known from the first event on.
    pub shards: Shards,
    /// One entry a batch size, in the order of the settings.
    pub batches: Vec<BatchMeasurements>,
    /// Index of the batch size that runs now, or ran last.
    pub current_batch: usize,
}

impl Measurements {
    /// Nothing yet.
    pub fn new(batch_sizes: &[u32]) -> Self {
        let batches = batch_sizes
            .iter()
            .map(|&batch_size| BatchMeasurements { batch_size, runs: Vec::new() })
            .collect();
        Self { shards: Shards::default(), batches, current_batch: 0 }
    }

    /// Adds what `event` tells.
    pub fn record(&mut self, event: &Event) {
        match event {
            Event::WarmingUp { .. } => {}
            Event::Attached(shards) => self.shards = shards.clone(),
            Event::BatchStarted { batch } => self.current_batch = *batch,
            Event::RunDone { batch, run } => {
                if let Some(measurements) = self.batches.get_mut(*batch) {
                    measurements.runs.push(*run);
                }
            }
        }
    }

    /// Whether anything was measured.
    pub fn has_runs(&self) -> bool {
        self.batches.iter().any(|batch| !batch.runs.is_empty())
    }
}

/// Milliseconds at TGI's resolution of a microsecond.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run of round numbers: `ms` a prefill, four decode steps of half of that.
    pub(crate) fn run(ms: u64) -> Run {
        Run {
            prefill: Prefill { latency: Duration::from_millis(ms), throughput: 100.0 / ms as f64 },
            decode: Some(Decode {
                steps: 4,
                latency: Duration::from_millis(2 * ms),
                token_latency: Duration::from_micros(500 * ms),
                throughput: 200.0 / ms as f64,
            }),
        }
    }

    #[test]
    fn events_end_up_at_their_batch() {
        let mut measurements = Measurements::new(&[1, 8]);
        assert!(!measurements.has_runs());
        measurements.record(&Event::BatchStarted { batch: 1 });
        measurements.record(&Event::RunDone { batch: 1, run: run(3) });
        measurements.record(&Event::RunDone { batch: 9, run: run(3) });
        assert_eq!(measurements.current_batch, 1);
        assert_eq!(measurements.batches[1].prefill_latencies(), [3.0]);
        assert_eq!(measurements.batches[1].decode_latencies(), [6.0]);
        assert_eq!(measurements.batches[1].decode_token_latencies(), [1.5]);
        assert!(measurements.batches[0].runs.is_empty() && measurements.has_runs());
    }

    #[test]
    fn latency_has_the_resolution_of_a_microsecond() {
        assert_eq!(milliseconds(Duration::from_nanos(1_234_999)), 1.234);
    }
}
