//! The JSON log line that a shard writes and the launcher reads: one struct for both ends.
//!
//! The shape is the one text-generation-inference's shard writes (loguru's "serialize"): top-level `text` and
//! `record`. A reader needs `text` and `record.level.name` only.

use std::time::Duration;

use serde_json::{Value, json};
use tracing::Level;

/// What a log line says and how grave it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The message, without trailing white space.
    pub text: String,
    /// The level by its wire name: `TRACE`, `DEBUG`, `INFO`, `SUCCESS`, `WARNING`, `ERROR` or `CRITICAL`.
    pub level: String,
}

/// Where and when a line was logged; every part may be left at its default.
#[derive(Clone, Debug, Default)]
pub struct LogSource {
    /// Path of the source file.
    pub file: String,
    /// Line in the source file.
    pub line: u32,
    /// Module path, such as `shard::engine`.
    pub module: String,
    /// Date and time, such as `2026-01-31 12:00:00.000000+00:00`.
    pub time: String,
    /// Time since the Unix epoch.
    pub timestamp: Duration,
    /// Time since the process began to log.
    pub elapsed: Duration,
}

impl LogLine {
    /// A line at one of tracing's levels.
    pub fn new(level: Level, text: impl Into<String>) -> Self {
        let level = match level {
            Level::TRACE => "TRACE",
            Level::DEBUG => "DEBUG",
            Level::INFO => "INFO",
            Level::WARN => "WARNING",
            Level::ERROR => "ERROR",
        };
        Self { text: text.into(), level: level.to_owned() }
    }

    /// Reads one line of a shard's standard output; `None` when it is not such a line.
    pub fn parse(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        let text = value.get("text")?.as_str()?.trim_end().to_owned();
        let level = value.get("record")?.get("level")?.get("name")?.as_str()?.to_owned();
        Some(Self { text, level })
    }

    /// The level to log this line again at; `None` for a level nobody knows.
    pub fn tracing_level(&self) -> Option<Level> {
        match self.level.as_str() {
            "TRACE" => Some(Level::TRACE),
            "DEBUG" => Some(Level::DEBUG),
            "INFO" | "SUCCESS" => Some(Level::INFO),
            "WARNING" => Some(Level::WARN),
            "ERROR" | "CRITICAL" => Some(Level::ERROR),
            _ => None,
        }
    }

    /// The line as one JSON object without a newline; place and time are left empty.
    pub fn render(&self) -> String {
        self.render_from(&LogSource::default())
    }

    /// The line as one JSON object without a newline.
    pub fn render_from(&self, source: &LogSource) -> String {
        let (icon, number) = match self.level.as_str() {
            "TRACE" => ("\u{270f}\u{fe0f}", 5),
            "DEBUG" => ("\u{1f41e}", 10),
            "SUCCESS" => ("\u{2705}", 25),
            "WARNING" => ("\u{26a0}\u{fe0f}", 30),
            "ERROR" => ("\u{274c}", 40),
            "CRITICAL" => ("\u{2620}\u{fe0f}", 50),
            _ => ("\u{2139}\u{fe0f}", 20),
        };
        let file_name = source.file.rsplit('/').next().unwrap_or_default();
        let module = source.module.rsplit("::").next().unwrap_or_default();
        let thread = std::thread::current();
        let seconds = source.elapsed.as_secs_f64();
        json!({
            "text": format!("{}\n", self.text),
            "record": {
                "elapsed": { "repr": format!("{seconds:.6} s"), "seconds": seconds },
                "exception": null,
                "extra": {},
                "file": { "name": file_name, "path": source.file },
                "function": "",
                "level": { "icon": icon, "name": self.level, "no": number },
                "line": source.line,
                "message": self.text,
                "module": module,
                "name": source.module,
                "process": { "id": std::process::id(), "name": "shard" },
                "thread": { "id": 0, "name": thread.name().unwrap_or("unnamed") },
                "time": { "repr": source.time, "timestamp": source.timestamp.as_secs_f64() },
            },
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rendered_is_parsed_again() {
        let line = LogLine::new(Level::WARN, "two\nlines and a \"quote\"");
        let text = line.render();
        assert!(!text.contains('\n'));
        assert_eq!(LogLine::parse(&text), Some(line));
    }

    #[test]
    fn reads_the_minimal_upstream_line() {
        let line =
            LogLine::parse(r#"{"text":"Server started  \n","record":{"level":{"name":"SUCCESS"}}}"#).unwrap();
        assert_eq!(line.text, "Server started");
        assert_eq!(line.tracing_level(), Some(Level::INFO));
    }

    #[test]
    fn other_text_is_no_log_line() {
        for text in
            ["", "plain", "{}", "[]", r#"{"text":"x"}"#, r#"{"text":1,"record":{"level":{"name":"INFO"}}}"#]
        {
            assert_eq!(LogLine::parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_level_has_a_mapping() {
        for (name, level) in [("TRACE", Level::TRACE), ("CRITICAL", Level::ERROR), ("WARNING", Level::WARN)] {
            let line = LogLine { text: String::new(), level: name.to_owned() };
            assert_eq!(line.tracing_level(), Some(level));
        }
        let line = LogLine { text: String::new(), level: "LOUD".to_owned() };
        assert_eq!(line.tracing_level(), None);
    }

    #[test]
    fn record_has_every_key_upstream_writes() {
        let value: Value = serde_json::from_str(&LogLine::new(Level::INFO, "x").render()).unwrap();
        let keys: Vec<_> = value["record"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(
            keys,
            "elapsed exception extra file function level line message module name process thread time"
                .split(' ')
                .collect::<Vec<_>>()
        );
    }
}
