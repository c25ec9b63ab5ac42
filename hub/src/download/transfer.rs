//! Files on their way: segments are taken from a queue by a few workers, each with a connection of its own.

use std::collections::VecDeque;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::client::{Answer, Client, one_line};
use super::failure::Failure;
use super::part_file::PartFile;
use super::progress::Reporter;
use super::repository::Content;
use crate::args::DownloadOptions;

/// Bytes that are read before they are written. What a killed process may have to fetch again is one of these a connection.
const BUFFER_BYTES: usize = 128 << 10;

/// A file to fetch.
#[derive(Clone, Debug)]
pub(super) struct WantedFile {
    /// For messages.
    pub(super) name: String,
    /// Path on the Hub.
    pub(super) url_path: String,
    /// What it must be.
    pub(super) content: Content,
    /// Where it is while it comes.
    pub(super) part: PathBuf,
    /// Where it is when it is complete and checked.
    pub(super) blob: PathBuf,
}

/// A file on its way.
#[derive(Debug)]
pub(super) struct Job<'a> {
    file: &'a WantedFile,
    part: PartFile,
    /// Segments that no worker has dealt with yet.
    num_left: AtomicUsize,
    /// The server sends the whole file whatever is asked for: one worker takes it, the others leave it alone.
    is_whole: AtomicBool,
    is_finished: AtomicBool,
}

impl<'a> Job<'a> {
    /// Opens the part file.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn open(file: &'a WantedFile, options: &DownloadOptions) -> std::io::Result<Self> {
        let part = PartFile::open(&file.part, file.content.size, options.segment_bytes)?;
        // An empty file has no segment, but somebody must finish it.
        let num_left = AtomicUsize::new(part.num_segments().max(1));
        let (is_whole, is_finished) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { file, part, num_left, is_whole, is_finished })
    }

    /// For messages.
    pub(super) fn name(&self) -> &str {
        &self.file.name
    }

    /// Bytes that it has in the end.
    pub(super) fn size(&self) -> u64 {
        self.file.content.size
    }

    /// Bytes that are here.
    pub(super) fn num_done(&self) -> u64 {
        self.part.num_done()
    }

    /// Whether it is complete and checked.
    pub(super) fn is_finished(&self) -> bool {
        self.is_finished.load(Ordering::Relaxed)
    }
}

/// Which file failed, and why.
#[derive(Debug)]
pub(super) struct FileFailure {
    pub(super) name: String,
    pub(super) failure: Failure,
}

/// The transfer of a set of files into blobs.
pub(super) struct Transfer<'a> {
    client: &'a Client,
    options: &'a DownloadOptions,
    reporter: &'a Reporter,
    jobs: &'a [Job<'a>],
    /// Job and segment.
    queue: Mutex<VecDeque<(usize, usize)>>,
    /// Jobs whose content was not what it must be.
    damaged: Mutex<Vec<usize>>,
    stop: Stop,
}

/// What one request brought.
enum Outcome {
    /// All that this worker is to fetch.
    Complete,
    /// Some bytes; the server ended the answer properly.
    Partial,
    /// The whole file comes through another worker.
    Delegated,
}

