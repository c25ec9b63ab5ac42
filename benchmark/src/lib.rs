//! Drives prefill and decode on running shards and reports what they do: TGI's benchmark tool, with a mode for scripts.
//!
//! Reading order: [`Args`] (what was typed) → [`Settings`] (what it means) → [`Prompt`] → [`Session`] (a thread that
//! calls the shards and sends [`Event`]s) → [`Measurements`] → the terminal interface or plain lines while it runs,
//! tables and a JSON report when it is over. Statistics, tables and charts are functions of [`Measurements`].

mod args;
mod error;
mod machine;
mod measurements;
mod progress;
mod prompt;
mod report;
mod runner;
mod session;
mod settings;
mod stats;
mod table;
mod ui;

use std::io::{IsTerminal, Write};
use std::time::Duration;

pub use args::{Args, SamplingArgs, WarmupArgs};
pub use error::BenchmarkError;
pub use measurements::{BatchMeasurements, Decode, Measurements, Prefill, Run, Shards};
pub use prompt::Prompt;
pub use runner::Event;
pub use session::{Next, Session};
pub use settings::Settings;

/// Runs the benchmark that `settings` describes; tables go to standard output, progress to standard error.
///
/// What was measured is printed and written even when the run failed half-way.
///
/// # Errors
/// The first thing that went wrong, in one line.
pub fn run(settings: &Settings) -> Result<(), BenchmarkError> {
    let report_file = settings.output_json.as_deref().map(report::ReportFile::create).transpose()?;
    let prompt = Prompt::load(settings)?;
    let mut session = Session::start(settings.clone(), prompt)?;
    let mut measurements = Measurements::new(&settings.batch_sizes);

    attach(settings, &mut session, &mut measurements)?;
    let has_terminal = std::io::stdout().is_terminal();
    let shown = if has_terminal && !settings.no_tui {
        ui::run(settings, &mut session, &mut measurements)
    } else {
        progress::run(settings, &mut session, &mut measurements);
        Ok(())
    };
    let outcome = shown.and(session.finish());

    if measurements.has_runs() || outcome.is_ok() {
        // A reader that closed the pipe has seen enough.
        let _ = std::io::stdout().write_all(table::render(settings, &measurements).as_bytes());
    }
    if let Some(file) = report_file {
        let failure = outcome.as_ref().err().map(BenchmarkError::to_string);
        file.write(&report::Report::new(settings, &measurements, failure))?;
    }
    outcome
}

/// Waits until the shards answered who they are, so that what is wrong there is said before a screen opens.
fn attach(
    settings: &Settings,
    session: &mut Session,
    measurements: &mut Measurements,
) -> Result<(), BenchmarkError> {
    loop {
        match session.next(Duration::from_millis(100)) {
            Next::Idle if session.is_overdue() => return Err(BenchmarkError::Interrupted),
            Next::Idle => {}
            Next::Ended => return session.finish(),
            Next::Event(event) => {
                eprintln!("{}", progress::describe(settings, measurements, &event));
                measurements.record(&event);
                if matches!(event, Event::Attached(_)) {
                    return Ok(());
                }
            }
        }
    }
}
