//! How far a download is: bars for a person, a line a second for a log.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};

use super::transfer::Job;
use crate::args::ProgressOutput;

const BAR_PERIOD: Duration = Duration::from_millis(100);
const LINE_PERIOD: Duration = Duration::from_secs(1);
const FILE_TEMPLATE: &str = "{msg:40!} [{wide_bar}] {bytes}/{total_bytes}";
const TOTAL_TEMPLATE: &str = "{msg:40!} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";

/// Tells how a set of files is coming. It looks at the files, so nobody has to report.
pub(super) struct Reporter {
    bars: Option<MultiProgress>,
    is_structured: bool,
    repository: String,
    num_files: usize,
    num_finished: AtomicUsize,
    started: Instant,
}

/// The state of all files at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Snapshot {
    done: u64,
    total: u64,
}

impl Reporter {
    /// For `num_files` files of `repository`.
    pub(super) fn new(output: ProgressOutput, repository: &str, num_files: usize) -> Self {
        let wants_bars = output == ProgressOutput::Auto && std::io::stderr().is_terminal();
        Self {
            bars: wants_bars.then(MultiProgress::new),
            is_structured: output == ProgressOutput::Structured,
            repository: repository.to_owned(),
            num_files,
            num_finished: AtomicUsize::new(0),
            started: Instant::now(),
        }
    }

    /// Reports until the other end of `stop` is dropped.
    pub(super) fn run(&self, jobs: &[Job<'_>], stop: &Receiver<()>) {
        match &self.bars {
            Some(bars) => self.show_bars(bars, jobs, stop),
            None => self.log_lines(jobs, stop),
        }
    }

    /// A log line that does not tear the bars.
    pub(super) fn warn(&self, text: &str) {
        match &self.bars {
            Some(bars) => bars.suspend(|| tracing::warn!("{text}")),
            None => tracing::warn!("{text}"),
        }
    }

    /// A file is complete.
    pub(super) fn finished(&self, name: &str, size: u64) {
        let finished = self.num_finished.fetch_add(1, Ordering::Relaxed) + 1;
        if self.bars.is_none() {
            tracing::info!("Downloaded {name} ({}) [{finished}/{}]", HumanBytes(size), self.num_files);
        }
    }

    fn log_lines(&self, jobs: &[Job<'_>], stop: &Receiver<()>) {
        let before = Snapshot::of(jobs).done;
        while stop.recv_timeout(LINE_PERIOD) == Err(RecvTimeoutError::Timeout) {
            let now = Snapshot::of(jobs);
            let seconds = self.started.elapsed().as_secs_f64();
            let rate = (now.done.saturating_sub(before) as f64 / seconds) as u64;
            let text = self.line(now, rate);
            if self.is_structured {
                tracing::info!(
                    downloaded_bytes = now.done,
                    total_bytes = now.total,
                    bytes_per_second = rate,
                    files = self.num_finished.load(Ordering::Relaxed),
                    total_files = self.num_files,
                    "{text}"
                );
            } else {
                tracing::info!("{text}");
            }
        }
    }

    /// Such as `Downloading org/name: 1.20 GiB of 4.80 GiB (25 %), 110.00 MiB/s, 34 s left`.
    fn line(&self, now: Snapshot, rate: u64) -> String {
        let percent = (now.done * 100).checked_div(now.total).unwrap_or(100);
        let left = (now.total - now.done.min(now.total)).checked_div(rate);
        let left = left.map_or_else(|| "stalled".to_owned(), |seconds| format!("{seconds} s left"));
        format!(
            "Downloading {}: {} of {} ({percent} %), {}/s, {left}",
            self.repository,
            HumanBytes(now.done),
            HumanBytes(now.total),
            HumanBytes(rate)
        )
    }

    fn show_bars(&self, bars: &MultiProgress, jobs: &[Job<'_>], stop: &Receiver<()>) {
        let total = bars.add(styled(TOTAL_TEMPLATE, format!("{} (all)", self.repository)));
        // What was there before is no speed of this download.
        total.set_position(Snapshot::of(jobs).done);
        total.reset_eta();
        let mut shown = HashMap::new();
        loop {
            let is_over = stop.recv_timeout(BAR_PERIOD) != Err(RecvTimeoutError::Timeout);
            let now = Snapshot::of(jobs);
            total.set_length(now.total);
            total.set_position(now.done);
            // Files that come at this moment have a bar; a model of a hundred files would fill the screen.
            for (index, job) in jobs.iter().enumerate() {
                let done = job.num_done();
                if is_over || done == 0 || job.is_finished() {
                    if let Some(bar) = shown.remove(&index) {
                        ProgressBar::finish_and_clear(&bar);
                    }
                    continue;
                }
                let bar = shown.entry(index).or_insert_with(|| {
                    bars.insert_before(&total, styled(FILE_TEMPLATE, job.name().to_owned()))
                });
                bar.set_length(job.size());
                bar.set_position(done);
            }
            if is_over {
                total.finish();
                return;
            }
        }
    }
}

impl Snapshot {
    fn of(jobs: &[Job<'_>]) -> Self {
        let add = |sum: Self, job: &Job<'_>| Self {
            done: sum.done + job.num_done(),
            total: sum.total + job.size(),
        };
        jobs.iter().fold(Self::default(), add)
    }
}

fn styled(template: &str, message: String) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(message);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        // Our own text, so it parses; a plain bar would do as well.
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_parse() {
        for template in [FILE_TEMPLATE, TOTAL_TEMPLATE] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn a_line_says_how_much_how_fast_and_how_long() {
        let reporter = Reporter::new(ProgressOutput::Lines, "org/tiny", 3);
        assert!(reporter.bars.is_none());
        let line = reporter.line(Snapshot { done: 1 << 20, total: 4 << 20 }, 1 << 20);
        assert_eq!(line, "Downloading org/tiny: 1.00 MiB of 4.00 MiB (25 %), 1.00 MiB/s, 3 s left");
        let line = reporter.line(Snapshot { done: 0, total: 10 }, 0);
        assert!(line.ends_with("(0 %), 0 B/s, stalled"), "{line}");
    }
}
