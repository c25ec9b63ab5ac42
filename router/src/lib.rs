//! Quartet: HTTP, validation, the queue and the batches.
