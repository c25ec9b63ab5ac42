//! The CPU backend: readable reference, and a product for small models.
//!
//! Reading order: [`operations`] is `impl Backend`; [`plain_linear`], [`compact_linear`], [`quantized_linear`], [`kv_cache`] and [`buffer`] say
//! how things lie in memory;
//! [`matmul`] and [`attention`] spread work over [`threads`], which [`cores`] gives places; [`kernels`] holds the arithmetic, written once over
//! sixteen lanes and compiled for each instruction set of [`isa`].
//!
//! Decoding is a race to read the weights once: they lie packed on huge pages, in the order in which they are read, bf16 in 12 bits
//! without loss.
//! Activations are f32 throughout; beside bf16 weights they are split into two bf16, which keeps 16 bits of mantissa, or, where
//! they have many rows, become 16-bit fixed point as the weights do.

mod arena;
mod attention;
mod buffer;
mod compact_linear;
mod cores;
mod experts;
mod heads;
mod isa;
mod kernels;
mod kv_cache;
mod linear_kernels;
mod matmul;
mod memory;
mod norm;
mod operations;
mod packed_linear;
mod plain_linear;
mod quantized_linear;
mod rope;
mod router;
mod rows;
pub(crate) mod sampling;

mod threads;

use std::cell::{Cell, RefCell};
use std::fs;

pub use buffer::CpuBuffer;
pub use experts::CpuExperts;
pub use isa::Isa;
pub use kv_cache::CpuKvCache;
pub use packed_linear::PackedLinear;
pub use rope::CpuRope;

use crate::collectives::Communicator;
use crate::{BackendError, StepInput};

/// How to use the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the caller's included; at least 1.
    pub threads: usize,
    /// Kernels to use; none: the best this processor has.
    pub isa: Option<Isa>,
    /// Whether each thread stays on a core of its own, where the ranks' threads fill those that this process may use. The
    /// caller's does so from its first step on. Every rank says the same.
    pub pin_threads: bool,
}

/// A small parameter in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuVector(Vec<f32>);

/// One rank's share of the processor.
pub struct CpuBackend {
    description: String,
    kernels: &'static kernels::Kernels,
    // Cells, since packing a weight uses threads and arena but changes nothing that is seen.
    threads: RefCell<threads::Threads>,
    arena: RefCell<arena::Arena>,
    communicator: Box<dyn Communicator>,
    step: StepInput,
    /// Number of the step, from 1.
    step_number: u64,
    /// The step, blocks and block size that attention last found to fit.
    checked: Cell<(u64, usize, usize)>,
    num_ropes: Cell<usize>,
    rope_tables: Vec<rope::RopeTable>,
    workspace: matmul::Workspace,
    attention_plan: attention::AttentionPlan,
    expert_plan: experts::ExpertPlan,
    head_plan: heads::HeadPlan,
    samplers: Vec<sampling::Sampler>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the processor lacks the kernels asked for or threads cannot be started.
    pub fn new(options: CpuOptions, communicator: Box<dyn Communicator>) -> Result<Self, BackendError> {
        if options.threads == 0 {
            return Err(BackendError::Device {
                operation: "starting CPU threads".to_owned(),
                reason: "0 were asked for, at least 1 is needed; --threads sets their number".to_owned(),
            });
        }
        let isa = Isa::choose(options.isa)?;
        let s = if options.threads == 1 { "" } else { "s" };
        let kernels = kernels::Kernels::of(isa);
        let cpus = if options.pin_threads {
            cores::choose(options.threads, communicator.rank(), communicator.world_size())
        } else {
            None
        };
        let pinned = if cpus.is_some() { ", pinned" } else { "" };
        Ok(CpuBackend {
            description: format!(
                "{}, {isa} kernels, {} thread{s}{pinned}",
                processor_name(),
                options.threads
            ),
            kernels,
            threads: RefCell::new(threads::Threads::start(options.threads, cpus.as_deref())?),
            arena: RefCell::default(),
            communicator,
            step: StepInput::default(),
            step_number: 0,
            checked: Cell::default(),
            num_ropes: Cell::new(0),
            rope_tables: Vec::new(),
            workspace: matmul::Workspace::new()?,
            attention_plan: attention::AttentionPlan::default(),
            expert_plan: experts::ExpertPlan::default(),
            head_plan: heads::HeadPlan::default(),
            samplers: (0..options.threads).map(|_| sampling::Sampler::new(kernels)).collect(),
        })
    }
}

/// What the system calls the processor.
fn processor_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_owned())
}
