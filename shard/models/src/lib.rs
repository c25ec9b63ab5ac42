//! Architectures as data, their weights, and the one executor that runs them all.

mod causal_lm;
mod error;

pub use causal_lm::{CausalLm, ModelInfo};
pub use error::ModelError;