impl<'a> Transfer<'a> {
    pub(super) fn new(
        client: &'a Client,
        options: &'a DownloadOptions,
        reporter: &'a Reporter,
        jobs: &'a [Job<'a>],
    ) -> Self {
        let segments = |(index, job): (usize, &Job<'_>)| {
            (0..job.part.num_segments().max(1)).map(move |segment| (index, segment))
        };
        let queue = Mutex::new(jobs.iter().enumerate().flat_map(segments).collect());
        let (damaged, stop) = (Mutex::default(), Stop::default());
        Self { client, options, reporter, jobs, queue, damaged, stop }
    }

    /// Fetches all; returns the indices of those that came but are damaged. Their parts are removed.
    ///
    /// # Errors
    /// The first file that cannot be had. Others may be here by then, wholly or in part.
    pub(super) fn run(&self) -> Result<Vec<usize>, FileFailure> {
        let num_workers = self.options.connections.clamp(1, locked(&self.queue).len().max(1));
        let (alive, over) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || self.reporter.run(self.jobs, &over));
            let workers: Vec<_> = (0..num_workers).map(|_| scope.spawn(|| self.work())).collect();
            // All are joined before the first error is looked at: the others say that they were stopped.
            let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            drop(alive);
            let failures = results.into_iter().filter_map(|result| match result {
                Ok(result) => result.err(),
                // Nothing here is known to panic; if the HTTP library does, it is for an answer it did not expect.
                Err(_) => Some(FileFailure {
                    name: "a file".to_owned(),
                    failure: Failure::Wrong("the answer is malformed".to_owned()),
                }),
            });
            let rank = |failure: &FileFailure| matches!(failure.failure, Failure::Stopped);
            failures.min_by_key(rank).map_or(Ok(()), Err)
        })?;
        Ok(std::mem::take(&mut locked(&self.damaged)))
    }

    fn work(&self) -> Result<(), FileFailure> {
        // Dropped when this worker ends badly, a panic included.
        let mut guard = StopGuard { stop: &self.stop, is_armed: true };
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let next = locked(&self.queue).pop_front();
            let Some((index, segment)) = next.filter(|_| !self.stop.is_set()) else { break };
            let job = &self.jobs[index];
            let named = |failure| FileFailure { name: job.file.name.clone(), failure };
            self.fetch_segment(job, segment, &mut buffer).map_err(named)?;
            if job.num_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.finish(index).map_err(named)?;
            }
        }
        guard.is_armed = false;
        Ok(())
    }

    /// Fetches one segment, however many tries that takes.
    fn fetch_segment(&self, job: &Job<'_>, segment: usize, buffer: &mut [u8]) -> Result<(), Failure> {
        if segment >= job.part.num_segments() {
            return Ok(());
        }
        // Whether this worker is the one that takes the whole file.
        let mut is_mine = false;
        let mut num_tries = 0;
        loop {
            let is_whole = is_mine;
            let progress = || if is_whole { job.part.num_done() } else { job.part.next_missing(segment) };
            let before = progress();
            let outcome = self.attempt(job, segment, &mut is_mine, buffer);
            let has_progressed = progress() > before;
            let failure = match outcome {
                Ok(Outcome::Complete | Outcome::Delegated) => return Ok(()),
                Ok(Outcome::Partial) if has_progressed => {
                    num_tries = 0;
                    continue;
                }
                Ok(Outcome::Partial) => Failure::Connection("the answer is empty".to_owned()),
                Err(failure) => failure,
            };
            num_tries = if has_progressed { 1 } else { num_tries + 1 };
            let Some(pause) = failure.pause(num_tries, self.options.first_pause) else { return Err(failure) };
            let seconds = pause.as_secs_f64();
            self.reporter.warn(&format!("{}: {failure}; trying again in {seconds:.1} s", job.file.name));
            self.stop.wait(pause)?;
        }
    }

    /// One request for what is missing.
    fn attempt(
        &self,
        job: &Job<'_>,
        segment: usize,
        is_mine: &mut bool,
        buffer: &mut [u8],
    ) -> Result<Outcome, Failure> {
        let size = job.size();
        let range = match *is_mine {
            true => job.part.first_missing()..size,
            false if job.is_whole.load(Ordering::Relaxed) => return Ok(Outcome::Delegated),
            false => job.part.next_missing(segment)..job.part.segment(segment).end,
        };
        if range.is_empty() {
            return Ok(Outcome::Complete);
        }
        let answer = self.client.get(&job.file.url_path, Some(range.clone()))?;
        let (start, end) = match answer.status {
            206 => {
                check_content_range(&answer, range.start, size)?;
                (range.start, range.end)
            }
            // The server knows no ranges. From here on one worker takes the file from its start.
            200 => {
                if !*is_mine && job.is_whole.swap(true, Ordering::Relaxed) {
                    return Ok(Outcome::Delegated);
                }
                *is_mine = true;
                check_length(&answer, size)?;
                (0, size)
            }
            status => return Err(Failure::Wrong(format!("found HTTP status {status}, expected 206 or 200"))),
        };
        self.receive(job, answer, start..end, buffer)
    }

    /// Writes the body, which begins at `range.start`, up to `range.end`. What a server sends beyond that is not read.
    fn receive(
        &self,
        job: &Job<'_>,
        answer: Answer,
        range: std::ops::Range<u64>,
        buffer: &mut [u8],
    ) -> Result<Outcome, Failure> {
        let length = content_length(&answer);
        let mut reader = answer.body.into_reader();
        let mut position = range.start;
        while position < range.end {
            if self.stop.is_set() {
                return Err(Failure::Stopped);
            }
            let wanted = buffer.len().min(usize::try_from(range.end - position).unwrap_or(usize::MAX));
            let count =
                reader.read(&mut buffer[..wanted]).map_err(|error| self.client.broken_read(&error))?;
            if count == 0 {
                return match length {
                    Some(length) if position - range.start < length => {
                        Err(Failure::Connection("the connection closed too early".to_owned()))
                    }
                    _ => Ok(Outcome::Partial),
                };
            }
            job.part.write(position, &buffer[..count]).map_err(Failure::Disk)?;
            position += count as u64;
        }
        if length == Some(range.end - range.start) {
            // Reading to the very end lets the next request use this connection again; its failure is no loss.
            let _ = reader.read(&mut buffer[..1]);
        }
        Ok(Outcome::Complete)
    }

    /// Checks the content of a file whose segments have all come, and gives it its name.
    fn finish(&self, index: usize) -> Result<(), Failure> {
        let job = &self.jobs[index];
        let (file, content) = (job.file, &job.file.content);
        let missing = job.part.first_missing();
        if missing != content.size {
            return Err(Failure::Wrong(format!("found {missing} bytes in a row, expected {}", content.size)));
        }
        job.part.complete().map_err(Failure::Disk)?;
        if content.checksum.matches(job.part.path(), content.size).map_err(Failure::Disk)? {
            std::fs::rename(job.part.path(), &file.blob).map_err(Failure::Disk)?;
            job.is_finished.store(true, Ordering::Relaxed);
            self.reporter.finished(&file.name, content.size);
        } else {
            std::fs::remove_file(job.part.path()).map_err(Failure::Disk)?;
            locked(&self.damaged).push(index);
        }
        Ok(())
    }
}

