//! Progress for scripts and logs: one plain line on standard error for whatever takes time.

use std::time::Duration;

use crate::measurements::{BatchMeasurements, Measurements, milliseconds};
use crate::runner::Event;
use crate::session::{Next, Session};
use crate::settings::Settings;
use crate::stats::Summary;

/// Prints lines until the run is over, or hangs after a stop.
pub(crate) fn run(settings: &Settings, session: &mut Session, measurements: &mut Measurements) {
    loop {
        match session.next(Duration::from_millis(100)) {
            Next::Ended => return,
            Next::Idle if session.is_overdue() => return,
            Next::Idle => {}
            Next::Event(event) => {
                measurements.record(&event);
                let line = match &event {
                    Event::RunDone { batch, .. } => finished(settings, measurements, *batch),
                    event => Some(describe(settings, measurements, event)),
                };
                if let Some(line) = line {
                    eprintln!("{line}");
                }
            }
        }
    }
}

/// One line for `event`.
pub(crate) fn describe(settings: &Settings, measurements: &Measurements, event: &Event) -> String {
    match event {
        Event::WarmingUp { prefill_tokens } => {
            format!("no router has warmed up the shard: warming up with a prefill of {prefill_tokens} tokens")
        }
        Event::Attached(shards) => {
            let ranks = if shards.world_size == 1 { "rank" } else { "ranks" };
            let warmed = shards.warmup.map(|took| format!(", warmed up in {:.0} ms", milliseconds(took)));
            format!(
                "attached to {} {ranks} at {}: {} on {}{}",
                shards.world_size,
                settings.master_shard_uds_path.display(),
                shards.info.dtype,
                shards.info.device_type,
                warmed.unwrap_or_default()
            )
        }
        Event::BatchStarted { batch } | Event::RunDone { batch, .. } => {
            let batch_size = measurements.batches.get(*batch).map_or(0, |batch| batch.batch_size);
            format!(
                "batch size {batch_size} ({} of {}): {} warm-ups, {} runs",
                batch + 1,
                settings.batch_sizes.len(),
                settings.warmups,
                settings.runs
            )
        }
    }
}

/// A line with the medians, when all runs of the batch size are done.
fn finished(settings: &Settings, measurements: &Measurements, batch: usize) -> Option<String> {
    let measured = measurements.batches.get(batch).filter(|measured| measured.runs.len() == settings.runs)?;
    let p50 = |series: fn(&BatchMeasurements) -> Vec<f64>| Summary::of(&series(measured)).p50;
    let mut line = format!(
        "batch size {}: p50 prefill {:.2} ms",
        measured.batch_size,
        p50(BatchMeasurements::prefill_latencies)
    );
    if settings.decode_steps() > 0 {
        line += &format!(
            ", decode {:.2} ms a step, {:.2} tokens/secs",
            p50(BatchMeasurements::decode_token_latencies),
            p50(BatchMeasurements::decode_throughputs)
        );
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measurements::tests::run;
    use crate::settings::tests::settings;

    #[test]
    fn a_line_is_printed_when_a_batch_size_is_done() {
        let settings = settings(&["-b", "4", "-r", "2"]);
        let mut measurements = Measurements::new(&settings.batch_sizes);
        measurements.record(&Event::RunDone { batch: 0, run: run(10) });
        assert_eq!(finished(&settings, &measurements, 0), None);
        measurements.record(&Event::RunDone { batch: 0, run: run(10) });
        assert_eq!(
            finished(&settings, &measurements, 0).as_deref(),
            Some("batch size 4: p50 prefill 10.00 ms, decode 5.00 ms a step, 20.00 tokens/secs")
        );
        let started = describe(&settings, &measurements, &Event::BatchStarted { batch: 0 });
        assert_eq!(started, "batch size 4 (1 of 1): 1 warm-ups, 2 runs");
    }
}
