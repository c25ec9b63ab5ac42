//! Compiles `cuda/*.cu` with nvcc where there is one.
//!
//! nvcc is looked for in `NVCC`, `CUDA_HOME/bin`, `PATH` and `target/nvcc` (where `make nvcc` puts it). Set
//! `QUARTET_CUDA_ARCHITECTURES` (e.g. `sm_90a`) to compile for fewer GPUs while developing; releases compile for all.

#![allow(clippy::disallowed_methods, reason = "a build script is told everything through the environment")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for these, and code the driver can compile for whatever comes later.
const ALL_ARCHITECTURES: &str = "sm_80,sm_89,sm_90a,sm_100f,sm_120f,compute_80";
/// PTX of a later compiler is refused by drivers of CUDA 13.0.
const NVCC_VERSION: &str = "V13.0";

fn main() {
    for name in ["NVCC", "CUDA_HOME", "QUARTET_CUDA_ARCHITECTURES"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=cuda");
    let out = PathBuf::from(required("OUT_DIR"));
    let folder = PathBuf::from(required("CARGO_MANIFEST_DIR"));
    let text = match find_nvcc(&folder) {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.display());
            compile_all(&nvcc, &folder.join("cuda"), &out)
        }
        None => fatbins_rs(&[], &[]),
    };
    fs::write(out.join("fatbins.rs"), text)
        .unwrap_or_else(|error| panic!("cannot write fatbins.rs: {error}"));
}

fn required(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

/// The first nvcc there is.
fn find_nvcc(manifest: &Path) -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|path| !path.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        assert!(
            nvcc.is_file(),
            "NVCC is {}, which is no file; unset it to build without CUDA",
            nvcc.display()
        );
        return Some(nvcc);
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    let installed = manifest.join("../../target/nvcc/nvidia/cu13/bin");
    let folders = home.into_iter().chain(path.unwrap_or_default()).chain([installed]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// Compiles every source, two at a time, and writes what embeds the images.
fn compile_all(nvcc: &Path, sources: &Path, out: &Path) -> String {
    check_version(nvcc);
    let wanted = env::var("QUARTET_CUDA_ARCHITECTURES").unwrap_or_else(|_| ALL_ARCHITECTURES.to_owned());
    let architectures: Vec<&str> = wanted.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let flags: Vec<String> = architectures.iter().map(|name| gencode(name)).collect();
    let mut names: Vec<String> = fs::read_dir(sources)
        .unwrap_or_else(|error| panic!("cannot list {}: {error}", sources.display()))
        .filter_map(|entry| {
            entry.ok()?.file_name().into_string().ok()?.strip_suffix(".cu").map(str::to_owned)
        })
        .collect();
    names.sort();
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(2usize).max(1);
    for group in names.chunks(jobs) {
        std::thread::scope(|scope| {
            for name in group {
                let (flags, source) = (&flags, sources.join(format!("{name}.cu")));
                scope.spawn(move || compile(nvcc, flags, &source, &out.join(format!("{name}.fatbin"))));
            }
        });
    }
    fatbins_rs(&architectures, &names)
}

fn check_version(nvcc: &Path) {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {}: {error}", nvcc.display()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(NVCC_VERSION),
        "{} is not of CUDA 13.0 ({NVCC_VERSION}), whose kernels every CUDA 13 driver accepts; `make nvcc` installs it, NVCC names another",
        nvcc.display()
    );
}

/// `sm_90a` is machine code, `compute_80` is portable code.
fn gencode(name: &str) -> String {
    match name.split_once('_') {
        Some(("sm", number)) => format!("arch=compute_{number},code=sm_{number}"),
        Some(("compute", number)) => format!("arch=compute_{number},code=compute_{number}"),
        _ => panic!("QUARTET_CUDA_ARCHITECTURES has {name:?}, expected names like sm_90a or compute_80"),
    }
}

fn compile(nvcc: &Path, gencode: &[String], source: &Path, fatbin: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-O3", "-std=c++17", "--compress-mode=size", "-diag-error=177", "-lineinfo"]);
    for flag in gencode {
        command.args(["-gencode", flag]);
    }
    let output = command.arg("-fatbin").arg(source).arg("-o").arg(fatbin).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {}: {error}", nvcc.display()));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nvcc failed on {}:\n{errors}", source.display());
}

/// Rust text with the images' paths.
fn fatbins_rs(architectures: &[&str], names: &[String]) -> String {
    let mut text = format!("const ARCHITECTURES: &[&str] = &{architectures:?};\n");
    text.push_str("const FATBINS: &[(&str, &[u8])] = &[\n");
    for name in names {
        let _ =
            writeln!(text, "    ({name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),");
    }
    text.push_str("];\n");
    text
}
