//! The router's process: parse, start, serve, drain, exit.

use std::num::NonZero;

use clap::Parser;
use process::{ExitCode, GiveUpSignal, Program, SignalStream};
use router::RouterError;
use router::args::Args;
use router::config::RouterConfig;
use router::scheduler::Scheduler;
use router::startup::Started;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

/// More HTTP threads than this only get in one another's way: one serves tens of thousands of tokens a second.
const MAX_HTTP_THREADS: usize = 16;

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    let traces = router::config::trace_settings(&args);
    let export = process::init_logging_and_traces(args.log.settings(Program::Router), traces);
    // The last spans are delivered when `run` is done.
    let exit_code = match export.map_err(RouterError::from).and_then(|_export| run(args)) {
        Ok(()) => ExitCode::Ok,
        Err(error) => {
            for line in error.to_string().lines() {
                tracing::error!("{line}");
            }
            error.exit_code()
        }
    };
    exit_code.into()
}

fn run(args: Args) -> Result<(), RouterError> {
    let config = RouterConfig::from_args(args).map_err(RouterError::Configuration)?;
    let http = runtime("http", http_threads())?;
    // A thread of its own: a step must not wait for a request that is being parsed.
    let scheduler = runtime("scheduler", 1)?;
    let served = http.block_on(async {
        let signals = SignalStream::new();
        let uncaught = |source| RouterError::System { step: "catching signals", source };
        let mut signals = signals.map_err(uncaught)?;
        let give_up = GiveUpSignal::new().map_err(uncaught)?;
        let started = tokio::select! {
            started = router::startup::start(config, scheduler.handle()) => started?,
            signal = signals.next() => {
                tracing::info!("{signal} during start-up");
                return Ok(());
            }
        };
        tokio::spawn(give_up_when_told(give_up, started.scheduler()));
        serve(started, signals).await
    });
    // What still runs on them is of no use to anybody now.
    scheduler.shutdown_background();
    http.shutdown_background();
    served
}

/// Serves until a signal, then until the last request is answered; a second signal ends it at once.
async fn serve(started: Started, mut signals: SignalStream) -> Result<(), RouterError> {
    let (stop, stopped) = oneshot::channel::<()>();
    let told_twice = async move {
        let signal = signals.next().await;
        tracing::info!("{signal}: new requests are refused, running ones are finished");
        drop(stop);
        let signal = signals.next().await;
        tracing::warn!("{signal} again: running requests are dropped");
    };
    tokio::select! {
        served = started.serve(async move { drop(stopped.await) }) => served,
        () = told_twice => Ok(()),
    }
}

/// The launcher has no shards for the running requests and will not start any: they end with an error, and nothing is left
/// that a stop would have to wait for.
async fn give_up_when_told(mut signal: GiveUpSignal, scheduler: Scheduler) {
    signal.received().await;
    scheduler.give_up("the server is going down and nothing can compute this request any more");
}

fn runtime(name: &str, num_threads: usize) -> Result<Runtime, RouterError> {
    Builder::new_multi_thread()
        .worker_threads(num_threads)
        .thread_name(name)
        .enable_all()
        .build()
        .map_err(|source| RouterError::System { step: "starting threads", source })
}

/// Half of the cores: the other half computes, tokenizes and talks to the shards.
fn http_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    (cores / 2).clamp(1, MAX_HTTP_THREADS)
}
