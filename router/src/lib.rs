//! Quartet's router: HTTP, validation, the queue and the batches.
pub mod metrics;
pub mod scheduler;
