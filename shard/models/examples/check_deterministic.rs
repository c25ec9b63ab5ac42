//! Checks on a GPU that batch-invariant arithmetic is what it says: the logits of a sequence have the same bits alone, in batches,
//! and in chunks.
//!
//!     cargo run --release -p models --features cuda --example check_deterministic -- MODEL_DIR [--sequences N] [--tokens N]
//!
//! Sequences of random prompts generate `--tokens` ids greedily, first each by itself, then in several other ways. Exit code 1
//! when a bit differs.

use std::error::Error;
use std::ops::Range;
use std::process::ExitCode;

use backend::StepInput;
use backend::collectives::Single;
use backend::cuda::{CudaBackend, CudaOptions};
use models::{CausalLm, Decoder, LoadOptions, load};

type Failure = Box<dyn Error + Send + Sync>;

const BLOCK_SIZE: usize = 16;
/// Lengths of prompts, in turn.
const PROMPTS: [usize; 8] = [37, 1, 130, 300, 16, 513, 5, 64];

struct Arguments {
    model: String,
    sequences: usize,
    tokens: usize,
}

/// A prompt and what followed.
struct Sequence {
    ids: Vec<u32>,
    prompt_len: usize,
    cached: usize,
    blocks: Range<u32>,
    /// Bits of the logits that chose each token.
    logits: Vec<Vec<u32>>,
}

fn main() -> Result<ExitCode, Failure> {
    let arguments = parse_arguments()?;
    let options = CudaOptions { is_deterministic: true, ..CudaOptions::default() };
    let backend = CudaBackend::new(options, Box::new(Single))?;
    let model = hub::ModelRef { model_id: arguments.model.clone(), revision: None };
    let files = hub::locate(&model, &hub::HubOptions::default())?;
    let options = LoadOptions { max_rows_sampled: 256, threads: 8, ..LoadOptions::default() };
    let mut decoder = load(backend, &files, &options)?;
    let blocks = arguments.sequences * (PROMPTS[5] + arguments.tokens).div_ceil(BLOCK_SIZE) + 1;
    decoder.allocate_kv_cache(blocks)?;
    let all = arguments.sequences;
    let alone = generate(&mut decoder, &arguments, 1, usize::MAX)?;
    let mut is_same = true;
    for (what, batch, chunk) in [
        ("alone again", 1, usize::MAX),
        ("alone in chunks of 7", 1, 7),
        ("8 at a time", 8, usize::MAX),
        ("8 at a time in chunks of 12", 8, 12),
        ("all at once", all, usize::MAX),
        ("all at once in chunks of 129", all, 129),
    ] {
        let found = generate(&mut decoder, &arguments, batch, chunk)?;
        let (mut differing, mut steps) = (0, 0);
        for (alone, found) in alone.iter().zip(&found) {
            steps += found.logits.len();
            differing += alone.logits.iter().zip(&found.logits).filter(|(a, b)| a != b).count();
        }
        eprintln!("{what}: {} of {steps} logits the same bits", steps - differing);
        is_same &= differing == 0 && steps == all * arguments.tokens;
    }
    Ok(if is_same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All sequences, `batch` at a time, whose prompts are computed in pieces of at most `chunk` tokens.
fn generate(
    decoder: &mut Decoder<CudaBackend>,
    arguments: &Arguments,
    batch: usize,
    chunk: usize,
) -> Result<Vec<Sequence>, Failure> {
    let vocab_size = decoder.info().vocab_size as u64;
    let mut random = 1_u64;
    let mut next_block = 1;
    let mut sequences: Vec<Sequence> = (0..arguments.sequences)
        .map(|index| {
            let prompt_len = PROMPTS[index % PROMPTS.len()];
            let mut next_id = || {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((random >> 33) % vocab_size) as u32
            };
            let ids = (0..prompt_len).map(|_| next_id()).collect();
            let len = (prompt_len + arguments.tokens).div_ceil(BLOCK_SIZE) as u32;
            let blocks = next_block..next_block + len;
            next_block += len;
            Sequence { ids, prompt_len, cached: 0, blocks, logits: Vec::new() }
        })
        .collect();
    for group in sequences.chunks_mut(batch) {
        loop {
            let mut room = decoder.info().max_step_tokens;
            let mut parts = Vec::new();
            for sequence in group.iter_mut().filter(|sequence| sequence.logits.len() < arguments.tokens) {
                let len = (sequence.ids.len() - sequence.cached).min(chunk).min(room);
                if len > 0 {
                    room -= len;
                    parts.push((sequence, len));
                }
            }
            if parts.is_empty() {
                break;
            }
            decoder.forward(&step(&parts))?;
            take_tokens(decoder, parts)?;
        }
    }
    Ok(sequences)
}

/// Reads the logits of sequences whose tokens are all cached, and appends the best token.
fn take_tokens(
    decoder: &mut Decoder<CudaBackend>,
    parts: Vec<(&mut Sequence, usize)>,
) -> Result<(), Failure> {
    let mut row = 0;
    for (sequence, len) in parts {
        row += len as u32;
        sequence.cached += len;
        if sequence.cached < sequence.ids.len() {
            continue;
        }
        let logits = decoder.read_logits(&[row - 1])?;
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(id, _)| id);
        sequence.logits.push(logits.iter().map(|logit| logit.to_bits()).collect());
        sequence.ids.push(best as u32);
    }
    Ok(())
}

fn step(parts: &[(&mut Sequence, usize)]) -> StepInput {
    let max_blocks = parts.iter().map(|(sequence, _)| sequence.blocks.len()).max().unwrap_or(0);
    let mut step = StepInput { cu_seqlens_q: vec![0], max_blocks, ..StepInput::default() };
    for (sequence, len) in parts {
        let end = sequence.cached + len;
        step.input_ids.extend_from_slice(&sequence.ids[sequence.cached..end]);
        step.position_ids.extend(sequence.cached as u32..end as u32);
        step.slot_mapping.extend((sequence.cached..end).map(|position| {
            let block = sequence.blocks.start + (position / BLOCK_SIZE) as u32;
            block * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
        }));
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(end as u32);
        step.prompt_lens.push(sequence.prompt_len as u32);
        step.block_tables.extend(sequence.blocks.clone());
        step.block_tables.resize(step.context_lens.len() * max_blocks, 0);
        if end == sequence.ids.len() {
            step.logits_rows.push(step.input_ids.len() as u32 - 1);
        }
    }
    step
}

fn parse_arguments() -> Result<Arguments, Failure> {
    let usage = "usage: check_deterministic MODEL_DIR [--sequences N] [--tokens N]";
    let mut arguments = Arguments { model: String::new(), sequences: 24, tokens: 8 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> Result<usize, Failure> { Ok(words.next().ok_or(usage)?.parse()?) };
        match word.as_str() {
            "--sequences" => arguments.sequences = number()?,
            "--tokens" => arguments.tokens = number()?,
            _ if arguments.model.is_empty() => arguments.model = word,
            _ => return Err(usage.into()),
        }
    }
    if arguments.model.is_empty() { Err(usage.into()) } else { Ok(arguments) }
}
