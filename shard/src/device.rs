//! Which device a shard runs on, and the model on it.

use backend::collectives::Communicator;
use backend::cpu::{CpuBackend, CpuOptions};
#[cfg(feature = "cuda")]
use backend::cuda::{CudaBackend, CudaOptions};
use backend::{Backend, BackendError};
use hub::ModelFiles;
use models::{CausalLm, LoadOptions};

use crate::error::ShardError;
use crate::ledger::Ledger;
use crate::settings::{DeviceKind, ServeSettings};

/// Tokens of a KV block; what upstream's paged attention uses.
const BLOCK_SIZE: usize = 16;

/// Rows whose logits exist at a time on a GPU: as many sequences as it decodes well together.
#[cfg(feature = "cuda")]
const CUDA_ROWS_SAMPLED: usize = 256;

/// GPU architectures this program has kernels for.
pub(crate) fn architectures() -> &'static [&'static str] {
    #[cfg(feature = "cuda")]
    return CudaBackend::architectures();
    #[cfg(not(feature = "cuda"))]
    &[]
}

/// Opens the device and loads this rank's part of the model.
///
/// # Errors
/// What is missing on this machine or in this program, or the model's.
pub(crate) fn load_model(
    settings: &ServeSettings,
    files: &ModelFiles,
    communicator: Box<dyn Communicator>,
    ledger: &mut Ledger,
) -> Result<Box<dyn CausalLm>, ShardError> {
    let device = match settings.device {
        DeviceKind::Auto => find(settings.cuda_ordinal),
        other => other,
    };
    let options = load_options(settings);
    if device != DeviceKind::Cuda {
        let backend = CpuBackend::new(
            CpuOptions { threads: settings.threads, isa: None, pin_threads: true },
            communicator,
        )?;
        return load(backend, files, &options, ledger);
    }
    #[cfg(feature = "cuda")]
    {
        let mut cuda = CudaOptions {
            ordinal: settings.cuda_ordinal,
            loader_threads: settings.threads,
            ..CudaOptions::default()
        };
        if let Some(sizes) = &settings.cuda_graphs {
            cuda.graph_batches.clone_from(sizes);
        }
        let options = LoadOptions { max_rows_sampled: CUDA_ROWS_SAMPLED, ..options };
        load(CudaBackend::new(cuda, communicator)?, files, &options, ledger)
    }
    #[cfg(not(feature = "cuda"))]
    Err(BackendError::Device {
        operation: "--device cuda".to_owned(),
        reason: "this program was built without its feature `cuda`; use --device cpu".to_owned(),
    }
    .into())
}

/// The device of `--device auto`, and why in the log.
fn find(ordinal: usize) -> DeviceKind {
    let missing = missing_for_cuda(ordinal);
    match missing {
        None => DeviceKind::Cuda,
        Some(missing) => {
            tracing::debug!("running on the CPU: {missing}");
            DeviceKind::Cpu
        }
    }
}

#[cfg(feature = "cuda")]
fn missing_for_cuda(ordinal: usize) -> Option<BackendError> {
    CudaBackend::find_device(ordinal).err()
}

#[cfg(not(feature = "cuda"))]
fn missing_for_cuda(_ordinal: usize) -> Option<BackendError> {
    Some(BackendError::Device { operation: "CUDA".to_owned(), reason: "not part of this build".to_owned() })
}

fn load_options(settings: &ServeSettings) -> LoadOptions {
    LoadOptions {
        dtype: settings.dtype,
        quantize: settings.quantize,
        kv_dtype: settings.kv_dtype,
        block_size: BLOCK_SIZE,
        threads: settings.threads,
        rope_scaling: settings.rope_scaling,
        ..LoadOptions::default()
    }
}

fn load<B: Backend>(
    backend: B,
    files: &ModelFiles,
    options: &LoadOptions,
    ledger: &mut Ledger,
) -> Result<Box<dyn CausalLm>, ShardError> {
    ledger.end_phase("backend");
    let model = models::load(backend, files, options)?;
    ledger.end_phase("weights");
    Ok(Box::new(model))
}
