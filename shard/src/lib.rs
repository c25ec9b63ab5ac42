//! Quartet: one shard, the process that owns one device and one rank of a model.
//!
//! - [`args`] → [`settings`]: what was typed, and what it means.
//! - [`startup`]: from settings to a shard that serves.
//! - [`server`]: both gRPC services over the Unix socket; messages ↔ engine types, nothing else.
//! - [`device`]: what the model runs on. [`ledger`]: where the time of the start went.
//! - [`engine`]: one plain thread with the model, the KV cache and the batches.
//! - [`footprint`]: what a model would take, for plans.
//! - [`lifeline`]: ends this process with its launcher. [`error`]: why it ends, and with which exit code.

pub mod args;
mod device;
pub mod engine;
pub mod error;
pub mod footprint;
mod ledger;
pub mod lifeline;
pub mod server;
pub mod settings;
pub mod startup;
