//! From settings to a shard that serves.

use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use backend::collectives::shm::{self, Rendezvous};
use backend::collectives::{Communicator, Single};
use hub::{HubError, ModelFiles};
use process::ExitCode;

use crate::device;
use crate::engine::{Engine, EngineOptions, Vocabulary};
use crate::error::ShardError;
use crate::ledger::Ledger;
use crate::lifeline;
use crate::server::{self, BoundSocket, Identity, SocketFile};
use crate::settings::{DownloadSettings, ServeSettings};

/// How long a rank waits for another, at the start and in every step. Ranks get each call within milliseconds of one
/// another, so this is the time after which a hanging rank counts as lost.
const PEER_TIMEOUT: Duration = Duration::from_secs(60);

/// Loads the model and serves it until asked to stop.
///
/// # Errors
/// Whatever prevents or ends that.
pub fn serve(settings: &ServeSettings, process_started: Instant) -> Result<(), ShardError> {
    let mut ledger = Ledger::new(process_started);
    let socket_file = watch_lifeline(settings)?;
    let socket_path = settings.socket(settings.rank);
    ledger.end_phase("arguments");
    let engine = load_engine(settings, &mut ledger)?;
    tracing::info!("{} on {}", settings.model.model_id, engine.model_info().device.description);
    let socket = BoundSocket::bind(&socket_path)?;
    // Nobody else sets it.
    let _ = socket_file.set(socket.file().clone());
    ledger.end_phase("bind socket");
    ledger.log();
    server::run(socket, engine, identity(settings, ledger.into_phases()))
}

/// Finds the model, meets the other ranks and loads this one's part. The files are closed again when it returns: packed
/// weights need them no more, and a mapped file counts as this process's memory.
fn load_engine(settings: &ServeSettings, ledger: &mut Ledger) -> Result<Engine, ShardError> {
    let files = hub::locate(&settings.model, &settings.hub)?;
    ledger.end_phase("locate files");
    let communicator = join_ranks(settings, &files)?;
    ledger.end_phase("rendezvous");
    // The tokenizer takes as long as a small model's weights, and neither needs the other.
    let (model, text) = std::thread::scope(|scope| {
        let text = scope.spawn(|| load_text(&files));
        let model = device::load_model(settings, &files, communicator, ledger);
        (model, text.join())
    });
    let model = model?;
    let text = text.map_err(|_| ShardError::EnginePanicked("while it read the tokenizer".to_string()))??;
    ledger.end_phase("tokenizer");

    Ok(Engine::new(model, text.vocabulary, engine_options(settings, text.model_max_length)))
}

/// Prints what this program has kernels for.
///
/// # Errors
/// Standard output is closed.
pub fn print_architectures() -> Result<(), ShardError> {
    let lines: String = device::architectures().iter().map(|name| format!("{name}\n")).collect();
    std::io::stdout()
        .write_all(lines.as_bytes())
        .map_err(|source| ShardError::System { action: "writing to standard output", source })
}

/// Downloads a model unless it is on this disk.
///
/// # Errors
/// The Hub's or the disk's.
pub fn download(settings: &DownloadSettings) -> Result<(), ShardError> {
    let files = hub::fetch(&settings.model, &settings.hub)?;
    tracing::info!("Files are in {}", files.root.display());
    Ok(())
}

/// Ends this process when the launcher is gone. Answers where the socket is to be noted, so that it is removed then.
fn watch_lifeline(settings: &ServeSettings) -> Result<Arc<OnceLock<SocketFile>>, ShardError> {
    let socket_file = Arc::new(OnceLock::<SocketFile>::new());
    if let Some(fd) = settings.lifeline_fd {
        let socket_file = Arc::clone(&socket_file);
        lifeline::watch(fd, move || {
            tracing::error!("the launcher is gone, stopping");
            if let Some(file) = socket_file.get() {
                file.remove();
            }
            std::process::exit(i32::from(ExitCode::ParentGone));
        })?;
    }
    Ok(socket_file)
}

fn join_ranks(settings: &ServeSettings, files: &ModelFiles) -> Result<Box<dyn Communicator>, ShardError> {
    if settings.world_size == 1 {
        return Ok(Box::new(Single));
    }
    let fingerprint = format!(
        "quartet {} model {} dtype {} quantize {} kv {} rope {}",
        env!("CARGO_PKG_VERSION"),
        files.fingerprint()?,
        settings.dtype.map_or("auto", backend::DType::name),
        settings.quantize.map_or("auto", models::Quantize::name),
        settings.kv_dtype.map_or("auto", backend::KvDType::name),
        settings.rope_scaling.map_or_else(
            || "as in the model".to_owned(),
            |rope| format!("{} {}", rope.kind.name(), rope.factor)
        )
    );
    let communicator = shm::join(&Rendezvous {
        socket: settings.rendezvous_socket(),
        rank: settings.rank,
        world_size: settings.world_size,
        fingerprint,
        timeout: PEER_TIMEOUT,
    })?;
    Ok(Box::new(communicator))
}

/// What is known of a model besides its weights.
struct Text {
    vocabulary: Vocabulary,
    model_max_length: Option<usize>,
}

fn load_text(files: &ModelFiles) -> Result<Text, HubError> {
    let tokenizer = files.decoding_tokenizer()?;
    files.check_vocabulary(&tokenizer)?;
    let tokenizer_config = files.tokenizer_config()?;
    let mut eos_token_ids = files.generation_config()?.eos_token_ids;
    // Upstream's rule: a list says it all; a single id may be the base model's, while the tokenizer knows the one that
    // ends a chat turn.
    if eos_token_ids.len() < 2 {
        let token = tokenizer_config.eos_token.as_deref();
        let id = token.and_then(|token| tokenizer.token_to_id(token));
        eos_token_ids.extend(id.filter(|id| !eos_token_ids.contains(id)));
    }
    let files = files.clone();
    let make_encoding = move || files.tokenizer().map_err(|error| error.to_string());
    Ok(Text {
        vocabulary: Vocabulary::new(tokenizer, Box::new(make_encoding), eos_token_ids),
        model_max_length: tokenizer_config.model_max_length.and_then(|length| usize::try_from(length).ok()),
    })
}

pub(crate) fn engine_options(settings: &ServeSettings, model_max_length: Option<usize>) -> EngineOptions {
    EngineOptions {
        rank: settings.rank,
        world_size: settings.world_size,
        request_logprobs: settings.request_logprobs,
        memory_fraction: settings.memory_fraction,
        model_max_length,
        max_input_tokens: settings.max_input_tokens,
        max_total_tokens: settings.max_total_tokens,
        run_ahead: true,
    }
}

fn identity(settings: &ServeSettings, startup: Vec<(String, Duration)>) -> Identity {
    Identity {
        instance_id: settings.instance_id.clone(),
        rank: settings.rank,
        sockets: (0..settings.world_size).map(|rank| absolute(&settings.socket(rank))).collect(),
        model_id: settings.model.model_id.clone(),
        startup,
    }
}

/// Whoever discovers the sockets may have another working directory.
fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}
