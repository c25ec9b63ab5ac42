//! A small HTTP/1.1 client over `TcpStream`: whole answers and server-sent events.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// No answer of a test takes this long, not even on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header names in lower case, in the order they came.
    pub headers: Vec<(String, String)>,
    /// The body as text.
    pub body: String,
}

impl Response {
    /// The first header of that (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is not JSON; the message shows it.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body)
            .with_context(|| format!("status {}, body {:?}", self.status, self.body))
    }
}

/// Sends `GET path`.
///
/// # Errors
/// When the connection or the answer breaks.
pub fn get(port: u16, path: &str) -> Result<Response> {
    Exchange::start(port, "GET", path, &[], "")?.finish()
}

/// Sends `POST path` with a JSON body.
///
/// # Errors
/// As [`get`].
pub fn post(port: u16, path: &str, body: &Value) -> Result<Response> {
    post_raw(port, path, &[("content-type", "application/json")], &body.to_string())
}

/// Sends `POST path` with headers and bytes of the caller's choice.
///
/// # Errors
/// As [`get`].
pub fn post_raw(port: u16, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Response> {
    Exchange::start(port, "POST", path, headers, body)?.finish()
}

/// Sends `POST path` and reads the answer event by event.
///
/// # Errors
/// When the connection breaks or the answer is no event stream.
pub fn stream(port: u16, path: &str, body: &Value) -> Result<EventStream> {
    let exchange =
        Exchange::start(port, "POST", path, &[("content-type", "application/json")], &body.to_string())?;
    let is_events = exchange
        .headers
        .iter()
        .any(|(name, value)| name == "content-type" && value.starts_with("text/event-stream"));
    if !is_events {
        let response = exchange.finish()?;
        bail!("expected an event stream, got status {} and {:?}", response.status, response.body);
    }
    Ok(EventStream { exchange, pending: String::new() })
}

/// A request that was sent and whose answer's head was read.
#[derive(Debug)]
struct Exchange {
    reader: BufReader<TcpStream>,
    status: u16,
    headers: Vec<(String, String)>,
    body: BodyKind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum BodyKind {
    Chunked,
    Length(usize),
    UntilClose,
    Done,
}

impl Exchange {
    fn start(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Self> {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).context("connect")?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_nodelay(true)?;
        let mut request = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("content-length: {}\r\n\r\n{body}", body.len());
        // A server may refuse a body before it has read all of it; its answer is what counts then.
        let sent = socket.write_all(request.as_bytes());
        let mut reader = BufReader::new(socket);
        let mut line = String::new();
        reader.read_line(&mut line).context("status line")?;
        if line.is_empty() {
            sent?;
            bail!("the connection was closed without an answer");
        }
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).context("status code")?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_lowercase(), value.trim().to_string()));
        }
        let find = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let body = if find("transfer-encoding") == Some("chunked") {
            BodyKind::Chunked
        } else if let Some(length) = find("content-length") {
            BodyKind::Length(length.parse().context("content-length")?)
        } else {
            BodyKind::UntilClose
        };
        Ok(Self { reader, status, headers, body })
    }

    /// The next piece of the body; none at its proper end.
    fn piece(&mut self) -> Result<Option<Vec<u8>>> {
        let mut piece = Vec::new();
        match self.body {
            BodyKind::Done => return Ok(None),
            BodyKind::Length(length) => {
                piece.resize(length, 0);
                self.reader.read_exact(&mut piece)?;
                self.body = BodyKind::Done;
            }
            BodyKind::UntilClose => {
                self.reader.read_to_end(&mut piece)?;
                self.body = BodyKind::Done;
            }
            BodyKind::Chunked => {
                let mut line = String::new();
                self.reader.read_line(&mut line)?;
                if line.is_empty() {
                    bail!("the stream broke off without its last chunk");
                }
                let size = usize::from_str_radix(line.trim(), 16).context("chunk size")?;
                piece.resize(size + 2, 0);
                self.reader.read_exact(&mut piece)?;
                piece.truncate(size);
                if size == 0 {
                    self.body = BodyKind::Done;
                    return Ok(None);
                }
            }
        }
        Ok(Some(piece))
    }

    fn finish(mut self) -> Result<Response> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece()? {
            body.extend(piece);
        }
        let body = String::from_utf8(body).context("body is not UTF-8")?;
        Ok(Response { status: self.status, headers: self.headers, body })
    }
}

/// Server-sent events, one `data:` payload at a time.
#[derive(Debug)]
pub struct EventStream {
    exchange: Exchange,
    pending: String,
}

impl EventStream {
    /// Closes the connection as a client that loses interest does.
    pub fn hang_up(self) {
        // Fails only when the server was first.
        let _ = self.exchange.reader.get_ref().shutdown(Shutdown::Both);
    }

    /// All remaining payloads.
    ///
    /// # Errors
    /// When the stream breaks off.
    pub fn collect_events(self) -> Result<Vec<String>> {
        self.collect()
    }

    fn next_event(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.pending.find("\n\n") {
                let event: String = self.pending.drain(..end + 2).collect();
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Ok(Some(data.to_string())),
                    None if event.starts_with(':') => continue,
                    None => bail!("unexpected event {event:?}"),
                }
            }
            match self.exchange.piece()? {
                Some(piece) => self.pending += std::str::from_utf8(&piece).context("event is not UTF-8")?,
                None if self.pending.is_empty() => return Ok(None),
                None => bail!("the stream ended inside an event: {:?}", self.pending),
            }
        }
    }
}

impl Iterator for EventStream {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_event().transpose()
    }
}
