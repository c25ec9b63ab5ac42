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
pub(crate) const BLOCK_SIZE: usize = 16;

/// Rows whose logits exist at a time on a GPU: as many sequences as it decodes well together.
pub(crate) const CUDA_ROWS_SAMPLED: usize = 256;

/// The most tokens of a step on a GPU.
pub(crate) fn cuda_step_tokens() -> usize {
    #[cfg(feature = "cuda")]
    return CudaOptions::default().max_step_tokens;
    #[cfg(not(feature = "cuda"))]
    0
}

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
    check_deterministic(settings.is_deterministic, device)?;
    if device != DeviceKind::Cuda {
        let backend = CpuBackend::new(
            CpuOptions { threads: settings.threads, isa: None, pin_threads: true },
            communicator,
        )?;
        return load(backend, files, &options, ledger);
    }
    #[cfg(feature = "cuda")]
    {
        let options = LoadOptions { max_rows_sampled: CUDA_ROWS_SAMPLED, ..options };
        load(CudaBackend::new(cuda_options(settings), communicator)?, files, &options, ledger)
    }
    #[cfg(not(feature = "cuda"))]
    Err(BackendError::Device {
        operation: "--device cuda".to_owned(),
        reason: "this program was built without its feature `cuda`; use --device cpu".to_owned(),
    }
    .into())
}

/// What the settings mean to a GPU.
#[cfg(feature = "cuda")]
fn cuda_options(settings: &ServeSettings) -> CudaOptions {
    let defaults = CudaOptions::default();
    CudaOptions {
        ordinal: settings.cuda_ordinal,
        loader_threads: settings.threads,
        is_deterministic: settings.is_deterministic,
        graph_batches: settings.cuda_graphs.clone().unwrap_or(defaults.graph_batches),
        ..defaults
    }
}

/// Refuses `--deterministic` where it is not kept.
fn check_deterministic(is_wanted: bool, device: DeviceKind) -> Result<(), ShardError> {
    if !is_wanted || device == DeviceKind::Cuda {
        return Ok(());
    }
    Err(ShardError::Usage(vec![
        "--deterministic is kept on CUDA only: on the CPU a request alone and in a batch agree to rounding; leave it out, or use \
         --device cuda"
            .to_owned(),
    ]))
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

pub(crate) fn load_options(settings: &ServeSettings) -> LoadOptions {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_deterministic_does_not_say_so() {
        for (is_wanted, device, is_accepted) in [
            (false, DeviceKind::Cpu, true),
            (false, DeviceKind::Cuda, true),
            (true, DeviceKind::Cuda, true),
            (true, DeviceKind::Cpu, false),
        ] {
            let answer = check_deterministic(is_wanted, device);
            assert_eq!(answer.is_ok(), is_accepted, "{answer:?}");
            if let Err(error) = answer {
                assert!(error.to_string().contains("leave it out, or use --device cuda"), "{error}");
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_gets_what_the_options_say_and_the_backends_choice_otherwise() {
        use clap::Parser;

        use crate::args::{Args, Command};
        use crate::settings::serve_settings;

        let options = |words: &[&str]| {
            let words = ["shard", "serve", "org/model"].iter().chain(words);
            let Command::Serve(args) = Args::try_parse_from(words).unwrap().command else { unreachable!() };
            cuda_options(&serve_settings(&args, 8).unwrap())
        };
        let defaults = CudaOptions::default();
        assert!(defaults.loader_threads == 8 && defaults.ordinal == 0 && defaults.graph_batches.contains(&8));
        assert_eq!(options(&[]), defaults);
        assert_eq!(
            options(&["--cuda-ordinal", "3", "--threads", "5", "--deterministic", "--cuda-graphs", "1,6"]),
            CudaOptions {
                ordinal: 3,
                loader_threads: 5,
                is_deterministic: true,
                graph_batches: vec![1, 6],
                ..defaults.clone()
            }
        );
        let nothing_recorded = CudaOptions { graph_batches: Vec::new(), ..defaults };
        assert_eq!(options(&["--cuda-graphs", "0"]), nothing_recorded);
    }
}
