//! Quartet: one shard, the process that owns one device and one rank of a model.
//!
//! - `engine`: one plain thread with the model, the KV cache and the batches.
pub mod engine;
