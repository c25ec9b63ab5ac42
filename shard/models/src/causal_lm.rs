//! What the engine sees of a model.

use backend::sampling::{Sampled, SamplingRow};
use backend::{DType, DeviceInfo, MemoryInfo, StepInput};

use crate::ModelError;

/// The fixed facts of a loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Element type of the weights.
    pub dtype: DType,
    /// Device it runs on.
    pub device: DeviceInfo,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Longest sequence the positions allow.
    pub max_position_embeddings: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Bytes of one KV block on this rank.
    pub block_bytes: usize,
    /// A step should have at most this many tokens; the engine cuts longer prompts.
    pub max_step_tokens: usize,
    /// What the weights and the workspace take on this rank: name and bytes, for the ledger.
    pub memory: Vec<(String, usize)>,
}

/// A causal language model on one rank. The engine drives it from one thread; it never blocks except on its device and
/// on its peers.
pub trait CausalLm: Send {
    /// The fixed facts.
    fn info(&self) -> &ModelInfo;
    /// Memory of the device now.
    fn memory(&self) -> Result<MemoryInfo, ModelError>;
    /// Replaces the KV cache by one of `num_blocks` blocks; what was cached is gone.
    fn allocate_kv_cache(&mut self, num_blocks: usize) -> Result<(), ModelError>;
    /// Runs the tokens of `step` through all layers and stores their keys and values.
    fn forward(&mut self, step: &StepInput) -> Result<(), ModelError>;
    /// Chooses one token for each of the last step's `logits_rows`, in their order.
    fn sample(&mut self, rows: &[SamplingRow<'_>]) -> Result<Vec<Sampled>, ModelError>;
    /// Log-probability of `targets[i]` after the last step's token `rows[i]`: how likely the prompt was.
    fn token_logprobs(&mut self, rows: &[u32], targets: &[u32]) -> Result<Vec<f32>, ModelError>;
}
