//! Architectures as data, their weights, and the one executor that runs them all.
//!
//! - [`spec`]: what an architecture is. `families/` turns a `config.json` into one.
//! - `weights/`: tensors by name from safetensors and GGUF files, only the bytes a rank needs.
//! - [`tensor_parallel`]: which rank owns what.
//! - `layers/` and [`Decoder`]: run a spec on any [`backend::Backend`]. The engine sees [`CausalLm`] only.

mod causal_lm;
mod decoder;
mod error;
mod families;
mod footprint;
mod layers;
mod load;
mod quantization;
pub mod spec;
pub mod tensor_parallel;
#[cfg(test)]
mod testing;
mod weights;

pub use causal_lm::{CausalLm, ModelInfo};
pub use decoder::Decoder;
pub use error::ModelError;
pub use families::decoder_spec;
pub use footprint::{DeviceRules, Footprint, RankFootprint, footprint};
pub use load::{LoadOptions, load};
pub use quantization::Quantize;
