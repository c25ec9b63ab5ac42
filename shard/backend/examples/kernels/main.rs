//! How fast the CPU kernels are at SmolLM2-135M's shapes, beside a plain loop that only reads memory.
//!
//! `cargo run --release -p backend --example kernels -- [--json] [--threads N] [--dtype bfloat16] [--isa portable|avx2|avx512|vnni|bf16]
//! [--cpu-time] [--pin] [--bits 4|8] [--read-only] [--products-only]`; `--cpu-time` counts the processor time of the first thread, for `--threads 1` on a busy
//! machine, with `--pin` each thread stays on one core, `--bits` times the
//! quantized model of so many bits alone, `--read-only` stops after the plain loop and `--products-only` after the products of plain weights.
//! GB/s are of the bytes that weights take as they are stored.
//! Every figure is the median of several runs. Figures of a machine that does something else meanwhile are worthless.

mod measure;
mod model;

use std::io::Write;

use backend::cpu::{CpuOptions, Isa};
use backend::{Activation, BackendError, DType};

use measure::{Figure, median_seconds, memory_read};
use model::{LAYERS, Model, Weights};

struct Options {
    json: bool,
    cpu: CpuOptions,
    dtype: DType,
    read_only: bool,
    products_only: bool,
    bits_only: Option<u32>,
}

fn options() -> Result<Options, String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = CpuOptions { threads: cores, isa: None, pin_threads: false };
    let mut options = Options {
        json: false,
        cpu,
        dtype: DType::BF16,
        read_only: false,
        products_only: false,
        bits_only: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--json" => options.json = true,
            "--read-only" => options.read_only = true,
            "--products-only" => options.products_only = true,
            "--cpu-time" => measure::COUNTS_CPU_TIME.store(true, std::sync::atomic::Ordering::Relaxed),
            "--threads" => {
                options.cpu.threads = value()?.parse().map_err(|error| format!("--threads: {error}"))?
            }
            "--bits" => {
                let bits = value()?;
                let known = bits.parse().ok().filter(|bits| [4, 8].contains(bits));
                options.bits_only = Some(known.ok_or(format!("--bits {bits}: 4 or 8"))?);
            }
            "--pin" => options.cpu.pin_threads = true,
            "--dtype" => {
                let name = value()?;
                options.dtype = DType::from_name(&name).ok_or(format!("--dtype {name}: unknown"))?;
            }
            "--isa" => {
                let name = value()?;
                let names = ["portable", "avx2", "avx512", "vnni", "bf16"];
                let index =
                    names.iter().position(|&known| known == name).ok_or(format!("--isa {name}: unknown"))?;
                options.cpu.isa = Some(Isa::ALL[index]);
            }
            other => return Err(format!("{other}: unknown")),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = options()?;
    let mut figures = Vec::new();
    let read = memory_read(options.cpu.threads);
    figures.push(Figure::new("memory read, huge pages", read, "GB/s"));

    if options.read_only {
        return Ok(print(&options, "memory", &figures)?);
    }

    if let Some(bits) = options.bits_only {
        quantized(&options, bits, &mut figures)?;
        return Ok(print(&options, "quantized", &figures)?);
    }

    let started = std::time::Instant::now();
    let mut model = Model::new(options.cpu, Weights::Plain(options.dtype))?;
    let bytes = model.weight_bytes() as f64;
    figures.push(Figure::new("packing the whole model", started.elapsed().as_secs_f64() * 1e3, "ms"));

    figures.push(Figure::new("packed weights", bytes / f64::from(1 << 20), "MiB"));
    let seconds = median_seconds(20, || model.weights_only(1));
    figures.push(Figure::new("weights of one token, 1 row", seconds * 1e3, "ms"));
    figures.push(Figure::new("weights of one token, 1 row", bytes / seconds / 1e9, "GB/s"));
    for rows in [2, 4, 6, 8, 12, 16] {
        let seconds = median_seconds(10, || model.weights_only(rows));
        figures.push(Figure::new(format!("weights of one step, {rows} rows"), seconds * 1e3, "ms"));
        figures.push(Figure::new(format!("weights of one step, {rows} rows"), bytes / seconds / 1e9, "GB/s"));
    }
    let seconds = median_seconds(3, || model.layers_only(512));
    let operations = 2.0 * 512.0 * model.layer_parameters() as f64;
    figures.push(Figure::new("all layers' products, 512 rows", operations / seconds / 1e9, "GFLOP/s"));

    if options.products_only {
        return Ok(print(&options, &model.description(), &figures)?);
    }

    for context in [128, 1024] {
        model.begin(1, context)?;
        let seconds = median_seconds(50, || model.attention_only()) / LAYERS as f64;
        figures.push(Figure::new(format!("attention, 1 row, context {context}"), seconds * 1e6, "us"));
    }
    model.begin(512, 512)?;
    let seconds = median_seconds(5, || model.attention_only()) / LAYERS as f64;
    figures.push(Figure::new("attention, 512 rows", seconds * 1e6, "us"));
    let seconds = median_seconds(20, || model.activation_only(Activation::Silu));
    figures.push(Figure::new("silu, 512 rows", seconds * 1e6, "us"));

    model.begin(1, 160)?;
    let seconds = median_seconds(30, || model.step());
    figures.push(Figure::new("decode step, context 160", 1.0 / seconds, "tokens/s"));
    model.begin(1, 1024)?;
    let seconds = median_seconds(30, || model.step());
    figures.push(Figure::new("decode step, context 1024", 1.0 / seconds, "tokens/s"));
    model.begin_batch(8, 160)?;
    let seconds = median_seconds(20, || model.step());
    figures.push(Figure::new("decode step, 8 sequences of 160", 8.0 / seconds, "tokens/s"));
    for (name, seconds) in model.step_parts(20) {
        figures.push(Figure::new(format!("of that step: {name}"), seconds * 1e3, "ms"));
    }
    model.begin(512, 512)?;
    let seconds = median_seconds(5, || model.step());
    figures.push(Figure::new("prefill step, 512 tokens", 512.0 / seconds, "tokens/s"));
    let seconds = median_seconds(30, || model.sample_only());
    figures.push(Figure::new("sampling, greedy", seconds * 1e6, "us"));

    for bits in [8, 4] {
        quantized(&options, bits, &mut figures)?;
    }

    Ok(print(&options, &model.description(), &figures)?)
}

