//! Times of operations in recorded steps, as they run while decoding, and a table of them.

use std::time::Instant;

use backend::collectives::Single;
use backend::cuda::{CudaBackend, CudaBuffer, CudaOptions};
use backend::{Backend, BackendError, DType, HostMatrix, KvLayout, StepInput, StepPart};

/// Most rows of an operation.
pub(crate) const MAX_ROWS: usize = 8192;
/// Runs of which the median counts.
const RUNS: usize = 7;

/// One measured figure, and what the hardware allows.
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) microseconds: f64,
    /// Bytes that have to be moved.
    pub(crate) bytes: f64,
    /// Floating-point operations.
    pub(crate) flops: f64,
}

impl Figure {
    /// As a JSON object.
    pub(crate) fn json(&self) -> String {
        format!(
            "{{\"name\":\"{}\",\"microseconds\":{:.3},\"gigabytes_per_second\":{:.1},\"teraflops\":{:.2}}}",
            self.name,
            self.microseconds,
            self.bytes / self.microseconds / 1e3,
            self.flops / self.microseconds / 1e6
        )
    }
}

/// A backend that records steps of any number of rows up to [`MAX_ROWS`].
pub(crate) fn backend() -> Result<CudaBackend, BackendError> {
    let options = CudaOptions {
        max_step_tokens: MAX_ROWS,
        max_seqs: MAX_ROWS,
        graph_batches: (1..=MAX_ROWS).collect(),
        ..CudaOptions::default()
    };
    CudaBackend::new(options, Box::new(Single))
}

/// A step of `rows` sequences of one token.
fn decode_step(rows: usize) -> StepInput {
    let rows = rows as u32;
    StepInput {
        input_ids: (0..rows).collect(),
        position_ids: vec![0; rows as usize],
        slot_mapping: vec![0; rows as usize],
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: vec![1; rows as usize],
        prompt_lens: vec![1; rows as usize],
        block_tables: vec![0; rows as usize],
        max_blocks: 1,
        logits_rows: (0..rows).collect(),
    }
}

/// Median microseconds of one of `count` calls of `operation`, which are recorded together and replayed. It is given its number.
pub(crate) fn microseconds(
    backend: &mut CudaBackend,
    rows: usize,
    count: usize,
    operation: impl FnMut(&mut CudaBackend, usize) -> Result<(), BackendError>,
) -> Result<f64, BackendError> {
    microseconds_of_step(backend, &decode_step(rows), count, operation)
}

/// The same in a step of the caller's; one with several tokens a sequence is launched call by call.
pub(crate) fn microseconds_of_step(
    backend: &mut CudaBackend,
    step: &StepInput,
    count: usize,
    mut operation: impl FnMut(&mut CudaBackend, usize) -> Result<(), BackendError>,
) -> Result<f64, BackendError> {
    // A new cache makes the backend forget what it has recorded.
    let layout =
        KvLayout { num_layers: 1, num_kv_heads: 1, head_dim: 64, block_size: 16, dtype: DType::F16.into() };
    let _cache = backend.kv_cache(layout, 1)?;
    let mut mark = backend.buffer(step.num_tokens(), 1, DType::F32)?;
    backend.begin_step(step)?;
    backend.scale(&mut mark, 1.0)?;
    let mut times = Vec::new();
    for run in 0..RUNS + 3 {
        backend.read(&mark)?;
        let start = Instant::now();
        // Enough replays for the first one's launch not to count.
        for _ in 0..4 {
            backend.run(StepPart::Layers, |backend| {
                (0..count).try_for_each(|index| operation(backend, index))
            })?;
        }
        backend.read(&mark)?;
        if run >= 3 {
            times.push(start.elapsed().as_secs_f64() * 1e6 / (4 * count) as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Cheap random numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// About normally distributed.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4)
            .map(|_| {
                self.0 =
                    self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (self.0 >> 40) as f32 / (1u64 << 24) as f32
            })
            .sum();
        (sum - 2.0) * 1.732
    }
}

/// A weight of random values of standard deviation `spread`; long ones repeat.
pub(crate) fn matrix(random: &mut Random, rows: usize, cols: usize, spread: f32) -> HostMatrix<'static> {
    let block: Vec<u8> = (0..(rows * cols).min(1 << 18))
        .flat_map(|_| half_bits(random.normal() * spread).to_le_bytes())
        .collect();
    let bytes: Vec<u8> = block.iter().copied().cycle().take(rows * cols * 2).collect();
    HostMatrix { dtype: DType::BF16, rows, cols, row_stride: cols, bytes: bytes.into() }
}

/// The upper half of a float's bits.
fn half_bits(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

/// A buffer of random values.
pub(crate) fn buffer(
    backend: &mut CudaBackend,
    random: &mut Random,
    (rows, width): (usize, usize),
    dtype: DType,
) -> Result<CudaBuffer, BackendError> {
    let table = backend.linear(&[matrix(random, rows, width, 1.0)], DType::BF16)?;
    let mut buffer = backend.buffer(rows, width, dtype)?;
    backend.begin_step(&decode_step(rows))?;
    backend.embed(&table, 0, &mut buffer)?;
    backend.read(&buffer)?;
    Ok(buffer)
}
