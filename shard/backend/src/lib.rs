//! The operations a model is made of, and the devices that run them.
//!
//! - [`Backend`] is the contract: every operation with its shapes. A backend knows no request and no model family.
//! - [`cpu`] is both the readable reference and a product for small models.
//! - [`collectives`] is how the ranks of one model add up their parts.
//! - [`sampling`] holds the types of the last operation, which turns logits into token ids.

mod backend;
pub mod collectives;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
mod fp8;
mod host_matrix;
mod kv_layout;
mod quantized_matrix;
mod routing;
pub mod sampling;
mod step_check;
mod step_input;

pub use backend::{
    Activation, Alibi, AttentionShape, Backend, DeviceInfo, HeadColumns, LongContext, LongFrequencies,
    MemoryInfo, RopeFrequencies, RopeStyle, SplitNorm, StepPart,
};
pub use dtype::DType;
pub use error::BackendError;
pub use fp8::{Fp8Format, Fp8Matrix};
pub use host_matrix::HostMatrix;
pub use kv_layout::{KvDType, KvLayout};
pub use quantized_matrix::QuantizedMatrix;
pub use routing::{ExpertGroups, GroupRank, RouterScores, Routing, WeightNormalization};
pub use step_input::StepInput;
