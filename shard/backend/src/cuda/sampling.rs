//! From logits to tokens.
//!
//! The device chooses, and writes what it chose where the host reads it; what is rare (typical-p, many of the best tokens,
//! histories that do not fit) is left to the sampling of the CPU backend, with the row copied to the host. Both draw the same
//! random numbers.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::driver::{Context, DeviceMemory, DevicePtr, PinnedMemory};
use super::launch::{Launch, Queue, args};
use super::module::{Function, Module};
use super::{CudaBuffer, DeviceFacts};
use crate::cpu::sampling::Sampler;
use crate::cpu::sampling::random::uniform;
use crate::sampling::{Sampled, SamplingParams, SamplingRow};
use crate::{BackendError, DType};

/// Rows of a launch; more are chosen one group after the other.
const MAX_ROWS: usize = 1024;
/// Ids of histories of a launch; rows that do not fit are left to the host.
const MAX_HISTORY: usize = 1 << 20;
/// As in `sampling.cu`: elements of a part of a row, for the best token and for penalties, and their threads.
const PART_ELEMENTS: usize = 4096;
const PART_THREADS: u32 = 256;
const PENALTY_ELEMENTS: usize = 8192;
const PENALTY_THREADS: u32 = 512;
const CHOOSE_THREADS: u32 = 1024;
/// Blocks that choose a row's token together where there are few rows.
const CLUSTER: usize = 8;
/// Bytes of a part's result.
const PART_BYTES: usize = 16;
/// Places for the best tokens of a row.
const MAX_TOP: usize = 16;
/// Requests for more than so many of the best tokens are left to the host: the device looks at the row once for each.
const MOST_TOP: u32 = 8;

/// How a row is chosen from, as `sampling.cu` has it.
#[derive(Debug, Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct Request {
    uniform: f64,
    row: i32,
    is_greedy: i32,
    temperature: f32,
    top_k: i32,
    top_p: f32,
    top_n: i32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    history: i32,
    history_len: i32,
}

/// What was found for a row, as `sampling.cu` has it.
#[derive(Debug, Clone, Copy, Zeroable, Pod)]
#[repr(C)]
struct Answer {
    id: i32,
    logprob: f32,
    num_top: i32,
    unused: i32,
    top_ids: [i32; MAX_TOP],
    top_logprobs: [f32; MAX_TOP],
}

/// Where the parts of what goes to the device begin, in bytes: the requests, those of rows with penalties first, the rows whose
/// best is wanted or the targets, and the histories.
const ROWS_AT: usize = 2 * MAX_ROWS * size_of::<Request>();
const HISTORY_AT: usize = ROWS_AT + MAX_ROWS * size_of::<i32>();
const INPUT_BYTES: usize = HISTORY_AT + MAX_HISTORY * size_of::<u32>();

/// What is to be done with a group of rows.
#[derive(Debug, Default)]
struct Work {
    /// Rows whose best token is wanted and nothing else.
    greedy: Vec<i32>,
    /// Requests of rows with penalties, and of rows that one block each chooses from.
    penalized: Vec<Request>,
    requests: Vec<Request>,
    /// Ids of the histories of `penalized`.
    history_len: usize,
    /// Rows that the host chooses from.
    on_host: Vec<usize>,
}

/// Kernels and memory for them.
pub(super) struct Samplers {
    best_of_rows: Function,
    penalize: Function,
    choose_tokens: Function,
    /// The same by clusters of blocks, and the most rows that have room for theirs at once.
    choose_in_clusters: (Function, usize),
    /// See [`ROWS_AT`].
    staging: PinnedMemory,
    inputs: DeviceMemory,
    /// `[MAX_ROWS]` answers.
    answers: PinnedMemory,
    /// `[MAX_ROWS]`: blocks of a row that are done; zero between launches.
    arrived: DeviceMemory,
    work: Work,
    /// Made when it is first needed.
    on_host: Option<Sampler>,
}

fn has_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0
}

