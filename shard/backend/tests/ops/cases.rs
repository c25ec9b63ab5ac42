//! Backends to test, random inputs, and ways to get them onto a device.

use std::borrow::Cow;

use backend::collectives::Single;
use backend::cpu::{CpuBackend, CpuOptions, Isa};
use backend::{Backend, DType, HostMatrix, KvDType, StepInput};

/// Runs a generic test body on every backend this machine has: `on_every_backend!(body)` calls `body(&mut backend)`.
macro_rules! on_every_backend {
    ($body:path) => {
        for (name, mut backend) in crate::cases::cpu_backends() {
            eprintln!("on {name}");
            $body(&mut backend);
        }
        #[cfg(feature = "cuda")]
        if let Some(mut backend) = crate::cases::cuda() {
            eprintln!("on CUDA");
            $body(&mut backend);
        }
    };
}
pub(crate) use on_every_backend;

/// CPU backends of every instruction set this processor has, with one, two and three threads.
pub(crate) fn cpu_backends() -> Vec<(String, CpuBackend)> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    isas.zip([1, 3, 1, 2, 2])
        .map(|(isa, threads)| (format!("{isa}, {threads} threads"), cpu(isa, threads)))
        .collect()
}

/// The CUDA backend, where there is a device. Where there is one it has to work.
#[cfg(feature = "cuda")]
pub(crate) fn cuda() -> Option<backend::cuda::CudaBackend> {
    use backend::cuda::{CudaBackend, CudaOptions};
    if let Err(error) = CudaBackend::find_device(0) {
        eprintln!("not on CUDA: {error}");
        return None;
    }
    Some(CudaBackend::new(CudaOptions::default(), Box::new(Single)).unwrap())
}

/// One CPU backend.
pub(crate) fn cpu(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, isa: Some(isa), pin_threads: false }, Box::new(Single)).unwrap()
}

/// A backend with the best kernels.
pub(crate) fn best_cpu() -> CpuBackend {
    cpu(Isa::detect(), 2)
}

/// A small generator of random numbers (SplitMix64): the same inputs everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// About normally distributed, standard deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f64 = (0..6).map(|_| (self.bits() >> 11) as f64 / (1u64 << 53) as f64).sum();
        ((sum - 3.0) * std::f64::consts::SQRT_2) as f32
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub(crate) fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// `x` as it is once stored as `dtype`.
pub(crate) fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// `x` as it is once stored in a cache of `dtype`.
pub(crate) fn cached(x: f32, dtype: KvDType) -> f32 {
    match dtype {
        KvDType::Plain(dtype) => rounded(x, dtype),
        KvDType::Fp8(format) => format.decode(format.encode(x)),
    }
}

/// Little-endian bytes of `values` as `dtype`.
pub(crate) fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// A matrix without gaps, stored as `dtype`.
pub(crate) fn matrix(values: &[f32], rows: usize, cols: usize, dtype: DType) -> HostMatrix<'static> {
    assert_eq!(values.len(), rows * cols);
    HostMatrix { dtype, rows, cols, row_stride: cols, bytes: Cow::Owned(bytes_of(values, dtype)) }
}

/// A step of one new sequence of `tokens` tokens in blocks 1, 2, ...
pub(crate) fn prompt(tokens: usize) -> StepInput {
    let count = tokens as u32;
    StepInput {
        input_ids: (0..count).collect(),
        position_ids: (0..count).collect(),
        slot_mapping: (16..16 + count).collect(),
        cu_seqlens_q: vec![0, count],
        context_lens: vec![count],
        prompt_lens: vec![count],
        block_tables: (1..=count.div_ceil(16)).collect(),
        max_blocks: tokens.div_ceil(16),
        logits_rows: vec![count - 1],
    }
}

/// A buffer of f32 with `values` `[rows, width]`, see [`upload_as`].
pub(crate) fn upload<B: Backend>(backend: &mut B, values: &[f32], width: usize) -> B::Buffer {
    upload_as(backend, values, width, DType::F32)
}

/// Types that activations may have: the CPU has only one.
pub(crate) fn activation_types<B: Backend>(backend: &B) -> &'static [DType] {
    let all = &[DType::F32, DType::BF16, DType::F16];
    if backend.device().device_type == "cpu" { &all[..1] } else { all }
}

/// The type of activations that are multiplied with weights of `dtype`.
pub(crate) fn activations_beside<B: Backend>(backend: &B, dtype: DType) -> DType {
    if backend.device().device_type == "cpu" { DType::F32 } else { dtype }
}

/// Random values that `dtype` can have.
pub(crate) fn random_as(random: &mut Random, len: usize, dtype: DType) -> Vec<f32> {
    random.vector(len).into_iter().map(|value| rounded(value, dtype)).collect()
}

/// A buffer of `dtype` with `values` `[rows, width]`: rows of an embedding table are the only way in that every backend has. It
/// begins a step of its own.
pub(crate) fn upload_as<B: Backend>(
    backend: &mut B,
    values: &[f32],
    width: usize,
    dtype: DType,
) -> B::Buffer {
    let rows = values.len() / width;
    let table = backend.linear(&[matrix(values, rows, width, DType::F32)], DType::F32).unwrap();
    let mut buffer = backend.buffer(rows, width, dtype).unwrap();
    backend.begin_step(&prompt(rows)).unwrap();
    backend.embed(&table, 0, &mut buffer).unwrap();
    buffer
}

/// Whether the backend multiplies some rows with bf16 weights in 16-bit fixed point, to `tolerances::MANY_ROWS`.
pub(crate) fn has_fixed_point<B: Backend>(backend: &B) -> bool {
    let description = backend.device().description;
    ["VNNI kernels", "BF16 kernels"].iter().any(|kernels| description.contains(kernels))
}

/// Rows from which on it does.
pub(crate) const FIXED_ROWS: usize = 5;
