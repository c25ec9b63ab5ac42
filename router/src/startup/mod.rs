//! From a configuration to a router that listens.
//!
//! The shards load or warm up while the tokenizer and the chat template are read: both take long, neither needs the other. The
//! port is claimed first, so that a port in use is found before anything is computed, but listened on last: until
//! the router can serve, connections are refused and not left hanging.

mod ledger;
mod model;
mod shards;
mod warmup;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::ShardInfo;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use ledger::Ledger;
pub use model::ModelParts;
use shards::Shards;
pub use warmup::{WarmedUp, connect_and_warm_up};

use crate::RouterError;
use crate::config::{Limits, RouterConfig};
use crate::infer::{Infer, Permits};
use crate::metrics::{BucketLimits, Metrics, UPKEEP_PERIOD};
use crate::scheduler::{
    Batcher, BatcherSettings, BlockAllocator, HealthFlag, Queue, QueueSettings, Scheduler, Unrecoverable,
};
use crate::server::{self, AppState};
use crate::tokenization::Tokenization;
use crate::tunnel::{Refused, Tunnel, Visitors};
use crate::types::Info;
use crate::validation::{Validation, ValidationLimits};

/// Connections that may wait for the server to accept them; the kernel cuts it to its own limit.
const BACKLOG: u32 = 4096;

/// How long the last answers may take when there is nothing to compute them with any more.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A router that is ready to serve.
pub struct Started {
    socket: TcpSocket,
    address: SocketAddr,
    assembled: Assembled,
    tunnel: Option<Tunnel>,
    ledger: Ledger,
}

/// A router without a port.
pub struct Assembled {
    /// What handlers work with.
    pub state: AppState,
    /// A handle to the batching task.
    pub scheduler: Scheduler,
    /// The batching task. It ends before the last handle does only when the shards are lost for good.
    pub batching: JoinHandle<Result<(), Unrecoverable>>,
}

/// Does everything up to listening. Calls to the shards run on `scheduler_runtime`, so that neither HTTP nor
/// tokenizing delays a step.
///
/// # Errors
/// Anything that keeps the router from serving; the text says which flag changes it.
pub async fn start(config: RouterConfig, scheduler_runtime: &Handle) -> Result<Started, RouterError> {
    for note in &config.notes {
        tracing::info!("{note}");
    }
    let socket = claim_address(config.address)?;
    let tunnel = config.tunnel.clone().map(Tunnel::open).transpose();
    let mut tunnel = tunnel.map_err(|mistake| RouterError::Configuration(vec![mistake]))?;
    let (assembled, ledger) = tokio::select! {
        prepared = prepare(&config, scheduler_runtime) => prepared?,
        // A wrong token need not wait for a model to load.
        refused = refused(&mut tunnel) => return Err(refused.into()),
    };
    Ok(Started { socket, address: config.address, assembled, tunnel, ledger })
}

/// Meets the shards while the model's texts are read.
async fn prepare(
    config: &RouterConfig,
    scheduler_runtime: &Handle,
) -> Result<(Assembled, Ledger), RouterError> {
    let model = tokio::task::spawn_blocking({
        let (model, hub) = (config.model.clone(), config.hub.clone());
        let tokenizer_config_path = config.tokenizer_config_path.clone();
        move || (model::load(&model, &hub, tokenizer_config_path.as_deref()), Instant::now())
    });
    let shards = scheduler_runtime.spawn(meet_shards(config.clone(), Ledger::new()));
    let (model, shards) = tokio::join!(finished(model), finished(shards));
    let (shards, mut ledger) = shards??;
    let (model, model_read) = model?;
    ledger.prepared("tokenizer and template", model_read);
    // Only what is left of it when the shards are warm holds anybody up.
    ledger.end_phase("tokenizer", Instant::now());
    Ok((assemble(config, shards, model?, scheduler_runtime)?, ledger))
}

/// Never resolves where there is no tunnel.
async fn refused(tunnel: &mut Option<Tunnel>) -> Refused {
    match tunnel {
        Some(tunnel) => tunnel.refused().await,
        None => std::future::pending().await,
    }
}