impl Work {
    /// Sorts out rows `first..` of a step, `rows` of them.
    fn plan(&mut self, rows: &[SamplingRow<'_>], vocab: usize) {
        self.greedy.clear();
        self.penalized.clear();
        self.requests.clear();
        self.history_len = 0;
        self.on_host.clear();
        for (index, row) in rows.iter().enumerate() {
            let params = row.params;
            let is_greedy = params.is_greedy();
            let is_penalized = has_penalties(params) && !row.history.is_empty();
            let history_fits = !is_penalized || self.history_len + row.history.len() <= MAX_HISTORY;
            if params.typical_p < 1.0 || row.top_n > MOST_TOP || !history_fits {
                self.on_host.push(index);
                continue;
            }
            let mut request = Request {
                uniform: if is_greedy { 0.0 } else { uniform(params.seed, row.history.len() as u64) },
                row: index as i32,
                is_greedy: i32::from(is_greedy),
                temperature: params.temperature,
                top_k: params.top_k.min(vocab as u32) as i32,
                top_p: params.top_p,
                top_n: row.top_n as i32,
                repetition_penalty: params.repetition_penalty,
                frequency_penalty: params.frequency_penalty,
                history: 0,
                history_len: 0,
            };
            if is_penalized {
                request.history = self.history_len as i32;
                request.history_len = row.history.len() as i32;
                self.history_len += row.history.len();
                self.penalized.push(request);
            }
            if is_greedy && row.top_n == 0 {
                self.greedy.push(index as i32);
            } else {
                self.requests.push(request);
            }
        }
    }
}

impl Samplers {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        let module = Module::load(context, "sampling")?;
        let clustered = module.function("choose_tokens_in_clusters")?;
        let clusters = if clustered.is_for_hopper_or_later()? { facts.num_sms / CLUSTER } else { 0 };
        Ok(Self {
            best_of_rows: module.function("best_of_rows")?,
            penalize: module.function("penalize")?,
            choose_tokens: module.function("choose_tokens")?,
            choose_in_clusters: (clustered, clusters),
            staging: PinnedMemory::new(context, INPUT_BYTES, "sampling requests")?,
            inputs: DeviceMemory::new(context, INPUT_BYTES, "sampling requests")?,
            answers: PinnedMemory::new(context, MAX_ROWS * size_of::<Answer>(), "sampled tokens")?,
            arrived: DeviceMemory::zeroed(context, MAX_ROWS * size_of::<u32>(), "sampling")?,
            work: Work::default(),
            on_host: None,
        })
    }