fn print(options: &Options, device: &str, figures: &[Figure]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if options.json {
        writeln!(out, "{{\"device\":\"{device}\",\"figures\":[")?;
        for (index, figure) in figures.iter().enumerate() {
            writeln!(out, "{}{}", figure.json(), if index + 1 < figures.len() { "," } else { "" })?;
        }
        writeln!(out, "]}}")?;
    } else {
        writeln!(out, "{device}, {}", options.dtype)?;
        for figure in figures {
            writeln!(out, "{figure}")?;
        }
    }
    Ok(())
}

/// The same model from quantized weights.
fn quantized(options: &Options, bits: u32, figures: &mut Vec<Figure>) -> Result<(), BackendError> {
    let mut model = Model::new(options.cpu, Weights::Quantized(bits))?;
    let bytes = model.weight_bytes() as f64;
    let mut add =
        |name: &str, value, unit| figures.push(Figure::new(format!("{bits}-bit {name}"), value, unit));
    for rows in [1, 8] {
        let seconds = median_seconds(20, || model.weights_only(rows));
        add(&format!("weights of one step, {rows} rows"), seconds * 1e3, "ms");
        add(&format!("weights of one step, {rows} rows"), bytes / seconds / 1e9, "GB/s");
    }
    let seconds = median_seconds(5, || model.layers_only(512));
    let operations = 2.0 * 512.0 * model.layer_parameters() as f64;
    add("all layers' products, 512 rows", operations / seconds / 1e9, "GFLOP/s");
    model.begin(1, 160)?;
    let seconds = median_seconds(30, || model.step());
    add("decode step, context 160", 1.0 / seconds, "tokens/s");
    model.begin_batch(8, 160)?;
    let seconds = median_seconds(20, || model.step());
    add("decode step, 8 sequences of 160", 8.0 / seconds, "tokens/s");
    for (name, seconds) in model.step_parts(20) {
        add(&format!("of that step: {name}"), seconds * 1e3, "ms");
    }
    model.begin(512, 512)?;
    let seconds = median_seconds(5, || model.step());
    add("prefill step, 512 tokens", 512.0 / seconds, "tokens/s");
    Ok(())
}
