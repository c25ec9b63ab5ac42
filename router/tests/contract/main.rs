//! The HTTP contract, byte for byte: the real router between a raw TCP client and a scripted shard.

#![allow(clippy::unwrap_used, reason = "a helper that panics fails its test, which is what it is for")]

mod auth;
mod batching;
mod cancel;
mod failures;
mod generate;
mod harness;
mod http;
mod openai;
mod probes;
mod recovery;
mod rejections;
mod service;
mod shard;
mod stream;
