//! What children write: passed on as it comes, and remembered for the day one of them dies.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use process::LogLine;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};
use tracing::{Level, Span};

/// A cause and the lines that led to it fit; a log does not.
const LAST_WORDS: usize = 20;

/// A child that never ends its line must not fill our memory.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// The last lines a child wrote, on both streams, oldest first. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct LastWords(Arc<Mutex<VecDeque<String>>>);

impl LastWords {
    fn push(&self, line: &str) {
        let line = without_colours(line.trim_end());
        if line.is_empty() {
            return;
        }
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LAST_WORDS {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// All remembered lines.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

/// Without the terminal's control sequences: inside another log line they are noise.
fn without_colours(line: &str) -> String {
    let mut pieces = line.split("\u{1b}[");
    let first = pieces.next().unwrap_or_default();
    let after = pieces.map(|piece| {
        piece.trim_start_matches(|byte: char| matches!(byte, '0'..='?')).get(1..).unwrap_or_default()
    });
    std::iter::once(first).chain(after).collect()
}

/// Logs a shard's JSON lines again within `span`; other lines are only remembered, except at debug level.
pub async fn relay_shard_stdout(stdout: impl AsyncRead + Unpin, span: Span, words: LastWords) {
    for_each_line(stdout, |line| match LogLine::parse(line) {
        Some(parsed) => {
            words.push(&parsed.text);
            span.in_scope(|| log_again(&parsed));
        }
        None => {
            words.push(line);
            if tracing::enabled!(Level::DEBUG) {
                copy_line(&mut std::io::stdout().lock(), line);
            }
        }
    })
    .await;
}

/// Remembers a shard's error output: it is printed when the shard dies.
pub async fn collect_stderr(stderr: impl AsyncRead + Unpin, words: LastWords) {
    for_each_line(stderr, |line| words.push(line)).await;
}

/// Copies the router's log to ours, untouched.
pub async fn copy_stdout(stdout: impl AsyncRead + Unpin, words: LastWords) {
    for_each_line(stdout, |line| {
        words.push(line);
        copy_line(&mut std::io::stdout().lock(), line);
    })
    .await;
}

/// Copies the router's error output to ours.
pub async fn copy_stderr(stderr: impl AsyncRead + Unpin, words: LastWords) {
    for_each_line(stderr, |line| {
        words.push(line);
        copy_line(&mut std::io::stderr().lock(), line);
    })
    .await;
}

/// One write a line, so that lines of several children do not mix. A closed stream is no reason to stop serving.
fn copy_line(to: &mut impl Write, line: &str) {
    let _ = to.write_all(format!("{line}\n").as_bytes());
}

fn log_again(line: &LogLine) {
    let text = &line.text;
    match line.tracing_level() {
        Some(Level::TRACE) => tracing::trace!("{text}"),
        Some(Level::DEBUG) => tracing::debug!("{text}"),
        Some(Level::WARN) => tracing::warn!("{text}"),
        Some(Level::ERROR) => tracing::error!("{text}"),
        Some(Level::INFO) | None => tracing::info!("{text}"),
    }
}

/// Calls `each` with every line until the stream ends or breaks. Bytes that are no UTF-8 are replaced.
async fn for_each_line(stream: impl AsyncRead + Unpin, mut each: impl FnMut(&str)) {
    let mut reader = BufReader::with_capacity(32 * 1024, stream);
    let mut line = Vec::new();
    while read_line(&mut reader, &mut line).await {
        each(&String::from_utf8_lossy(&line));
        line.clear();
    }
}

/// Reads up to the next newline, which is consumed but not kept; an overlong line is cut, its rest skipped. False at
/// the end.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> bool {
    loop {
        let chunk = match reader.fill_buf().await {
            Ok(chunk) if !chunk.is_empty() => chunk,
            // A broken pipe ends the stream as well as its end does.
            _ => return !line.is_empty(),
        };
        let (part, consumed, is_complete) = match chunk.iter().position(|&byte| byte == b'\n') {
            Some(end) => (&chunk[..end], end + 1, true),
            None => (chunk, chunk.len(), false),
        };
        let room = MAX_LINE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&part[..part.len().min(room)]);
        reader.consume(consumed);
        if is_complete {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_split_cut_and_survive_bad_bytes() {
        let long = "x".repeat(3 * MAX_LINE_BYTES);
        let text = [b"one\n\ntw\xff\n".as_slice(), long.as_bytes(), b"\nlast"].concat();
        let mut lines = Vec::new();
        for_each_line(text.as_slice(), |line| lines.push(line.to_owned())).await;
        assert_eq!(lines[..3], ["one", "", "tw\u{fffd}"]);
        assert_eq!(lines[3].len(), MAX_LINE_BYTES);
        assert_eq!(lines[4..], ["last"]);
    }

    #[test]
    fn last_words_have_no_colours() {
        let words = LastWords::default();
        words.push("\u{1b}[2m12:00\u{1b}[0m \u{1b}[31mERROR\u{1b}[0m \u{1b}[1;4mé\u{1b}[0m[0]  ");
        words.push("\u{1b}[");
        words.push("\u{1b}[0m");
        assert_eq!(words.lines(), ["12:00 ERROR é[0]"]);
    }

    #[tokio::test]
    async fn last_words_are_the_last_lines_of_both_streams() {
        let words = LastWords::default();
        let json = LogLine::new(Level::ERROR, "no such tensor").render();
        relay_shard_stdout(format!("{json}\nplain\n").as_bytes(), Span::none(), words.clone()).await;
        let many: String = (0..LAST_WORDS - 2).map(|i| format!("{i}\n")).collect();
        collect_stderr(many.as_bytes(), words.clone()).await;
        assert_eq!(words.lines()[..3], ["no such tensor", "plain", "0"]);
        collect_stderr(b"more\n".as_slice(), words.clone()).await;
        assert_eq!(words.lines().len(), LAST_WORDS);
        assert_eq!(words.lines()[0], "plain");
    }
}