/// Waits for whoever holds this router back, then for the shards.
async fn meet_shards(config: RouterConfig, mut ledger: Ledger) -> Result<(WarmedUp, Ledger), RouterError> {
    let input = if config.is_held { input().await? } else { String::new() };
    ledger.release(&input, Instant::now());
    let shards = warmup::connect_and_warm_up(config.master_shard_uds_path, config.batching).await?;
    ledger.end_phase("warm-up", Instant::now());
    Ok((shards, ledger))
}

impl Started {
    /// A handle to the batching task.
    pub fn scheduler(&self) -> Scheduler {
        self.assembled.scheduler.clone()
    }

    /// Listens, says so, and serves until `shutdown` resolves and the last request is answered.
    ///
    /// # Errors
    /// The address is taken after all, the listener fails, or the shards are lost for good.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), RouterError> {
        let Self { socket, address, assembled, mut tunnel, mut ledger } = self;
        let listener = socket.listen(BACKLOG).map_err(|source| RouterError::Bind { address, source })?;
        ledger.end_phase("listen", Instant::now());
        assembled.state.note_startup(ledger.finish());
        // The word that upstream's launcher, and everybody's scripts, wait for.
        tracing::info!("Connected");
        let upkeep = tokio::spawn(keep_up(Arc::clone(assembled.state.metrics())));
        let visitors = tunnel.as_mut().and_then(Tunnel::take_visitors);
        let served = tokio::select! {
            served = serve_while_batching(listener, visitors, assembled, shutdown) => served,
            refused = refused(&mut tunnel) => Err(refused.into()),
        };
        if let Some(tunnel) = tunnel {
            tunnel.close().await;
        }
        upkeep.abort();
        served
    }
}

/// Without a batching task every request would wait for ever: the server ends with it.
async fn serve_while_batching(
    listener: TcpListener,
    visitors: Option<Visitors>,
    assembled: Assembled,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), RouterError> {
    let Assembled { state, mut batching, .. } = assembled;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let until = async move {
        tokio::select! {
            () = shutdown => {}
            // A dropped sender means the same.
            _ = stopped => {}
        }
    };
    let server = server::serve(listener, visitors, state, until);
    tokio::pin!(server);
    let ended = tokio::select! {
        served = &mut server => {
            return served.map_err(|source| RouterError::System { step: "serving", source });
        }
        ended = &mut batching => ended,
    };
    drop(stop);
    // Everybody has been told; what is left are the last bytes.
    let _ = tokio::time::timeout(LAST_ANSWERS, server).await;
    match ended {
        Ok(Ok(())) => Err(RouterError::Internal("the scheduler has stopped".to_string())),
        Ok(Err(error)) => Err(RouterError::Unrecoverable(error)),
        Err(error) => Err(RouterError::Internal(error.to_string())),
    }
}

/// Whoever started this router before the shards were ready says so by closing its input, after a report of the start so far.
async fn input() -> Result<String, RouterError> {
    let read = tokio::task::spawn_blocking(|| io::read_to_string(io::stdin().lock()));
    finished(read)
        .await?
        .map_err(|source| RouterError::System { step: "waiting for the input to end", source })
}

/// Binds without listening.
fn claim_address(address: SocketAddr) -> Result<TcpSocket, RouterError> {
    let failed = |source| RouterError::Bind { address, source };
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(failed)?;
    // Connections of the router before us may linger in the kernel; they must not keep us from starting.
    socket.set_reuseaddr(true).map_err(failed)?;
    socket.bind(address).map_err(failed)?;
    Ok(socket)
}

async fn finished<T>(task: JoinHandle<T>) -> Result<T, RouterError> {
    task.await.map_err(|error| RouterError::Internal(error.to_string()))
}

async fn keep_up(metrics: Arc<Metrics>) {
    loop {
        tokio::time::sleep(UPKEEP_PERIOD).await;
        metrics.upkeep();
    }
}

