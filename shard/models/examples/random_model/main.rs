//! Makes a model of random weights in a real architecture: speed needs shapes, not knowledge.
//!
//!     cargo run --release -p models --example random_model -- CONFIG.json OUT_DIR [--dtype bfloat16|float16|float32] [--threads N] [--layers N]
//!
//! OUT_DIR gets config.json, model.safetensors (weights about normal with standard deviation 0.02, norms 1, the same for
//! the same configuration) and a tokenizer in which `t17` is the token 17, so that a prompt of any length can be written down.
//! `config.json` of Llama 3.1 8B and Llama 3.2 1B lie beside this file.

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use backend::DType;
use hub::ModelConfig;
use memmap2::MmapMut;
use models::decoder_spec;
use models::spec::ExpectedTensor;

type Failure = Box<dyn Error + Send + Sync>;

const USAGE: &str =
    "usage: random_model CONFIG.json OUT_DIR [--dtype bfloat16|float16|float32] [--threads N] [--layers N]";
/// Standard deviation of the weights.
const DEVIATION: f32 = 0.02;
/// Elements that one piece of work fills, with numbers of its own.
const PIECE: usize = 1 << 20;

fn main() -> Result<(), Failure> {
    let mut positional = Vec::new();
    let (mut dtype, mut threads, mut layers) = (DType::BF16, 16, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            positional.push(PathBuf::from(word));
            continue;
        }
        let value = words.next().ok_or(USAGE)?;
        match word.as_str() {
            "--dtype" => dtype = DType::from_name(&value).ok_or(USAGE)?,
            "--threads" => threads = value.parse::<usize>()?.max(1),
            "--layers" => layers = Some(value.parse::<u64>()?),
            _ => return Err(USAGE.into()),
        }
    }
    let [config, out] = <[PathBuf; 2]>::try_from(positional).map_err(|_| USAGE)?;
    fs::create_dir_all(&out)?;
    let config_path = write_config(&config, &out, layers)?;
    let spec = decoder_spec(&ModelConfig::from_file(&config_path)?)?;
    let begin = Instant::now();
    let bytes = write_weights(&spec.tensors(), dtype, threads, &out.join("model.safetensors"))?;
    write_tokenizer(spec.vocab_size, &out)?;
    eprintln!("{} MB of {dtype} weights in {:.1} s", bytes / 1_000_000, begin.elapsed().as_secs_f64());
    Ok(())
}

/// Copies the configuration, with another number of layers where that is asked for.
fn write_config(from: &Path, out: &Path, layers: Option<u64>) -> Result<PathBuf, Failure> {
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(from)?)?;
    if let Some(layers) = layers {
        config["num_hidden_layers"] = layers.into();
    }
    let path = out.join("config.json");
    fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
    Ok(path)
}

/// Writes one safetensors file; answers its size.
fn write_weights(
    tensors: &[ExpectedTensor],
    dtype: DType,
    threads: usize,
    path: &Path,
) -> Result<usize, Failure> {
    let name = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
    };
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.shape.iter().product::<usize>() * dtype.size_bytes();
        header.insert(
            tensor.name.clone(),
            serde_json::json!({"dtype": name, "shape": tensor.shape, "data_offsets": [begin, end]}),
        );
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let data = 8 + header.len();
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len((data + end) as u64)?;
    // SAFETY: nobody else has the file open; it was just made.
    let mut map = unsafe { MmapMut::map_mut(&file)? };
    map[..8].copy_from_slice(&(header.len() as u64).to_le_bytes());
    map[8..data].copy_from_slice(&header);
    let mut rest = &mut map[data..];
    let mut pieces = Vec::new();
    for tensor in tensors {
        let elements: usize = tensor.shape.iter().product();
        let (own, others) = rest.split_at_mut(elements * dtype.size_bytes());
        rest = others;
        // A vector is a norm's weight or a bias.
        let mean = if tensor.shape.len() == 1 && tensor.name.ends_with("weight") { 1.0 } else { 0.0 };
        pieces.extend(own.chunks_mut(PIECE * dtype.size_bytes()).map(|piece| (piece, mean)));
    }
    fill(pieces, dtype, threads);
    Ok(end)
}

/// Fills each piece with random numbers that depend on its place alone.
fn fill(pieces: Vec<(&mut [u8], f32)>, dtype: DType, threads: usize) {
    let mut shares: Vec<Vec<(usize, &mut [u8], f32)>> = (0..threads).map(|_| Vec::new()).collect();
    for (index, (piece, mean)) in pieces.into_iter().enumerate() {
        shares[index % threads].push((index, piece, mean));
    }
    std::thread::scope(|scope| {
        for share in shares {
            scope.spawn(move || {
                for (index, piece, mean) in share {
                    fill_piece(index as u64, piece, mean, dtype);
                }
            });
        }
    });
}

fn fill_piece(index: u64, piece: &mut [u8], mean: f32, dtype: DType) {
    let mut state = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x2545_F491_4F6C_DD1D;
    for element in piece.chunks_exact_mut(dtype.size_bytes()) {
        // The sum of four even 16-bit numbers is near enough to a normal one.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let parts = [state, state >> 16, state >> 32, state >> 48];
        let sum: f32 = parts.iter().map(|part| (part & 0xFFFF) as f32).sum();
        let value = mean + (sum / 65_536.0 - 2.0) * 1.732 * DEVIATION;
        match dtype {
            DType::F32 => element.copy_from_slice(&value.to_le_bytes()),
            DType::BF16 => element.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            DType::F16 => element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
        }
    }
}

/// A tokenizer of the words `t0`, `t1` and so on.
fn write_tokenizer(vocab_size: usize, out: &Path) -> Result<(), Failure> {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..vocab_size).map(|id| (format!("t{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    });
    fs::write(out.join("tokenizer.json"), serde_json::to_vec(&tokenizer)?)?;
    fs::write(out.join("tokenizer_config.json"), b"{\"tokenizer_class\": \"PreTrainedTokenizerFast\"}")?;
    Ok(())
}
