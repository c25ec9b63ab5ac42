//! Every operation on every backend against plain f64 arithmetic: one generic test body an operation, so that another
//! backend joins by one line in `cases::on_every_backend`. Sizes are awkward on purpose, inputs random from fixed seeds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod activation;
mod attention;
mod cases;
mod compact;
#[cfg(feature = "cuda")]
mod deterministic;
mod embedding;
mod experts;
#[cfg(feature = "cuda")]
mod faults;
mod fp8;
mod heads;
mod many_rows;
mod matmul;
#[cfg(feature = "cuda")]
mod merged;
mod norm;
mod quantized;
#[cfg(feature = "cuda")]
mod ranks;
mod rope;
mod sampling;
mod sampling_distribution;
mod tolerances;