/// Starts the batching task and the tokenizer threads and puts everything together.
///
/// # Errors
/// The operating system refuses a thread.
pub fn assemble(
    config: &RouterConfig,
    shards: WarmedUp,
    model: ModelParts,
    scheduler_runtime: &Handle,
) -> Result<Assembled, RouterError> {
    let WarmedUp { client, info, limits } = shards;
    let buckets =
        BucketLimits { max_input_tokens: limits.max_input_tokens, max_total_tokens: limits.max_total_tokens };
    let metrics = Metrics::new(buckets).map_err(|error| RouterError::Internal(error.to_string()))?;
    let metrics = Arc::new(metrics);
    metrics.set_max_batch_total_tokens(limits.max_batch_total_tokens);
    let health = HealthFlag::default();

    let (scheduler, commands) = Scheduler::channel();
    let queue = Queue::new(queue_settings(&info, &limits));
    let settings = batcher_settings(config, &limits);
    let shards = Shards::new(config.master_shard_uds_path.clone(), config.batching, client, &limits);
    let present_client = shards.watch();
    let batcher = Batcher::new(shards, queue, settings, commands, Arc::clone(&metrics), health.clone());
    let batching = scheduler_runtime.spawn(batcher.run());

    let tokenization = Tokenization::start(Arc::new(model.tokenizer), config.validation_workers)
        .map_err(|source| RouterError::System { step: "starting the tokenizer threads", source })?;
    let validation = Validation::new(validation_limits(config, &limits), tokenization);
    let http_info = http_info(config, &limits, model.model_id, model.sha);
    let permits = Permits::new(config.max_concurrent_requests, health.clone());
    let infer = Infer::new(validation, scheduler.clone(), model.template, permits, metrics);
    let state = AppState::new(infer, http_info, config.server.clone(), present_client, health);
    Ok(Assembled { state, scheduler, batching })
}

fn queue_settings(info: &ShardInfo, limits: &Limits) -> QueueSettings {
    let block_size = info.block_size.max(1);
    let allocator = (!info.requires_padding)
        .then(|| BlockAllocator::new(limits.max_batch_total_tokens, block_size, info.window_size));
    QueueSettings {
        allocator,
        block_size,
        speculate: info.speculate,
        supports_chunking: info.support_chunking,
        supports_resume: info.supports_resume,
    }
}

fn batcher_settings(config: &RouterConfig, limits: &Limits) -> BatcherSettings {
    let batching = &config.batching;
    BatcherSettings {
        waiting_served_ratio: batching.waiting_served_ratio,
        max_batch_prefill_tokens: batching.max_batch_prefill_tokens,
        max_batch_total_tokens: limits.max_batch_total_tokens,
        max_waiting_tokens: batching.max_waiting_tokens,
        max_batch_size: batching.max_batch_size,
    }
}

fn validation_limits(config: &RouterConfig, limits: &Limits) -> ValidationLimits {
    ValidationLimits {
        max_best_of: config.max_best_of,
        max_stop_sequences: config.max_stop_sequences,
        max_top_n_tokens: config.max_top_n_tokens,
        max_input_tokens: limits.max_input_tokens,
        max_total_tokens: limits.max_total_tokens,
    }
}

fn http_info(config: &RouterConfig, limits: &Limits, model_id: String, sha: Option<String>) -> Info {
    Info {
        model_id,
        model_sha: sha,
        model_pipeline_tag: None,
        max_concurrent_requests: config.max_concurrent_requests,
        max_best_of: config.max_best_of,
        max_stop_sequences: config.max_stop_sequences,
        max_input_tokens: limits.max_input_tokens,
        max_total_tokens: limits.max_total_tokens,
        validation_workers: config.validation_workers,
        max_client_batch_size: config.server.max_client_batch_size,
        router: "text-generation-router",
        version: env!("CARGO_PKG_VERSION"),
        sha: option_env!("QUARTET_GIT_SHA"),
        docker_label: option_env!("DOCKER_LABEL"),
        startup: None,
    }
}
