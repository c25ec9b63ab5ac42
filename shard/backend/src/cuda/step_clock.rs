//! When steps begin and end on the device, by its own clock: what lies between two of them is time in which it had nothing to
//! do.

use std::ptr;

use cudarc::driver::sys;

use super::CudaBackend;
use super::driver::{Stream, check};
use crate::BackendError;

/// One step on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Seconds without work between the step before and this one; 0 for the first.
    pub idle: f64,
    /// Seconds from the copy of its inputs to the copy of its results.
    pub busy: f64,
}

/// A place in a stream.
struct Event(sys::CUevent);

// SAFETY: a handle that may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    fn new() -> Result<Self, BackendError> {
        let mut raw = ptr::null_mut();
        // SAFETY: a place for a handle.
        check("making an event", unsafe { sys::cuEventCreate(&raw mut raw, 0) })?;
        Ok(Self(raw))
    }

    fn record(&self, stream: &Stream) -> Result<(), BackendError> {
        // SAFETY: event and stream are alive.
        check("recording an event", unsafe { sys::cuEventRecord(self.0, stream.raw()) })
    }

    /// Seconds from here to `later`. Both have happened.
    fn until(&self, later: &Event) -> Result<f64, BackendError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive.
        let code = unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.0, later.0) };
        check("reading an event", code)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Marks in a stream, two a step.
#[derive(Default)]
pub(super) struct StepClock {
    steps: Vec<(Event, Event)>,
}

impl StepClock {
    /// A step begins with what is put on the stream next.
    pub(super) fn begin(&mut self, stream: &Stream) -> Result<(), BackendError> {
        let (begin, end) = (Event::new()?, Event::new()?);
        begin.record(stream)?;
        self.steps.push((begin, end));
        Ok(())
    }

    /// The step ends with what was put on the stream last; where the host waits several times in a step, the last counts.
    pub(super) fn end(&self, stream: &Stream) -> Result<(), BackendError> {
        self.steps.last().map_or(Ok(()), |(_, end)| end.record(stream))
    }

    fn times(&self) -> Result<Vec<StepTime>, BackendError> {
        let mut times = Vec::with_capacity(self.steps.len());
        let mut before: Option<&Event> = None;
        for (begin, end) in &self.steps {
            let idle = before.map_or(Ok(0.0), |before| before.until(begin))?;
            times.push(StepTime { idle, busy: begin.until(end)? });
            before = Some(end);
        }
        Ok(times)
    }
}

impl CudaBackend {
    /// Takes the time of every step on the device from now on.
    pub fn watch_steps(&mut self) {
        self.queue.clock.replace(Some(StepClock::default()));
    }

    /// The times of the steps since [`CudaBackend::watch_steps`], which ends with this. Every step's results have been fetched.
    ///
    /// # Errors
    /// The device's.
    pub fn step_times(&mut self) -> Result<Vec<StepTime>, BackendError> {
        self.queue.clock.take().map_or(Ok(Vec::new()), |clock| clock.times())
    }
}
