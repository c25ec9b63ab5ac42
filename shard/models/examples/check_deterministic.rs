//! Checks on a GPU that batch-invariant arithmetic is what it says: the logits of a sequence have the same bits alone, in batches,
//! and in chunks.
//!
//!     cargo run --release -p models --features cuda --example check_deterministic -- MODEL_DIR [--sequences N] [--tokens N]
//!
//! Sequences of random prompts generate `--tokens` ids greedily, first each by itself, then in several other ways. Exit code 1
//! when a bit differs.

mod steps;

use std::error::Error;
use std::process::ExitCode;

use backend::collectives::Single;
use backend::cuda::{CudaBackend, CudaOptions};
use models::{CausalLm, Decoder, LoadOptions, load};
use steps::{BLOCK_SIZE, num_blocks, parts, step};

type Failure = Box<dyn Error + Send + Sync>;

/// Lengths of prompts, in turn.
const PROMPTS: [usize; 8] = [37, 1, 130, 300, 16, 513, 5, 64];

struct Arguments {
    model: String,
    sequences: usize,
    tokens: usize,
}

/// A prompt and what followed, with the bits of the logits that chose each token.
type Sequence = steps::Sequence<Vec<Vec<u32>>>;

fn main() -> Result<ExitCode, Failure> {
    let arguments = parse_arguments()?;
    let options = CudaOptions { is_deterministic: true, ..CudaOptions::default() };
    let backend = CudaBackend::new(options, Box::new(Single))?;
    let model = hub::ModelRef { model_id: arguments.model.clone(), revision: None };
    let files = hub::locate(&model, &hub::HubOptions::default())?;
    let options =
        LoadOptions { max_rows_sampled: 256, threads: 8, block_size: BLOCK_SIZE, ..LoadOptions::default() };
    let mut decoder = load(backend, &files, &options)?;
    let blocks = arguments.sequences * num_blocks(PROMPTS[5] + arguments.tokens) + 1;
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
            steps += found.kept.len();
            differing += alone.kept.iter().zip(&found.kept).filter(|(a, b)| a != b).count();
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
            Sequence::new(ids, arguments.tokens, &mut next_block, Vec::new())
        })
        .collect();
    for group in sequences.chunks_mut(batch) {
        loop {
            let parts = parts(group, chunk, decoder.info().max_step_tokens);
            if parts.is_empty() {
                break;
            }
            decoder.forward(&step(&parts))?;
            take_tokens(decoder, parts, arguments.tokens)?;
        }
    }
    Ok(sequences)
}

/// Reads the logits of sequences whose tokens are all cached, and appends the best token until there are `count`.
fn take_tokens(
    decoder: &mut Decoder<CudaBackend>,
    parts: Vec<(&mut Sequence, usize)>,
    count: usize,
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
        sequence.kept.push(logits.iter().map(|logit| logit.to_bits()).collect());
        sequence.ids.push(best as u32);
        sequence.is_done = sequence.kept.len() == count;
    }
    Ok(())
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
