//! Quartet's router: HTTP, validation, the queue and the batches.
//!
//! A request on its way: [`server`] reads it, [`infer`] takes a permit, [`validation`] checks it and has it tokenized by
//! [`tokenization`], [`scheduler`] queues it, batches it and drives the shards; tokens come back the same way.
//! [`tunnel`] brings visitors of an ngrok edge to [`server`]. [`types`] is what travels over HTTP; axum is known in [`server`] only, and the scheduler knows neither HTTP nor
//! tokenizer nor template.

pub mod args;
pub mod chat_template;
pub mod config;
mod error;
pub mod infer;
pub mod metrics;
pub mod scheduler;
pub mod server;
pub mod startup;
pub mod tokenization;
pub mod tunnel;
pub mod types;
pub mod validation;

pub use error::RouterError;
