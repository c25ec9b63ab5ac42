//! Entry point: parse → plan → supervise → exit code.

use std::time::Instant;

use clap::Parser;
use launcher::args::{Args, Command};
use launcher::devices::Devices;
use launcher::env_report::EnvReport;
use launcher::error::{Failure, LauncherError};
use launcher::machine::Machine;
use launcher::programs::{ROUTER_NAMES, SHARD_NAMES, SearchPath};
use launcher::startup_ledger::StartupLedger;
use launcher::supervisor::{Launch, supervise};
use launcher::{plan, preflight, weights};
use process::{ExitCode, Program, init_logging, max_level};

fn main() -> std::process::ExitCode {
    let ledger = StartupLedger::new(Instant::now());
    let args = Args::parse();
    if let Some(Command::Download(args)) = &args.command {
        init_logging(args.log.settings(Program::Launcher));
        return exit(weights::download(args));
    }
    let settings = args.log.settings(Program::Launcher);
    let logger_level = max_level(&settings.filter);
    init_logging(settings);
    if args.serving.env {
        tracing::info!("{}", EnvReport::collect());
    }
    tracing::info!("{args:#?}");
    exit(check(args, logger_level, ledger).and_then(run))
}

/// The exit code, after the last words.
fn exit(outcome: Result<(), Failure>) -> std::process::ExitCode {
    match outcome {
        Ok(()) => ExitCode::Ok.into(),
        Err(failure) => {
            tracing::error!("{}", failure.reason);
            eprintln!("{}\n{}", failure.reason, failure.stderr_line());
            failure.exit_code().into()
        }
    }
}

/// Everything that can be known to be wrong before the model is touched.
fn check(args: Args, logger_level: String, mut ledger: StartupLedger) -> Result<Launch, Failure> {
    // A launcher whose file was replaced while it runs still finds the programs through PATH.
    let executable = std::env::current_exe().ok();
    let hidden = &args.hidden;
    let search =
        SearchPath::new(hidden.bin_dir.as_deref(), executable.as_deref(), hidden.search_path.as_deref());
    let find = |names, error| search.find(names).map_err(|reason| Failure::new(error, reason));
    let shard_program = find(&SHARD_NAMES, LauncherError::ShardCannotStart);
    let machine = match &args.hidden.machine {
        Some(path) => Machine::from_file(path).map_err(Failure::argument)?,
        None => Machine::look(shard_program.as_deref().ok()),
    };
    let devices = Devices::choose(&args, &machine).map_err(Failure::all)?;
    let plan = plan::plan(&args, None, &devices).map_err(Failure::all)?;
    preflight::check_port(plan.bind).map_err(Failure::argument)?;
    let shard_program = shard_program?;
    let router_program = find(&ROUTER_NAMES, LauncherError::WebserverCannotStart)?;
    ledger.end_phase("checks", Instant::now());
    Ok(Launch { args, devices, shard_program, router_program, logger_level, ledger })
}

fn run(launch: Launch) -> Result<(), Failure> {
    // One thread, and this one: the kernel ends the children when the thread that started them ends.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::argument(format!("cannot start the event loop: {error}")))?;
    let outcome = runtime.block_on(supervise(launch));
    // A download that was told to stop must not hold us back.
    runtime.shutdown_background();
    outcome
}
