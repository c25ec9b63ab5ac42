//! The thread the engine lives in.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use models::{ModelError, ModelInfo};

use super::{Command, Engine, Liveness};

/// How long an engine that failed between two calls waits for a call to tell it to. A router that runs a batch calls
/// within milliseconds; without one there is nobody to tell.
const FAILURE_PATIENCE: Duration = Duration::from_secs(1);

/// Why the engine has ended.
#[derive(Debug)]
pub enum EngineExit {
    /// Nobody can call any more.
    Stopped,
    /// The model failed.
    Failed(ModelError),
    /// A mistake in the program, with its message.
    Panicked(String),
}

/// How others talk to the engine. Cloning is cheap.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    liveness: Arc<Liveness>,
    model: Arc<ModelInfo>,
}

impl EngineHandle {
    /// Hands over a command; never blocks. When the engine has ended, the reply is dropped uncalled.
    pub fn send(&self, command: Command) {
        // The dropped reply tells the caller.
        let _ = self.commands.send(command);
    }

    /// Counters that are there while the engine works.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// The model's fixed facts.
    pub fn model_info(&self) -> &ModelInfo {
        &self.model
    }
}

/// Starts the engine's thread. It ends when the last handle is dropped or the model fails; `on_exit` is then called from
/// it.
///
/// # Errors
/// The operating system refuses a thread.
pub fn spawn(
    engine: Engine,
    on_exit: impl FnOnce(EngineExit) + Send + 'static,
) -> std::io::Result<EngineHandle> {
    let (sender, receiver) = channel();
    let handle = EngineHandle {
        commands: sender,
        liveness: engine.liveness(),
        model: Arc::new(engine.model_info().clone()),
    };
    let liveness = engine.liveness();
    std::thread::Builder::new().name("engine".to_string()).spawn(move || {
        // The engine is never used again after a panic.
        let exit = catch_unwind(AssertUnwindSafe(move || run(engine, &receiver)))
            .unwrap_or_else(|payload| EngineExit::Panicked(panic_message(&*payload)));
        if !matches!(exit, EngineExit::Stopped) {
            liveness.set_failed();
        }
        on_exit(exit);
    })?;
    Ok(handle)
}

fn run(mut engine: Engine, commands: &Receiver<Command>) -> EngineExit {
    loop {
        let command = if engine.has_failed() {
            commands.recv_timeout(FAILURE_PATIENCE).ok()
        } else {
            commands.recv().ok()
        };
        let Some(command) = command else {
            return engine.take_failure().map_or(EngineExit::Stopped, EngineExit::Failed);
        };
        if let Err(error) = engine.execute(command) {
            return EngineExit::Failed(error);
        }
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_string())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_string())
}
