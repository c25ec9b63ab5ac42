//! What can go wrong between a client and its shards.

use std::error::Error;

use tonic::Code;

/// A failed call to one or all shards.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The socket could not be reached.
    #[error("could not connect to shard at {uds_path}: {reason}")]
    Connection {
        /// Path of the Unix socket.
        uds_path: String,
        /// The transport's own words.
        reason: String,
    },
    /// The shard answered with an error. TGI's texts begin the same way.
    #[error("Server error: {0}")]
    Generation(String),
    /// The shard has gone: whatever it held of any request is lost, and no later call will be answered by it.
    #[error("Server error: {0}")]
    Lost(String),
    /// The same, and the shard could still say why: its engine failed at this call.
    #[error("Server error: {0}")]
    EngineFailed(String),
    /// The shards answered nothing, or contradicted one another.
    #[error("shards disagree: {0}")]
    Disagreement(String),
}

impl ClientError {
    /// Whether a new connection to new shards is the only way on.
    pub fn is_lost(&self) -> bool {
        matches!(self, ClientError::Lost(_) | ClientError::EngineFailed(_) | ClientError::Connection { .. })
    }
}

impl From<tonic::Status> for ClientError {
    /// A status that has a source was not sent by the shard: the transport made it up when the connection broke. A shard
    /// whose engine has ended says so with `UNAVAILABLE`; what it merely refuses is `INTERNAL`, as TGI's shards answer
    /// every failure.
    fn from(status: tonic::Status) -> Self {
        let text = status.message().to_string();
        if status.source().is_some() || status.code() == Code::Cancelled {
            ClientError::Lost(text)
        } else if status.code() == Code::Unavailable {
            ClientError::EngineFailed(text)
        } else {
            ClientError::Generation(text)
        }
    }
}
