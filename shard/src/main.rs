//! Entry point: parse, log, serve or download, exit code.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use process::{LogSettings, init_logging_and_traces};
use shard::args::{Args, Command};
use shard::error::ShardError;
use shard::{footprint, settings, startup};

fn main() -> ExitCode {
    let started = Instant::now();
    let args = Args::parse();
    let log = args.log();
    let log = LogSettings::shard(&log.logger_level, log.json_output);
    let export = init_logging_and_traces(log, settings::trace_settings(&args.command));
    // The last spans are delivered when `run` is done.
    match export.map_err(ShardError::from).and_then(|_export| run(&args, started)) {
        Ok(()) => process::ExitCode::Ok.into(),
        Err(error) => {
            for line in error.to_string().lines() {
                tracing::error!("{line}");
            }
            // The launcher prints what a shard that ended has left on stderr.
            eprintln!("{error}");
            error.exit_code().into()
        }
    }
}

fn run(args: &Args, started: Instant) -> Result<(), ShardError> {
    match &args.command {
        Command::Serve(args) => {
            let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
            let settings = settings::serve_settings(args, num_cores).map_err(ShardError::Usage)?;
            startup::serve(&settings, started)
        }
        Command::Footprint(args) => {
            let num_cores = std::thread::available_parallelism().map_or(1, usize::from);
            let settings = settings::serve_settings(&args.serve, num_cores).map_err(ShardError::Usage)?;
            let room = footprint::Room {
                free_bytes: args.free_bytes.clone(),
                max_prefill_tokens: args.max_prefill_tokens,
            };
            footprint::print(&settings, &room)
        }
        Command::DownloadWeights(args) => {
            let settings = settings::download_settings(args).map_err(ShardError::Usage)?;
            startup::download(&settings)
        }
        Command::Architectures => startup::print_architectures(),
    }
}
