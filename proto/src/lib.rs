//! The wire contract between router, benchmark, launcher and shards, and the one client for it.
//!
//! - [`v3`]: TGI's `generate.v3`, field for field.
//! - [`control`]: what Quartet adds, a second service on the same socket.
//! - [`CallId`]: what a call that all ranks must carry out is called.
//! - [`Watched`]: a connection whose end is noticed, on either side.
//! - [`ShardClient`]: one shard. [`ShardedClient`]: all ranks, merged into one answer.

mod call_id;
mod client;
mod connection;
mod error;
mod sharded_client;

pub use call_id::CallId;
pub use client::ShardClient;
pub use connection::{Closed, Watched};
pub use error::ClientError;
pub use sharded_client::{ShardInfo, ShardedClient, StepResult, StepTimings};

/// Both services' descriptors, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptors");

/// `generate.v3`, TGI's protocol.
pub mod v3 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::restriction,
        reason = "generated code"
    )]
    tonic::include_proto!("generate.v3");
}

/// `quartet.v1`, our additions.
pub mod control {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::restriction,
        reason = "generated code"
    )]
    tonic::include_proto!("quartet.v1");
}
