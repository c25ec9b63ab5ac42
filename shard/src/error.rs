//! Why this process ends, and with which exit code.

use std::path::PathBuf;

use backend::BackendError;
use hub::HubError;
use models::ModelError;
use process::ExitCode;

/// What ends this process.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The command line or the environment is wrong; one line a mistake.
    #[error("{}", .0.join("\n"))]
    Usage(Vec<String>),
    /// The model cannot be found or read.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device or the other ranks cannot be used.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The socket cannot be used.
    #[error("socket {}: {problem}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What was found and what changes it.
        problem: String,
    },
    /// The engine met an error while it served.
    #[error("the engine failed: {0}")]
    EngineFailed(ModelError),
    /// A mistake in this program.
    #[error("the engine panicked: {0}")]
    EnginePanicked(String),
    /// Spans cannot be exported.
    #[error(transparent)]
    Traces(#[from] process::TraceError),
    /// The operating system refuses something.
    #[error("{action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The answer.
        source: std::io::Error,
    },
}

impl ShardError {
    /// What the launcher is told.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            ShardError::Usage(_) => ExitCode::Usage,
            ShardError::Hub(_) => ExitCode::ModelUnusable,
            ShardError::Model(error) => model_exit_code(error, ExitCode::Failure),
            ShardError::Backend(error) => backend_exit_code(error, ExitCode::Failure),
            ShardError::Socket { .. } => ExitCode::SocketUnusable,
            ShardError::EngineFailed(error) => model_exit_code(error, ExitCode::EngineFailed),
            ShardError::EnginePanicked(_) => ExitCode::EngineFailed,
            ShardError::Traces(_) | ShardError::System { .. } => ExitCode::Failure,
        }
    }
}

fn model_exit_code(error: &ModelError, other: ExitCode) -> ExitCode {
    match error {
        ModelError::Unusable(_) | ModelError::Hub(_) => ExitCode::ModelUnusable,
        ModelError::Backend(error) => backend_exit_code(error, other),
    }
}

/// `other` is for a device that refuses: at the start or while serving.
fn backend_exit_code(error: &BackendError, other: ExitCode) -> ExitCode {
    match error {
        BackendError::OutOfMemory { .. } => ExitCode::OutOfMemory,
        BackendError::PeerLost { .. } => ExitCode::PeerLost,
        BackendError::DeviceLost { .. } => ExitCode::DeviceLost,
        // The ranks were given different models or programs: starting them again changes nothing.
        BackendError::RankMismatch { .. } => ExitCode::ModelUnusable,
        BackendError::Device { .. } => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_whether_a_restart_helps() {
        let device = || BackendError::Device { operation: "mmap".to_string(), reason: "no".to_string() };
        let lost = BackendError::PeerLost {
            rank: 1,
            operation: "all_reduce",
            sequence: 3,
            reason: "gone".to_string(),
        };
        let too_large = || BackendError::OutOfMemory {
            what: "the weights".to_string(),
            needed_bytes: 2,
            available_bytes: 1,
        };
        let faulty = BackendError::DeviceLost {
            device: "H100".to_string(),
            operation: "waiting for a step (last launched: rope)".to_string(),
            reason: "an illegal memory access".to_string(),
        };
        for (error, code) in [
            (ShardError::Usage(vec!["a".to_string(), "b".to_string()]), ExitCode::Usage),
            (ModelError::Unusable(vec!["a".to_string()]).into(), ExitCode::ModelUnusable),
            (device().into(), ExitCode::Failure),
            (ShardError::EngineFailed(device().into()), ExitCode::EngineFailed),
            (ShardError::EngineFailed(lost.into()), ExitCode::PeerLost),
            (ShardError::EngineFailed(faulty.into()), ExitCode::DeviceLost),
            (ShardError::EnginePanicked(String::new()), ExitCode::EngineFailed),
            (ShardError::EngineFailed(too_large().into()), ExitCode::OutOfMemory),
            (ShardError::Backend(too_large()), ExitCode::OutOfMemory),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
