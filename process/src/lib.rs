//! Quartet: what every one of its processes does alike: logs, traces, signals, exit codes.

pub mod args;
mod exit_code;
mod log_line;
mod logging;
mod signals;
mod traces;

pub use args::LogArgs;
pub use exit_code::ExitCode;
pub use log_line::{LogLine, LogSource};
pub use logging::{LogSettings, Program, init_logging, init_logging_and_traces, max_level};
pub use signals::{GiveUpSignal, Signal, SignalStream, shutdown_signal};
pub use traces::{OtlpEndpoint, TRACES_TARGET, TraceError, TraceExport, TraceSettings, continue_trace};
