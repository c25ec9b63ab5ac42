//! The CUDA backend: one GPU, one stream.
//!
//! Reading order: [`operations`] is `impl Backend`; [`buffer`], [`linear`], [`kv_cache`] and [`step`] say how things lie in
//! memory; a file for each noun (norm, matmul, attention, ...) holds its kernels and how they are launched; [`launch`] and
//! [`graph`] are how launches reach the device. The kernels' sources are in `shard/kernels/cuda`.
//!
//! Activations have the weights' type; the residual stream, logits and sums are f32. Nothing allocates after start-up, and
//! a step waits for the device only where its result is read.

mod attention;
mod buffer;
mod ceilings;
mod cluster_gemm;
mod cublaslt;
mod driver;
mod elementwise;
mod embedding;
mod experts;
mod few_rows;
mod fp8_hopper;
mod fp8_linear;
mod fp8_matmul;
mod fp8_skinny;
mod gemv;
mod graph;
mod heads;
mod hopper_gemm;
mod kv_cache;
mod launch;
mod library;
mod linear;
mod matmul;
mod merged;
mod module;
mod nccl;
mod neighbours;
mod norm;
mod operations;
mod peers;
mod program;
mod ranks;
mod recording;
mod rope;
mod sampling;
mod shared_split;
mod step;
mod step_clock;
mod tensor_map;
mod upload;

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

pub use buffer::CudaBuffer;
pub use ceilings::{Ceilings, MatrixRate};
pub use cluster_gemm::ClusterPlan;
pub use experts::CudaExperts;
pub use fp8_matmul::Fp8Kernel;
pub use kv_cache::CudaKvCache;
pub use linear::{CudaLinear, CudaVector};
pub use matmul::MatmulKernel;
pub use ranks::RankPath;
pub use rope::CudaRope;
pub use step_clock::StepTime;

use crate::BackendError;
use crate::collectives::Communicator;
use driver::{Context, DeviceMemory, Stream};
use graph::Graphs;
use launch::Queue;
use step::StepInputs;
use upload::Uploader;

/// How to use the GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which of the visible devices.
    pub ordinal: usize,
    /// Most tokens of a step; longer prompts are cut into several.
    pub max_step_tokens: usize,
    /// Most sequences of a step.
    pub max_seqs: usize,
    /// Elements of the block tables of a step, all sequences together.
    pub max_table_elements: usize,
    /// Numbers of sequences whose decode steps are recorded as graphs; steps of other sizes are filled up to the next.
    /// Empty: nothing is recorded.
    pub graph_batches: Vec<usize>,
    /// Every token's result is the same bits whatever is computed beside it, at the cost of speed.
    pub is_deterministic: bool,
    /// Layers of recorded decode steps are one launch where that is quicker.
    pub merges_steps: bool,
    /// Threads that copy weights while they are loaded.
    pub loader_threads: usize,
    /// How ranks exchange.
    pub rank_path: RankPath,
}

impl Default for CudaOptions {
    fn default() -> Self {
        let graph_batches = [1, 2, 4].into_iter().chain((8..=256).step_by(8)).collect();
        Self {
            ordinal: 0,
            max_step_tokens: 8192,
            max_seqs: 1024,
            max_table_elements: 1 << 20,
            graph_batches,
            is_deterministic: false,
            merges_steps: true,
            loader_threads: 8,
            rank_path: RankPath::Auto,
        }
    }
}

/// What every operation that launches needs to know of the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceFacts {
    /// Multiprocessors.
    pub(crate) num_sms: usize,
    /// Compute capability, e.g. `(9, 0)`.
    pub(crate) capability: (i32, i32),
}

/// Bytes of the workspace that matrix products and split reductions share.
const WORKSPACE_BYTES: usize = 64 << 20;

/// One rank on one GPU.
pub struct CudaBackend {
    // First: work on the stream may wait for the other ranks, and the stream's end waits for its work.
    ranks: ranks::Ranks,
    options: CudaOptions,
    description: String,
    facts: DeviceFacts,
    queue: Queue,
    /// There while weights are loaded.
    uploader: RefCell<Option<Uploader>>,
    communicator: Box<dyn Communicator>,
    step: StepInputs,
    /// Of operations that need room in between; contents are undefined between operations.
    workspace: DeviceMemory,
    /// What the result of the next operation is for.
    next_weight: Cell<Option<linear::NextWeight>>,
    graphs: Graphs,
    /// Where layers can be one launch.
    merged: Option<merged::MergedSteps>,
    /// What operations launch, while a step is prepared for recording.
    notes: Option<program::Notes>,
    /// Addresses that graphs hold have changed.
    has_stale_graphs: Cell<bool>,
    norms: norm::Norms,
    elementwise: elementwise::Elementwise,
    embeddings: embedding::Embeddings,
    matmuls: matmul::Matmuls,
    ropes: rope::Ropes,
    attentions: attention::Attentions,
    heads: heads::Heads,
    experts: experts::ExpertKernels,
    samplers: sampling::Samplers,
    /// Where collectives of ranks happen that have no way between their devices.
    host: Vec<f32>,
    // Last, so that everything that uses it is gone before.
    context: Arc<Context>,
}

