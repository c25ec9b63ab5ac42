//! How long the steps of a model take on a GPU, beside what the hardware allows.
//!
//!     cargo run --release -p models --features cuda --example step_bench -- MODEL_DIR [--context N] [--steps N] [--decode 1,8,32] [--prefill 1x128,8x2048] [--deterministic] [--launch-by-launch] [--json FILE]
//!         [--quantize fp8] [--kv-cache-dtype fp8_e4m3fn|fp8_e5m2]
//!         [--rank R/N --rendezvous SOCKET [--rank-path auto|peers|nccl|host]]
//!
//! With `--rank` it is one of N processes that share a model, each with a device of its own (CUDA_VISIBLE_DEVICES); the floor is then
//! that of an N-th of the bytes and FLOPs. A step is everything the engine does with a model: inputs up, all layers, logits, a token chosen for each sequence and
//! brought back, with the share of the time in which the device waited between two of them (by its own clock). Floor: the bytes it must read (weights, and the keys and values of the context) over the read bandwidth, or
//! its FLOPs over the matrix rate, whichever is longer; both are measured in the same run. The matrix rate is that of a burst of
//! 15 ms; a prompt's sustained floor takes the rate that the device can keep for 0.3 s, which its power limits. Medians.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::error::Error;
use std::time::{Duration, Instant};

use backend::collectives::shm::{Rendezvous, join};
use backend::cuda::{Ceilings, CudaBackend, CudaOptions, MatrixRate, RankPath, StepTime};
use backend::sampling::{SamplingParams, SamplingRow};
use backend::{Backend, DType, KvDType, StepInput};
use models::spec::{DecoderSpec, ExpectedTensor, MixerSpec};
use models::{CausalLm, Decoder, LoadOptions, Quantize, decoder_spec, load};

type Failure = Box<dyn Error + Send + Sync>;

const USAGE: &str = "usage: step_bench MODEL_DIR [--context N] [--steps N] [--decode 1,8,32] [--prefill 1x128,8x2048] [--deterministic] [--launch-by-launch] [--json FILE] [--quantize fp8] [--kv-cache-dtype fp8_e4m3fn|fp8_e5m2] [--rank R/N --rendezvous SOCKET [--rank-path auto|peers|nccl|host]]";
const BLOCK_SIZE: usize = 16;
/// Decode steps that are not counted.
const WARM_STEPS: usize = 4;
const GREEDY: SamplingParams = SamplingParams {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    typical_p: 1.0,
    do_sample: false,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
};

struct Arguments {
    model: String,
    context: usize,
    steps: usize,
    decode: Vec<usize>,
    prefill: Vec<(usize, usize)>,
    /// Batch-invariant arithmetic.
    is_deterministic: bool,
    /// No step is merged into one launch.
    is_launch_by_launch: bool,
    json: Option<String>,
    quantize: Option<Quantize>,
    kv_dtype: Option<KvDType>,
    /// This rank, of how many.
    rank: (usize, usize),
    rendezvous: String,
    rank_path: RankPath,
}