    /// Chooses a token a row. Waits for the device.
    pub(super) fn sample(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        logits: &mut CudaBuffer,
        rows: &[SamplingRow<'_>],
    ) -> Result<Vec<Sampled>, BackendError> {
        assert_eq!(logits.rows(), rows.len(), "each row of logits needs its parameters");
        let mut sampled = vec![Sampled::default(); rows.len()];
        let vocab = logits.width();
        for first in (0..rows.len()).step_by(MAX_ROWS) {
            let group = first..rows.len().min(first + MAX_ROWS);
            let from = logits.ptr() + (first * vocab * size_of::<f32>()) as DevicePtr;
            self.sample_group(
                (queue, workspace),
                (logits_of(logits), from),
                &rows[group.clone()],
                &mut sampled[group],
            )?;
        }
        Ok(sampled)
    }

    fn sample_group(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        (vocab, logits): (usize, DevicePtr),
        rows: &[SamplingRow<'_>],
        sampled: &mut [Sampled],
    ) -> Result<(), BackendError> {
        let mut work = std::mem::take(&mut self.work);
        work.plan(rows, vocab);
        let result = self.run(&work, (queue, workspace), (vocab, logits), rows, sampled);
        self.work = work;
        result
    }

    fn run(
        &mut self,
        work: &Work,
        (queue, workspace): (&Queue, &DeviceMemory),
        (vocab, logits): (usize, DevicePtr),
        rows: &[SamplingRow<'_>],
        sampled: &mut [Sampled],
    ) -> Result<(), BackendError> {
        let is_all_greedy = work.greedy.len() == rows.len();
        if !work.penalized.is_empty()
            || !work.requests.is_empty()
            || !is_all_greedy && !work.greedy.is_empty()
        {
            self.upload(work, rows, queue)?;
        }
        let (inputs, width) = (self.inputs.ptr(), vocab as i32);
        if !work.penalized.is_empty() {
            let launch = Launch {
                function: self.penalize,
                grid: [vocab.div_ceil(PENALTY_ELEMENTS) as u32, work.penalized.len() as u32, 1],
                block: PENALTY_THREADS,
                shared_bytes: 0,
            };
            let history = inputs + HISTORY_AT as DevicePtr;
            queue.launch(&launch, args![logits, width, inputs, history])?;
        }
        if !work.greedy.is_empty() {
            let list = if is_all_greedy { 0 } else { inputs + ROWS_AT as DevicePtr };
            self.launch_best((queue, workspace), (vocab, logits), (list, 0), work.greedy.len())?;
        }
        if !work.requests.is_empty() {
            let count = work.requests.len();
            let (clustered, most) = self.choose_in_clusters;
            let (function, blocks) =
                if count <= most { (clustered, count * CLUSTER) } else { (self.choose_tokens, count) };
            let launch =
                Launch { function, grid: [blocks as u32, 1, 1], block: CHOOSE_THREADS, shared_bytes: 0 };
            let requests = inputs + (work.penalized.len() * size_of::<Request>()) as DevicePtr;
            let answers = self.answers.ptr() + (work.greedy.len() * size_of::<Answer>()) as DevicePtr;
            queue.launch(&launch, args![logits, width, requests, answers])?;
        }
        queue.wait()?;
        let mut unfinished = Vec::new();
        let indices = work.greedy.iter().copied().chain(work.requests.iter().map(|request| request.row));
        for (answer, index) in self.answers().iter().zip(indices) {
            let index = index as usize;
            if answer.num_top as usize > MAX_TOP {
                unfinished.push(index);
            }
            sampled[index] = answer.sampled();
        }
        for &index in &work.on_host {
            sampled[index] = self.sample_on_host(queue, (vocab, logits), index, &rows[index])?;
        }
        for index in unfinished {
            // More ties than places. Penalties and temperature have been applied to the row on the device.
            let params = SamplingParams {
                do_sample: !rows[index].params.is_greedy(),
                temperature: 1.0,
                repetition_penalty: 1.0,
                frequency_penalty: 0.0,
                ..rows[index].params.clone()
            };
            let row = SamplingRow { params: &params, ..rows[index] };
            sampled[index] = self.sample_on_host(queue, (vocab, logits), index, &row)?;
        }
        Ok(())
    }

    /// Puts requests, rows and histories on the device.
    fn upload(&mut self, work: &Work, rows: &[SamplingRow<'_>], queue: &Queue) -> Result<(), BackendError> {
        let staging = self.staging.as_mut_slice();
        let size = size_of::<Request>();
        let (penalized, requests) = (work.penalized.len(), work.requests.len());
        staging[..penalized * size].copy_from_slice(bytemuck::cast_slice(&work.penalized));
        staging[penalized * size..(penalized + requests) * size]
            .copy_from_slice(bytemuck::cast_slice(&work.requests));
        let greedy = size_of_val(work.greedy.as_slice());
        staging[ROWS_AT..ROWS_AT + greedy].copy_from_slice(bytemuck::cast_slice(&work.greedy));
        let history = work.history_len * size_of::<u32>();
        let mut place = &mut staging[HISTORY_AT..HISTORY_AT + history];
        for request in &work.penalized {
            let bytes: &[u8] = bytemuck::cast_slice(rows[request.row as usize].history);
            let (own, rest) = place.split_at_mut(bytes.len());
            own.copy_from_slice(bytes);
            place = rest;
        }
        // The requests, and all else where there is any: each copy is a call.
        let end = match (history, greedy) {
            (0, 0) => requests * size,
            (0, _) => ROWS_AT + greedy,
            _ => HISTORY_AT + history,
        };
        queue.stream().upload(self.inputs.ptr(), &staging[..end])
    }

    /// The best token of each row, or the log-probability of its target. Answers are in the order of the rows.
    fn launch_best(
        &self,
        (queue, workspace): (&Queue, &DeviceMemory),
        (vocab, logits): (usize, DevicePtr),
        (rows, targets): (DevicePtr, DevicePtr),
        count: usize,
    ) -> Result<(), BackendError> {
        let parts = vocab.div_ceil(PART_ELEMENTS);
        assert!(
            count * parts * PART_BYTES <= workspace.bytes(),
            "{count} rows of {vocab} logits are too many for the workspace"
        );
        let launch = Launch {
            function: self.best_of_rows,
            grid: [parts as u32, count as u32, 1],
            block: PART_THREADS,
            shared_bytes: 0,
        };
        let (arrived, answers) = (self.arrived.ptr(), self.answers.ptr());
        let width = vocab as i32;
        queue.launch(&launch, args![logits, width, rows, targets, workspace.ptr(), arrived, answers])
    }

    fn answers(&self) -> &[Answer] {
        bytemuck::cast_slice(self.answers.as_slice())
    }

    /// Copies a row and chooses from it here.
    fn sample_on_host(
        &mut self,
        queue: &Queue,
        (vocab, logits): (usize, DevicePtr),
        index: usize,
        row: &SamplingRow<'_>,
    ) -> Result<Sampled, BackendError> {
        let mut values = vec![0.0_f32; vocab];
        let from = logits + (index * vocab * size_of::<f32>()) as DevicePtr;
        queue.stream().download(bytemuck::cast_slice_mut(&mut values), from)?;
        queue.wait()?;
        Ok(self.on_host.get_or_insert_with(Sampler::of_this_processor).sample(&mut values, row))
    }

    /// `log_softmax(logits[i])[targets[i]]`. Waits for the device.
    pub(super) fn token_logprobs(
        &mut self,
        (queue, workspace): (&Queue, &DeviceMemory),
        logits: &CudaBuffer,
        targets: &[u32],
    ) -> Result<Vec<f32>, BackendError> {
        assert_eq!(logits.rows(), targets.len(), "each row of logits needs its target");
        let vocab = logits_of(logits);
        assert!(
            targets.iter().all(|&target| (target as usize) < vocab),
            "a target beyond {vocab} logits: {targets:?}"
        );
        let mut logprobs = Vec::with_capacity(targets.len());
        for (index, part) in targets.chunks(MAX_ROWS).enumerate() {
            let from = logits.ptr() + (index * MAX_ROWS * vocab * size_of::<f32>()) as DevicePtr;
            let bytes = size_of_val(part);
            let staging = &mut self.staging.as_mut_slice()[..bytes];
            staging.copy_from_slice(bytemuck::cast_slice(part));
            queue.stream().upload(self.inputs.ptr(), staging)?;
            self.launch_best((queue, workspace), (vocab, from), (0, self.inputs.ptr()), part.len())?;
            queue.wait()?;
            logprobs.extend(self.answers()[..part.len()].iter().map(|answer| answer.logprob));
        }
        Ok(logprobs)
    }
}

/// Logits of a row.
fn logits_of(logits: &CudaBuffer) -> usize {
    assert_eq!(logits.dtype(), DType::F32, "logits are float32");
    logits.width()
}

impl Answer {
    fn sampled(&self) -> Sampled {
        let count = (self.num_top.max(0) as usize).min(MAX_TOP);
        let top = self.top_ids.iter().zip(&self.top_logprobs).take(count);
        Sampled {
            id: self.id as u32,
            logprob: self.logprob,
            top: top.map(|(&id, &logprob)| (id as u32, logprob)).collect(),
        }
    }
}
