//! Log output: one format per program for people, one for machines. All of it goes to standard output.

use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterExt, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, time};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::log_line::{LogLine, LogSource};
use crate::traces::{TraceError, TraceExport, TraceSettings};

/// Whose logs these are; the programs' formats differ as upstream's do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Text: compact. JSON: event fields nested under `fields`.
    Launcher,
    /// Text: full, with file and line. JSON: event fields at top level.
    Router,
    /// Text: full. JSON: the line the launcher relays, see [`LogLine`].
    Shard,
    /// As the router.
    Benchmark,
}

/// How a process logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// Decides the format.
    pub program: Program,
    /// JSON lines instead of text.
    pub json: bool,
    /// A filter over targets, such as `router=info,hub=debug`; directives that do not parse are left out.
    pub filter: String,
    /// Colours in text output.
    pub ansi: bool,
}

impl LogSettings {
    /// A shard's settings from its `--logger-level` and `--json-output`.
    ///
    /// The level may be written as upstream's launcher writes it (`WARN`) or as its shard names it
    /// (`WARNING`, `SUCCESS`, `CRITICAL`); anything unknown counts as `INFO`.
    pub fn shard(logger_level: &str, json: bool) -> Self {
        let level = match logger_level.to_ascii_uppercase().as_str() {
            "TRACE" => "trace",
            "DEBUG" => "debug",
            "WARN" | "WARNING" => "warn",
            "ERROR" | "CRITICAL" => "error",
            "OFF" => "off",
            _ => "info",
        };
        Self { program: Program::Shard, json, filter: crate::args::resolve_filter(level), ansi: false }
    }
}

/// The most talkative level that `filter` lets through, in capitals: what the launcher hands its shards.
pub fn max_level(filter: &str) -> String {
    let level = parse_filter(filter).max_level_hint().unwrap_or(LevelFilter::INFO);
    level.to_string().to_ascii_uppercase()
}

/// Sends this process's logs to standard output. A second call changes nothing.
pub fn init_logging(settings: LogSettings) {
    // The only error is "somebody was first", and then that one's choice stands.
    let _ = tracing_subscriber::registry()
        .with(format_layer(&settings))
        .with(parse_filter(&settings.filter))
        .with(without_secrets())
        .try_init();
}

/// As [`init_logging`], and exports spans if that is asked for, until the answer is dropped.
///
/// # Errors
/// Nothing can be exported; logs are there all the same.
pub fn init_logging_and_traces(
    settings: LogSettings,
    traces: Option<TraceSettings>,
) -> Result<Option<TraceExport>, TraceError> {
    let export = match traces.map(TraceExport::start).transpose() {
        Ok(Some(export)) => export,
        nothing => {
            init_logging(settings);
            return nothing;
        }
    };
    // A filter for each: the collector gets its spans whatever the log shows, and nothing but them.
    let logs =
        format_layer(&settings).with_filter(parse_filter(&settings.filter).and(without_secrets())).boxed();
    // As above.
    let _ = tracing_subscriber::registry().with(vec![logs, export.layer()]).try_init();
    Ok(Some(export))
}

fn parse_filter(filter: &str) -> EnvFilter {
    EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).parse_lossy(filter)
}

/// The agent of ngrok logs every frame it sends, the token among them, and the answers that repeat it: nothing below `info` gets
/// out of it, whatever the filter says.
fn without_secrets() -> Targets {
    let targets = ["ngrok", "muxado"].map(|target| (target, LevelFilter::INFO));
    Targets::new().with_default(LevelFilter::TRACE).with_targets(targets)
}

fn format_layer(settings: &LogSettings) -> Box<dyn Layer<Registry> + Send + Sync> {
    let layer = tracing_subscriber::fmt::layer().with_ansi(settings.ansi);
    match (settings.program, settings.json) {
        (Program::Launcher, false) => layer.compact().boxed(),
        (Program::Launcher, true) => layer.json().boxed(),
        (Program::Router | Program::Benchmark, false) => layer.with_file(true).with_line_number(true).boxed(),
        (Program::Router | Program::Benchmark, true) => {
            layer.with_file(true).with_line_number(true).json().flatten_event(true).boxed()
        }
        (Program::Shard, false) => layer.boxed(),
        (Program::Shard, true) => layer.event_format(ShardJson { start: Instant::now() }).boxed(),
    }
}

/// Writes each event as the JSON line a launcher relays.
struct ShardJson {
    start: Instant,
}

impl<S, N> FormatEvent<S, N> for ShardJson
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = MessageText::default();
        event.record(&mut text);
        let metadata = event.metadata();
        let source = LogSource {
            file: metadata.file().unwrap_or_default().to_owned(),
            line: metadata.line().unwrap_or_default(),
            module: metadata.module_path().unwrap_or_default().to_owned(),
            time: wall_clock(),
            timestamp: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            elapsed: self.start.elapsed(),
        };
        let line = LogLine::new(*metadata.level(), text.finish());
        writeln!(writer, "{}", line.render_from(&source))
    }
}

/// Now, as `2026-01-31 12:00:00.000000+00:00`.
fn wall_clock() -> String {
    let mut text = String::new();
    match time::SystemTime.format_time(&mut Writer::new(&mut text)) {
        Ok(()) => text.replacen('T', " ", 1).replacen('Z', "+00:00", 1),
        Err(fmt::Error) => String::new(),
    }
}

/// An event as one text: its message, then its other fields as ` name=value`.
#[derive(Default)]
struct MessageText {
    message: String,
    fields: String,
}

impl MessageText {
    fn finish(mut self) -> String {
        self.message.push_str(&self.fields);
        self.message.trim_start().to_owned()
    }

    fn push(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        use fmt::Write;
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value}"),
            name => write!(self.fields, " {name}={value}"),
        };
    }
}

impl Visit for MessageText {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Captured {
        type Writer = Self;
        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn shard_line_is_what_the_launcher_parses() {
        let captured = Captured::default();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(captured.clone())
            .event_format(ShardJson { start: Instant::now() });
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(rank = 1, dtype = "bf16", "loading");
        });
        let written = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        let line = LogLine::parse(written.trim_end()).unwrap();
        assert_eq!(line.text, "loading rank=1 dtype=bf16");
        assert_eq!(line.level, "WARNING");
    }

    #[test]
    fn max_level_reads_filters_and_falls_back() {
        assert_eq!(max_level("launcher=debug,router=info"), "DEBUG");
        assert_eq!(max_level(&crate::args::resolve_filter("warn")), "WARN");
        assert_eq!(max_level(""), "INFO");
    }

    #[test]
    fn shard_accepts_both_spellings_of_levels() {
        for (level, expected) in
            [("WARN", "=warn"), ("WARNING", "=warn"), ("SUCCESS", "=info"), ("odd", "=info")]
        {
            let settings = LogSettings::shard(level, true);
            assert!(settings.filter.contains(&format!("shard{expected}")), "{level}: {}", settings.filter);
        }
    }

    #[test]
    fn wall_clock_is_in_utc_and_sortable() {
        let now = wall_clock();
        assert!(now.ends_with("+00:00") && now.as_bytes()[10] == b' ', "{now}");
    }
}
