//! Recorded parts of steps.
//!
//! A decode step launches hundreds of small kernels; replaying a recorded graph costs the host one call. What is recorded
//! depends on the part and the number of rows alone: everything else is read from fixed addresses on the device.

use std::collections::HashMap;
use std::ptr;

use cudarc::driver::sys;

use super::driver::{Stream, check};
use crate::{BackendError, StepPart};

/// What one recording is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub(super) part: StepPart,
    /// Rows the part computes.
    pub(super) rows: usize,
    /// Its layers are one launch.
    pub(super) is_merged: bool,
}

/// What is to be done with a part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Run it launch by launch.
    Eager,
    /// Run it launch by launch, then record it.
    Record,
    /// Run the recording.
    Replay,
}

/// The recordings so far.
#[derive(Default)]
pub(super) struct Graphs {
    seen: HashMap<GraphKey, Option<Graph>>,
}

impl Graphs {
    /// What to do with a part that comes up: the first time it runs launch by launch, so that everything that is prepared
    /// lazily is there when it is recorded.
    pub(super) fn plan(&mut self, key: GraphKey) -> Plan {
        match self.seen.get(&key) {
            None => {
                self.seen.insert(key, None);
                Plan::Eager
            }
            Some(None) => Plan::Record,
            Some(Some(_)) => Plan::Replay,
        }
    }

    /// Keeps a recording.
    pub(super) fn insert(&mut self, key: GraphKey, graph: Graph) {
        self.seen.insert(key, Some(graph));
    }

    /// Whether there is a recording of `key`.
    pub(super) fn has(&self, key: GraphKey) -> bool {
        matches!(self.seen.get(&key), Some(Some(_)))
    }

    /// Runs the recording of `key`, where there is one.
    pub(super) fn launch(&self, key: GraphKey, stream: &Stream) -> Result<(), BackendError> {
        match self.seen.get(&key) {
            Some(Some(graph)) => graph.launch(stream),
            _ => Ok(()),
        }
    }

    /// Forgets all recordings: addresses they hold are about to change.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
    }
}

/// A recording that can be run.
pub(super) struct Graph {
    raw: sys::CUgraphExec,
}

// SAFETY: a handle that may be used from any thread, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Starts recording what is launched on `stream` from now on.
    pub(super) fn begin(stream: &Stream) -> Result<(), BackendError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not recording.
        check("recording a graph", unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) })
    }

    /// Ends the recording.
    pub(super) fn end(stream: &Stream) -> Result<Self, BackendError> {
        let mut graph = ptr::null_mut();
        // SAFETY: `begin` came before; the graph is destroyed once it is instantiated.
        unsafe {
            check("recording a graph", sys::cuStreamEndCapture(stream.raw(), &raw mut graph))?;
            let mut raw = ptr::null_mut();
            let code = sys::cuGraphInstantiateWithFlags(&raw mut raw, graph, 0);
            let _ = sys::cuGraphDestroy(graph);
            check("preparing a graph", code)?;
            let graph = Self { raw };
            check("uploading a graph", sys::cuGraphUpload(graph.raw, stream.raw()))?;
            Ok(graph)
        }
    }

    fn launch(&self, stream: &Stream) -> Result<(), BackendError> {
        // SAFETY: both handles are alive.
        check("launching a graph", unsafe { sys::cuGraphLaunch(self.raw, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `end`; the driver keeps it until it has run.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}
