//! The thread that drives the shards, and the handle to it.
//!
//! It has a runtime of one thread for itself: a measured call never waits for another task, nor for the screen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::BenchmarkError;
use crate::prompt::Prompt;
use crate::runner::{Event, Runner};
use crate::settings::Settings;

/// How long a call under way may still take after a stop; then the program ends without its answer.
const STOP_GRACE: Duration = Duration::from_secs(3);

type Outcome = Result<(), BenchmarkError>;

/// What [`Session::next`] has to tell.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Something happened.
    Event(Event),
    /// Nothing happened in the time given.
    Idle,
    /// Nothing will happen any more.
    Ended,
}

/// A benchmark that runs on its own thread.
#[derive(Debug)]
pub struct Session {
    events: Receiver<Event>,
    stop: Arc<AtomicBool>,
    /// Whether the user, and no signal, asked to stop.
    was_quit: bool,
    stopped_at: Option<Instant>,
    thread: Option<JoinHandle<Outcome>>,
    outcome: Option<Outcome>,
}

impl Session {
    /// Starts to run; from here on SIGINT, SIGTERM and SIGHUP stop the run in order.
    ///
    /// # Errors
    /// [`BenchmarkError::Start`] when the system gives no thread.
    pub fn start(settings: Settings, prompt: Prompt) -> Result<Self, BenchmarkError> {
        let (sender, events) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let thread_stop = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("runner".to_string())
            .spawn(move || drive(settings, prompt, sender, thread_stop))
            .map_err(BenchmarkError::Start)?;
        Ok(Self { events, stop, was_quit: false, stopped_at: None, thread: Some(thread), outcome: None })
    }

    /// The next event, waiting for it at most `timeout`.
    pub fn next(&mut self, timeout: Duration) -> Next {
        if self.is_stopping() && self.stopped_at.is_none() {
            self.stopped_at = Some(Instant::now());
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Next::Event(event),
            Err(RecvTimeoutError::Timeout) => Next::Idle,
            Err(RecvTimeoutError::Disconnected) => {
                self.join();
                Next::Ended
            }
        }
    }

    /// Asks the run to end after the call under way; it then counts as done.
    pub fn quit(&mut self) {
        self.was_quit = true;
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether somebody, or a signal, asked the run to end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether the run should have ended by now but hangs in a call.
    pub fn is_overdue(&self) -> bool {
        self.stopped_at.is_some_and(|stopped_at| stopped_at.elapsed() > STOP_GRACE)
    }

    /// Why the run failed, once it has.
    pub fn failure(&self) -> Option<&BenchmarkError> {
        self.outcome.as_ref().and_then(|outcome| outcome.as_ref().err())
    }

    /// How the run ended. One that is still under way is stopped first.
    ///
    /// # Errors
    /// What made the run fail; [`BenchmarkError::Interrupted`] when a signal ended it.
    pub fn finish(&mut self) -> Result<(), BenchmarkError> {
        while self.outcome.is_none() && !self.is_overdue() {
            self.stop.store(true, Ordering::Relaxed);
            self.next(Duration::from_millis(20));
        }
        match self.outcome.take().unwrap_or(Err(BenchmarkError::Interrupted)) {
            Err(BenchmarkError::Interrupted) if self.was_quit => Ok(()),
            outcome => outcome,
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.outcome = Some(thread.join().unwrap_or(Err(BenchmarkError::Panicked)));
        }
    }
}

/// The body of the thread.
fn drive(settings: Settings, prompt: Prompt, events: Sender<Event>, stop: Arc<AtomicBool>) -> Outcome {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(BenchmarkError::Start)?;
    runtime.block_on(async {
        let signalled = Arc::clone(&stop);
        tokio::spawn(async move {
            process::shutdown_signal().await;
            signalled.store(true, Ordering::Relaxed);
        });
        Runner::run(settings, prompt, events, stop).await
    })
}
