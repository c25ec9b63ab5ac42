//! The real programs, driven through one harness.
//!
//! - [`Server`]: a launcher with its shards and router on a free port, in a folder of its own, ended in `Drop`.
//! - [`http`]: a client of a few lines, so that the tests see the bytes the router wrote.
//! - [`conformance`]: every way of asking for the same thing gives the reference's tokens.
//! - [`collector`]: an OTLP collector that keeps the spans it gets.
//! - [`fake_hub`]: a Hub that cuts, stalls, refuses and lies.
//! - [`fake_ngrok`]: ngrok's end of a tunnel, and an edge on a port.
//! - [`golden`]: reference outputs and the one table of tolerances.
//! - [`near_tie`]: which differences between answers are the arithmetic's last bits.
//! - [`workload`] and [`chaos`]: streams with known answers, and processes that are killed under them.
//! - [`faults`]: one fault in one phase, and what is seen of it.
//! - [`process_tree`]: which processes live, for the tests that kill some.

pub mod args;
pub mod chaos;
pub mod collector;
pub mod conformance;
pub mod fake_hub;
pub mod fake_ngrok;
pub mod faults;
pub mod golden;
pub mod http;
pub mod near_tie;
pub mod process_tree;
mod server;
pub mod workload;

pub use server::{Exit, Server, ServerBuilder, free_port, program};