fn main() -> Result<(), Failure> {
    let arguments = parse_arguments()?;
    let communicator = join(&Rendezvous {
        socket: arguments.rendezvous.clone().into(),
        rank: arguments.rank.0,
        world_size: arguments.rank.1,
        fingerprint: "step_bench".to_owned(),
        timeout: Duration::from_secs(60),
    })?;
    let begin = Instant::now();
    let options = CudaOptions {
        is_deterministic: arguments.is_deterministic,
        merges_steps: !arguments.is_launch_by_launch,
        rank_path: arguments.rank_path,
        ..CudaOptions::default()
    };
    let mut backend = CudaBackend::new(options, Box::new(communicator))?;
    let opened = begin.elapsed().as_secs_f64();
    let ceilings = backend.measure_ceilings()?;
    println!(
        "{}: reads {:.0} GB/s, multiplies {:.0} TFLOP/s in bf16 ({:.0} for 0.3 s), {:.0} ({:.0}) in fp8; opened in {opened:.2} s",
        backend.device().description,
        ceilings.read_bytes_per_second / 1e9,
        ceilings.bf16.burst / 1e12,
        ceilings.bf16.sustained / 1e12,
        ceilings.fp8.map_or(0.0, |rate| rate.burst) / 1e12,
        ceilings.fp8.map_or(0.0, |rate| rate.sustained) / 1e12
    );
    let model = hub::ModelRef { model_id: arguments.model.clone(), revision: None };
    let files = hub::locate(&model, &hub::HubOptions::default())?;
    let begin = Instant::now();
    let (quantize, kv_dtype) = (arguments.quantize, arguments.kv_dtype);
    let options =
        LoadOptions { max_rows_sampled: 256, threads: 8, quantize, kv_dtype, ..LoadOptions::default() };
    let mut decoder = load(backend, &files, &options)?;
    let spec = decoder_spec(&files.config()?)?;
    let work = Work::new(&spec, decoder.info().dtype, quantize, &ceilings).shared_by(arguments.rank.1);
    println!("loaded in {:.2} s", begin.elapsed().as_secs_f64());
    let largest = arguments.decode.iter().map(|batch| batch * (arguments.context + arguments.steps + 16));
    let prompts = arguments.prefill.iter().map(|(count, len)| count * len);
    let tokens = largest.chain(prompts).max().unwrap_or(0) + 1024 * BLOCK_SIZE;
    decoder.allocate_kv_cache(tokens.div_ceil(BLOCK_SIZE) + 1)?;
    let mut results = Vec::new();
    for &batch in &arguments.decode {
        results.push(decode(&mut decoder, batch, &arguments, (&ceilings, &work))?);
    }
    for &(count, len) in &arguments.prefill {
        results.push(prefill(&mut decoder, (count, len), (&ceilings, &work))?);
    }
    if let Some(path) = &arguments.json {
        let report = serde_json::json!({
            "device": decoder.backend().device().description,
            "model": arguments.model,
            "context": arguments.context,
            "read_bytes_per_second": ceilings.read_bytes_per_second,
            "bf16_flops": ceilings.bf16.burst,
            "bf16_sustained_flops": ceilings.bf16.sustained,
            "fp8_flops": ceilings.fp8.map(|rate| rate.burst),
            "fp8_sustained_flops": ceilings.fp8.map(|rate| rate.sustained),
            "quantize": arguments.quantize.map(Quantize::name),
            "kv_cache_dtype": arguments.kv_dtype.map(KvDType::name),
            "ranks": arguments.rank.1,
            "results": results,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}

/// Decode steps of `batch` sequences with `context` tokens each.
fn decode(
    decoder: &mut Decoder<CudaBackend>,
    batch: usize,
    arguments: &Arguments,
    (ceilings, work): (&Ceilings, &Work),
) -> Result<serde_json::Value, Failure> {
    let (context, vocab_size) = (arguments.context, decoder.info().vocab_size);
    let blocks = (context + arguments.steps + 8).div_ceil(BLOCK_SIZE);
    let mut ids: Vec<u32> = (0..batch).map(|seq| ((seq * 7919 + 11) % vocab_size) as u32).collect();
    let history: Vec<u32> = vec![1; context];
    let mut seconds = Vec::new();
    for index in 0..arguments.steps + WARM_STEPS {
        let step = decode_step(&ids, context + index, blocks);
        let rows = vec![SamplingRow { params: &GREEDY, history: &history, top_n: 0 }; batch];
        // The first steps prepare and record.
        if index == WARM_STEPS {
            decoder.backend_mut().watch_steps();
        }
        let begin = Instant::now();
        decoder.forward(&step)?;
        let sampled = decoder.sample(&rows)?;
        let taken = begin.elapsed().as_secs_f64();
        if index >= WARM_STEPS {
            seconds.push(taken);
        }
        ids = sampled.iter().map(|token| token.id).collect();
    }
    let median = median(&mut seconds);
    let idle = idle_share(&decoder.backend_mut().step_times()?);
    let kv_bytes = batch * (context + arguments.steps / 2) * decoder.info().block_bytes / BLOCK_SIZE;
    let floor = (work.weight_bytes + kv_bytes) as f64 / ceilings.read_bytes_per_second;
    println!(
        "decode batch {batch:>4}: {:.3} ms, floor {:.3} ms: {:.3} x; {:.0} tokens/s; idle {:.1} %",
        median * 1e3,
        floor * 1e3,
        median / floor,
        batch as f64 / median,
        idle * 100.0
    );
    Ok(serde_json::json!({"what": "decode", "batch": batch, "ms": median * 1e3, "floor_ms": floor * 1e3,
        "ratio": median / floor, "idle_share": idle, "runs_ms": seconds.iter().map(|s| s * 1e3).collect::<Vec<_>>()}))
}

fn decode_step(ids: &[u32], position: usize, blocks: usize) -> StepInput {
    let batch = ids.len();
    // Block 0 is reserved.
    let block = |seq: usize, index: usize| (1 + seq * blocks + index) as u32;
    StepInput {
        input_ids: ids.to_vec(),
        position_ids: vec![position as u32; batch],
        slot_mapping: (0..batch)
            .map(|seq| block(seq, position / BLOCK_SIZE) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32)
            .collect(),
        cu_seqlens_q: (0..=batch as u32).collect(),
        context_lens: vec![position as u32 + 1; batch],
        prompt_lens: vec![position as u32; batch],
        block_tables: (0..batch).flat_map(|seq| (0..blocks).map(move |index| block(seq, index))).collect(),
        max_blocks: blocks,
        logits_rows: (0..batch as u32).collect(),
    }
}

/// Prompts of `len` tokens, `count` of them, in as many steps as they need.
fn prefill(
    decoder: &mut Decoder<CudaBackend>,
    (count, len): (usize, usize),
    (ceilings, work): (&Ceilings, &Work),
) -> Result<serde_json::Value, Failure> {
    let max_step_tokens = decoder.info().max_step_tokens;
    let blocks = len.div_ceil(BLOCK_SIZE);
    let together = (max_step_tokens / len).clamp(1, count);
    let history: Vec<u32> = vec![1; len];
    let mut seconds = Vec::new();
    for run in 0..8 {
        let begin = Instant::now();
        for first in (0..count).step_by(together) {
            let seqs = first..(first + together).min(count);
            let step = prefill_step(seqs.clone(), len, blocks, decoder.info().vocab_size, run);
            decoder.forward(&step)?;
            decoder
                .sample(&vec![SamplingRow { params: &GREEDY, history: &history, top_n: 0 }; seqs.len()])?;
        }
        if run >= 3 {
            seconds.push(begin.elapsed().as_secs_f64());
        }
    }
    let median = median(&mut seconds);
    // Half of the pairs of tokens count: a token sees none after it.
    let attention = count as f64 * 2.0 * (len * len) as f64 * work.attention_width as f64;
    let flops = (count * len) as f64 * work.flops_a_token + attention;
    let floor_at = |rate: f64| (flops / rate).max(work.weight_bytes as f64 / ceilings.read_bytes_per_second);
    let (floor, sustained) = (floor_at(work.rate.burst), floor_at(work.rate.sustained));
    println!(
        "prefill {count:>3} x {len:>5}: {:.2} ms, floor {:.2} ms: {:.3} x; sustained floor {:.2} ms: {:.3} x; {:.0} tokens/s",
        median * 1e3,
        floor * 1e3,
        median / floor,
        sustained * 1e3,
        median / sustained,
        (count * len) as f64 / median
    );
    Ok(
        serde_json::json!({"what": "prefill", "prompts": count, "tokens": len, "ms": median * 1e3, "floor_ms": floor * 1e3,
        "ratio": median / floor, "sustained_floor_ms": sustained * 1e3, "sustained_ratio": median / sustained,
        "runs_ms": seconds.iter().map(|s| s * 1e3).collect::<Vec<_>>()}),
    )
}

fn prefill_step(
    seqs: std::ops::Range<usize>,
    len: usize,
    blocks: usize,
    vocab_size: usize,
    run: usize,
) -> StepInput {
    let count = seqs.len();
    let block = |seq: usize, index: usize| (1 + seq * blocks + index) as u32;
    let all = || seqs.clone().flat_map(|seq| (0..len).map(move |position| (seq, position)));
    StepInput {
        input_ids: all()
            .map(|(seq, position)| ((seq * 104_729 + position * 7919 + run * 31) % vocab_size) as u32)
            .collect(),
        position_ids: all().map(|(_, position)| position as u32).collect(),
        slot_mapping: all()
            .map(|(seq, position)| {
                block(seq, position / BLOCK_SIZE) * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
            })
            .collect(),
        cu_seqlens_q: (0..=count).map(|seq| (seq * len) as u32).collect(),
        context_lens: vec![len as u32; count],
        prompt_lens: vec![len as u32; count],
        block_tables: seqs.clone().flat_map(|seq| (0..blocks).map(move |index| block(seq, index))).collect(),
        max_blocks: blocks,
        logits_rows: (1..=count).map(|seq| (seq * len - 1) as u32).collect(),
    }
}

/// What a step of the model has to read and to compute.
struct Work {
    /// Bytes that a decode step reads of the weights: all matrices but the embedding, which is a look-up.
    weight_bytes: usize,
    /// FLOPs of a prompt's token in matrix products; logits are computed for few tokens.
    flops_a_token: f64,
    /// Of matrix products with such weights.
    rate: MatrixRate,
    /// Elements of all query heads of all layers: 4 FLOPs each for every pair of tokens.
    attention_width: usize,
}

impl Work {
    /// Quantized weights have eight bits, the logits' matrix aside.
    fn new(spec: &DecoderSpec, dtype: DType, quantize: Option<Quantize>, ceilings: &Ceilings) -> Self {
        let is_layers =
            |tensor: &&ExpectedTensor| tensor.shape.len() > 1 && tensor.shape[0] != spec.vocab_size;
        let elements: usize = spec
            .tensors()
            .iter()
            .filter(is_layers)
            .map(|tensor| tensor.shape.iter().product::<usize>())
            .sum();
        let attention_width = spec
            .layers
            .iter()
            .map(|layer| match &layer.mixer {
                MixerSpec::Attention(attention) => attention.num_heads * attention.head_dim,
                MixerSpec::LatentAttention(_) => 0,
            })
            .sum();
        let (bytes, rate) = match quantize {
            Some(_) => (1, ceilings.fp8.unwrap_or(ceilings.bf16)),
            None => (dtype.size_bytes(), ceilings.bf16),
        };
        Self {
            weight_bytes: elements * bytes + spec.vocab_size * spec.hidden_size * dtype.size_bytes(),
            rate,
            flops_a_token: 2.0 * elements as f64,
            attention_width,
        }
    }

    /// One rank's part of it.
    fn shared_by(self, ranks: usize) -> Self {
        Self {
            weight_bytes: self.weight_bytes / ranks,
            flops_a_token: self.flops_a_token / ranks as f64,
            attention_width: self.attention_width / ranks,
            ..self
        }
    }
}

/// The share of their time in which the device had nothing to do, in the median of the steps.
fn idle_share(steps: &[StepTime]) -> f64 {
    let mut shares: Vec<f64> = steps.iter().skip(1).map(|step| step.idle / (step.idle + step.busy)).collect();
    median(&mut shares)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn parse_arguments() -> Result<Arguments, Failure> {
    let mut arguments = Arguments {
        model: String::new(),
        context: 1024,
        steps: 40,
        decode: vec![1, 8, 32, 128],
        prefill: vec![(1, 128), (1, 1024), (1, 4096), (8, 2048)],
        is_deterministic: false,
        is_launch_by_launch: false,
        json: None,
        quantize: None,
        kv_dtype: None,
        rank: (0, 1),
        rendezvous: String::new(),
        rank_path: RankPath::Auto,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            arguments.model = word;
            continue;
        }
        if word == "--deterministic" {
            arguments.is_deterministic = true;
            continue;
        }
        if word == "--launch-by-launch" {
            arguments.is_launch_by_launch = true;
            continue;
        }
        let value = words.next().ok_or(USAGE)?;
        let items = || value.split(',').filter(|item| !item.is_empty());
        match word.as_str() {
            "--context" => arguments.context = value.parse()?,
            "--steps" => arguments.steps = value.parse::<usize>()?.max(1),
            "--decode" => arguments.decode = items().map(str::parse).collect::<Result<_, _>>()?,
            "--prefill" => {
                arguments.prefill = items()
                    .map(|item| {
                        let (count, len) = item.split_once('x').ok_or(USAGE)?;
                        Ok::<_, Failure>((count.parse()?, len.parse()?))
                    })
                    .collect::<Result<_, _>>()?;
            }
            "--quantize" => arguments.quantize = Some(Quantize::from_name(&value).ok_or(USAGE)?),
            "--kv-cache-dtype" => arguments.kv_dtype = Some(KvDType::from_fp8_name(&value).ok_or(USAGE)?),
            "--json" => arguments.json = Some(value),
            "--rank" => {
                let (rank, ranks) = value.split_once('/').ok_or(USAGE)?;
                arguments.rank = (rank.parse()?, ranks.parse::<usize>()?.max(1));
            }
            "--rendezvous" => arguments.rendezvous = value,
            "--rank-path" => arguments.rank_path = RankPath::from_name(&value).ok_or(USAGE)?,
            _ => return Err(USAGE.into()),
        }
    }
    if arguments.model.is_empty() { Err(USAGE.into()) } else { Ok(arguments) }
}