/// Whether a 206 answers what was asked: `Content-Range: bytes START-END/SIZE`.
fn check_content_range(answer: &Answer, start: u64, size: u64) -> Result<(), Failure> {
    let text = answer.headers.get("content-range").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let parsed = text.strip_prefix("bytes ").and_then(|rest| {
        let (range, total) = rest.split_once('/')?;
        let (first, _) = range.split_once('-')?;
        Some((first.trim().parse::<u64>().ok()?, total.trim().parse::<u64>().ok()))
    });
    match parsed {
        Some((_, Some(total))) if total != size => Err(wrong_size(total, size)),
        Some((first, _)) if first == start => Ok(()),
        // Another server of the same Hub may do better.
        _ => Err(Failure::Connection(format!(
            "found Content-Range {:?}, expected \"bytes {start}-.../{size}\"",
            one_line(text)
        ))),
    }
}

fn check_length(answer: &Answer, size: u64) -> Result<(), Failure> {
    match content_length(answer) {
        Some(length) if length != size => Err(wrong_size(length, size)),
        _ => Ok(()),
    }
}

fn wrong_size(found: u64, expected: u64) -> Failure {
    Failure::Wrong(format!("found a file of {found} bytes, expected {expected} as the Hub's list says"))
}

fn content_length(answer: &Answer) -> Option<u64> {
    answer.headers.get("content-length")?.to_str().ok()?.trim().parse().ok()
}

/// A lock whose holders cannot panic in between.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Tells all workers to end, also those that pause.
#[derive(Default)]
struct Stop {
    is_set: Mutex<bool>,
    changed: Condvar,
    /// The same, cheap to read.
    fast: AtomicBool,
}

impl Stop {
    fn is_set(&self) -> bool {
        self.fast.load(Ordering::Relaxed)
    }

    fn set(&self) {
        self.fast.store(true, Ordering::Relaxed);
        *locked(&self.is_set) = true;
        self.changed.notify_all();
    }

    /// Pauses; fails when it is stopped meanwhile.
    fn wait(&self, pause: Duration) -> Result<(), Failure> {
        let waited = self.changed.wait_timeout_while(locked(&self.is_set), pause, |is_set| !*is_set);
        let (is_set, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        if *is_set { Err(Failure::Stopped) } else { Ok(()) }
    }
}

struct StopGuard<'a> {
    stop: &'a Stop,
    is_armed: bool,
}

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        if self.is_armed {
            self.stop.set();
        }
    }
}
