//! Entry point: parse, check, run, say what went wrong, exit with a meaningful code.

use benchmark::{Args, Settings};
use clap::Parser;
use process::ExitCode;

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    process::init_logging(args.log_settings());
    let settings = match Settings::from_args(args) {
        Ok(settings) => settings,
        Err(mistakes) => {
            for mistake in mistakes {
                eprintln!("error: {mistake}");
            }
            return ExitCode::Usage.into();
        }
    };
    match benchmark::run(&settings) {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::Failure.into()
        }
    }
}
