//! Why the router cannot start, or had to stop.

use std::io;
use std::net::SocketAddr;

use process::ExitCode;
use proto::ClientError;

use crate::scheduler::Unrecoverable;

/// A failure of the router as a whole.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// Flags that are wrong by themselves or do not go together; all of them.
    #[error("{}", .0.join("\n"))]
    Configuration(Vec<String>),
    /// A call of the start-up failed on the shards.
    #[error("{step} failed: {source}")]
    Shards {
        /// Which call.
        step: &'static str,
        /// The shards' own words.
        source: ClientError,
    },
    /// The shards died, and those that were started in their place cannot serve what the old ones served.
    #[error(transparent)]
    Unrecoverable(#[from] Unrecoverable),
    /// The model's files cannot be used.
    #[error(transparent)]
    Model(#[from] hub::HubError),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; set another --port or --hostname")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The operating system's words.
        source: io::Error,
    },
    /// ngrok will not open the tunnel that was asked for.
    #[error(transparent)]
    Tunnel(#[from] crate::tunnel::Refused),
    /// Spans cannot be exported.
    #[error(transparent)]
    Traces(#[from] process::TraceError),
    /// The operating system refused something else.
    #[error("{step}: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// The operating system's words.
        source: io::Error,
    },
    /// A part of the start-up panicked or a recorder could not be made: a bug of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl RouterError {
    /// What the process exits with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            RouterError::Configuration(_) | RouterError::Tunnel(_) => ExitCode::Usage,
            RouterError::Model(_) => ExitCode::ModelUnusable,
            // Their death is the cause, and whoever starts them starts this program too.
            RouterError::Shards { source, .. } if source.is_lost() => ExitCode::PeerLost,
            RouterError::Shards { .. }
            | RouterError::Unrecoverable(_)
            | RouterError::Bind { .. }
            | RouterError::Traces(_)
            | RouterError::System { .. }
            | RouterError::Internal(_) => ExitCode::Failure,
        }
    }
}
