//! Entry point: parse → plan → supervise → exit code.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use launcher::args::{Args, Command, PlanArgs, StatusArgs};
use launcher::devices::Devices;
use launcher::env_report::EnvReport;
use launcher::error::{Failure, LauncherError};
use launcher::machine::Machine;
use launcher::plan_report;
use launcher::preflight::{self, Severity};
use launcher::programs::{ROUTER_NAMES, SHARD_NAMES, SearchPath};
use launcher::startup_ledger::StartupLedger;
use launcher::supervisor::{Launch, supervise};
use launcher::{command_line, manual, plan, status_socket, weights};
use process::{ExitCode, Program, init_logging, max_level};

fn main() -> std::process::ExitCode {
    let ledger = StartupLedger::new(Instant::now());
    let words: Vec<_> = std::env::args_os().collect();
    let args = command_line::parse(&words).unwrap_or_else(|refusal| refusal.exit());
    match args.command {
        Some(Command::Plan(plan)) => return show_plan(*plan),
        Some(Command::Status(args)) => return show_status(&args),
        Some(Command::Download(args)) => {
            init_logging(args.log.settings(Program::Launcher));
            return exit(weights::download(&args));
        }
        Some(Command::Completions { shell }) => return print(Ok(manual::completions(shell))),
        Some(Command::Man) => return print(manual::page()),
        None => {}
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
            for line in failure.reason.lines() {
                tracing::error!("{line}");
            }
            eprintln!("{}\n{}", failure.reason, failure.stderr_line());
            failure.exit_code().into()
        }
    }
}

/// Writes `text` to standard output; a reader that has gone is a failure without words.
fn print(text: std::io::Result<Vec<u8>>) -> std::process::ExitCode {
    match text.and_then(|text| std::io::stdout().write_all(&text)) {
        Ok(()) => ExitCode::Ok.into(),
        Err(_) => ExitCode::Failure.into(),
    }
}

/// `launcher plan`: nothing but the plan on standard output.
fn show_plan(plan: PlanArgs) -> std::process::ExitCode {
    let json = plan.json;
    let args = Args::from(plan).without_empty_values();
    let report = || {
        let Surroundings { machine, devices, shard_program, router_program } = Surroundings::look(&args)?;
        // A plan is of use where the programs are not installed yet.
        let named =
            |found: Result<PathBuf, Failure>, name: &str| found.unwrap_or_else(|_| PathBuf::from(name));
        let programs = (named(shard_program, SHARD_NAMES[0]), named(router_program, ROUTER_NAMES[0]));
        plan_report::report(&args, (&machine, &devices), (&programs.0, &programs.1))
    };
    let report = match report() {
        Ok(report) => report,
        Err(failure) => {
            eprintln!("{}\n{}", failure.reason, failure.stderr_line());
            return failure.exit_code().into();
        }
    };
    let text = if json {
        serde_json::to_string_pretty(&report).map(|text| format!("{text}\n")).unwrap_or_default()
    } else {
        report.to_text()
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::Ok.into(),
        Err(_) => ExitCode::Failure.into(),
    }
}

/// What a plan is made from besides the options.
struct Surroundings {
    machine: Machine,
    devices: Devices,
    shard_program: Result<PathBuf, Failure>,
    router_program: Result<PathBuf, Failure>,
}

impl Surroundings {
    fn look(args: &Args) -> Result<Self, Failure> {
        // A launcher whose file was replaced while it runs still finds the programs through PATH.
        let executable = std::env::current_exe().ok();
        let hidden = &args.hidden;
        let search =
            SearchPath::new(hidden.bin_dir.as_deref(), executable.as_deref(), hidden.search_path.as_deref());
        let find = |names, error| search.find(names).map_err(|reason| Failure::new(error, reason));
        let shard_program = find(&SHARD_NAMES, LauncherError::ShardCannotStart);
        let machine = match &hidden.machine {
            Some(path) => Machine::from_file(path).map_err(Failure::argument)?,
            None => Machine::look(shard_program.as_deref().ok()),
        };
        let devices = Devices::choose(args, &machine).map_err(Failure::all)?;
        let router_program = find(&ROUTER_NAMES, LauncherError::WebserverCannotStart);
        Ok(Self { machine, devices, shard_program, router_program })
    }
}

/// Everything that can be known to be wrong before the model is touched, all at once.
fn check(args: Args, logger_level: String, mut ledger: StartupLedger) -> Result<Launch, Failure> {
    preflight::raise_open_files();
    let Surroundings { machine, devices, shard_program, router_program } = Surroundings::look(&args)?;
    let plan = plan::plan(&args, None, &devices).map_err(Failure::all)?;
    let findings = preflight::findings(&preflight::look(&args, &plan), &machine, &devices, &plan);
    let (errors, warnings): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| finding.severity == Severity::Error);
    for warning in warnings {
        tracing::warn!("{}", warning.line);
    }
    if !errors.is_empty() {
        let errors = errors.into_iter().map(|error| LauncherError::ArgumentValidation(error.line));
        return Err(Failure::all(errors.collect()));
    }
    ledger.end_phase("checks", Instant::now());
    Ok(Launch {
        args,
        devices,
        shard_program: shard_program?,
        router_program: router_program?,
        logger_level,
        ledger,
    })
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

/// `launcher status`: nothing but the answer on standard output.
fn show_status(args: &StatusArgs) -> std::process::ExitCode {
    let directory = args.status_dir.clone().unwrap_or_else(status_socket::default_directory);
    let found = match status_socket::ask_all(&directory) {
        Ok(found) => found,
        Err(reason) => {
            eprintln!("{reason}");
            return ExitCode::Failure.into();
        }
    };
    let text = if args.json {
        serde_json::to_string_pretty(&found).unwrap_or_default()
    } else {
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    if !text.is_empty() && writeln!(std::io::stdout(), "{text}").is_err() {
        return ExitCode::Failure.into();
    }
    if found.is_empty() {
        eprintln!("no launcher of this user is running (looked in {})", directory.display());
        return ExitCode::Failure.into();
    }
    ExitCode::Ok.into()
}
