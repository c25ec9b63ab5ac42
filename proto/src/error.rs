//! What can go wrong between a client and its shards.

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
    /// The shards answered nothing, or contradicted one another.
    #[error("shards disagree: {0}")]
    Disagreement(String),
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        ClientError::Generation(status.message().to_string())
    }
}
