//! How fast the CUDA kernels are, one JSON object a line.
//!
//! `cargo run --release -p backend --features cuda --example cuda_kernels -- [attention] [norm] [matmul] [fp8] [experts] [sampling]`; without names: all.
//! Operations are recorded and replayed as in a decode step; every figure is a median.

mod attention;
mod experts;
mod fp8;
mod matmul;
mod measure;
mod norm;
mod sampling;

use std::error::Error;
use std::io::Write;

use backend::BackendError;
use backend::cuda::CudaBackend;

use measure::Figure;

type Measure = fn(&mut CudaBackend) -> Result<Vec<Figure>, BackendError>;
const ALL: [(&str, Measure); 6] = [
    ("attention", attention::measure),
    ("norm", norm::measure),
    ("matmul", matmul::measure),
    ("fp8", fp8::measure),
    ("experts", experts::measure),
    ("sampling", sampling::measure),
];

fn main() -> Result<(), Box<dyn Error>> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| ALL.iter().all(|(known, _)| known != name)) {
        return Err(
            format!("{unknown}: expected some of attention, norm, matmul, fp8, experts, sampling").into()
        );
    }
    let mut backend = measure::backend()?;
    let mut out = std::io::stdout().lock();
    for (name, measure) in ALL {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            for figure in measure(&mut backend)? {
                writeln!(out, "{}", figure.json())?;
            }
        }
    }
    Ok(())
}