impl CudaBackend {
    /// Whether this program has kernels and this machine a driver and a device `ordinal`.
    ///
    /// # Errors
    /// One line that says what is missing.
    pub fn find_device(ordinal: usize) -> Result<(), BackendError> {
        if kernels::architectures().is_empty() {
            return Err(BackendError::Device {
                operation: "starting CUDA".to_owned(),
                reason: "this program was built without nvcc and has no CUDA kernels".to_owned(),
            });
        }
        driver::require(ordinal)
    }

    /// What the kernels of this program run on, e.g. `sm_90a`.
    pub fn architectures() -> &'static [&'static str] {
        kernels::architectures()
    }

    /// Opens the device and loads the kernels.
    ///
    /// # Errors
    /// One line that says what is missing: driver, device, kernels for it, libraries.
    pub fn new(options: CudaOptions, mut communicator: Box<dyn Communicator>) -> Result<Self, BackendError> {
        let context = Context::new(options.ordinal)?;
        if let Some(others) = context.uuid().ok().and_then(neighbours::on_device) {
            tracing::warn!("device {}: {others}", options.ordinal);
        }
        let num_sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let facts = DeviceFacts {
            num_sms: usize::try_from(num_sms).unwrap_or(1).max(1),
            capability: context.compute_capability()?,
        };
        let (major, minor) = facts.capability;
        let description = format!("{} (device {}, sm_{major}{minor})", context.name()?, options.ordinal);
        let is_deterministic = options.is_deterministic;
        let (tokens, seqs) = (options.max_step_tokens, options.max_seqs);
        let step = StepInputs::new(&context, tokens, seqs, options.max_table_elements, is_deterministic)?;
        let mut queue = Queue::new(Stream::new(&context)?, &description);
        let path = (options.rank_path, is_deterministic);
        let ranks = ranks::Ranks::meet(&context, communicator.as_mut(), &mut queue, path)?;
        Ok(Self {
            facts,
            queue,
            ranks,
            description,
            uploader: RefCell::new(None),
            communicator,
            workspace: DeviceMemory::zeroed(&context, WORKSPACE_BYTES, "the workspace")?,
            next_weight: Cell::new(None),
            graphs: Graphs::default(),
            merged: merged::MergedSteps::load(&context, facts, &options)?,
            notes: None,
            has_stale_graphs: Cell::new(false),
            norms: norm::Norms::load(&context)?,
            elementwise: elementwise::Elementwise::load(&context)?,
            embeddings: embedding::Embeddings::load(&context, options.max_step_tokens)?,
            matmuls: matmul::Matmuls::load(&context, facts, &options)?,
            ropes: rope::Ropes::load(&context)?,
            attentions: attention::Attentions::load(&context, facts)?,
            heads: heads::Heads::load(&context, is_deterministic)?,
            experts: experts::ExpertKernels::load(&context, facts, is_deterministic)?,
            samplers: sampling::Samplers::load(&context, facts)?,
            host: Vec::new(),
            step,
            options,
            context,
        })
    }

    /// The way that ranks exchange by; [`RankPath::Auto`] is our own kernels for short messages and NCCL for long ones.
    pub fn rank_path(&self) -> RankPath {
        self.ranks.path()
    }

    /// Copies weights: made when the first one comes, gone with the first step.
    fn with_uploader<T>(
        &self,
        use_it: impl FnOnce(&Uploader) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        self.context.make_current()?;
        let mut uploader = self.uploader.borrow_mut();
        let uploader = match uploader.take() {
            Some(there) => uploader.insert(there),
            None => uploader.insert(Uploader::new(&self.context, self.options.loader_threads)?),
        };
        use_it(uploader)
    }

    /// Waits for the weights that are on their way, and lets go of what loading needed.
    fn finish_uploads(&self) -> Result<(), BackendError> {
        match self.uploader.borrow_mut().take() {
            Some(uploader) => uploader.finish(),
            None => Ok(()),
        }
    }

    /// Whether steps of one token a sequence are recorded. Collectives that meet on the host cannot be.
    fn records_graphs(&self) -> bool {
        !self.options.graph_batches.is_empty() && self.ranks.is_on_device()
    }
}
