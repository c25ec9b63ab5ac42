//! A Hub on the loopback interface that does what real ones do on bad days: it cuts connections, stalls, refuses, lies and
//! damages. It counts what it sends, so that tests can say what was fetched twice.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every revision.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files from this size on are kept in storage and hashed with SHA-256, as the Hub does with large ones.
const STORED_FROM: usize = 10_000;
/// Bytes that a slow server writes at once.
const SLOW_PIECE: usize = 8 << 10;

/// What goes wrong with one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status, with these header lines.
    Status(u16, Vec<String>),
    /// The connection is closed after so many bytes of the body.
    CutAfter(usize),
    /// Nothing more comes after so many bytes of the body, and the connection stays open.
    StallAfter(usize),
    /// The first byte of the body is another one.
    Corrupt,
    /// The whole file with status 200, whatever range was asked for.
    IgnoreRange,
    /// A `Content-Range` that begins one byte later than what was asked for.
    ShiftRange,
    /// A `Content-Range` with this size of the file.
    ClaimSize(u64),
    /// These bytes and the end of the connection.
    Raw(Vec<u8>),
    /// These bytes, then these again and again, until the client goes away.
    Endless(Vec<u8>, Vec<u8>),
}

/// One request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// Whether storage was asked rather than the Hub itself.
    pub is_storage: bool,
    /// The range that was asked for, as it stood there.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
}

/// What the Hub holds and does; [`FakeHub::serve`] starts it.
#[derive(Debug, Default)]
pub struct FakeHub {
    files: Vec<File>,
    rules: Mutex<Vec<Rule>>,
    bytes_per_second: Option<usize>,
    /// The list as it is sent, instead of what the files are.
    listing: Option<Value>,
}

#[derive(Debug)]
struct File {
    name: String,
    content: Vec<u8>,
    etag: String,
}

/// A fault for the requests of a path that contains `part`, so many times.
#[derive(Debug)]
struct Rule {
    part: String,
    fault: Fault,
    num_left: usize,
}

/// A Hub that serves until the process ends.
#[derive(Debug)]
pub struct RunningHub {
    /// Of the Hub.
    pub endpoint: String,
    storage: String,
    hub: FakeHub,
    requests: Mutex<Vec<Request>>,
    num_bytes: AtomicU64,
    num_connections: AtomicUsize,
}

/// Bytes without a pattern that a shifted or doubled piece would keep; the same in every run.
pub fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..size).map(next).collect()
}

impl FakeHub {
    /// Adds a file.
    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        let content = content.into();
        let etag = if is_stored(&content) {
            hexadecimal(&Sha256::digest(&content))
        } else {
            let head = format!("blob {}\0", content.len());
            hexadecimal(&Sha1::digest([head.as_bytes(), &content].concat()))
        };
        self.files.push(File { name: name.to_owned(), content, etag });
        self
    }

    /// Requests of a path that contains `part` meet `fault`, `times` times.
    pub fn fault(self, part: &str, fault: Fault, times: usize) -> Self {
        locked(&self.rules).push(Rule { part: part.to_owned(), fault, num_left: times });
        self
    }

    /// Bodies come at this rate, each connection for itself.
    pub fn slow(mut self, bytes_per_second: usize) -> Self {
        self.bytes_per_second = Some(bytes_per_second);
        self
    }

    /// Sends this as the list of files.
    pub fn listing(mut self, listing: Value) -> Self {
        self.listing = Some(listing);
        self
    }

    /// Starts to answer.
    ///
    /// # Panics
    /// When the machine has no free port.
    pub fn serve(self) -> Arc<RunningHub> {
        let bind = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (hub, storage) = (bind(), bind());
        let address = |listener: &TcpListener| {
            format!("http://{}", listener.local_addr().expect("a bound socket has an address"))
        };
        let running = Arc::new(RunningHub {
            endpoint: address(&hub),
            storage: address(&storage),
            hub: self,
            requests: Mutex::default(),
            num_bytes: AtomicU64::new(0),
            num_connections: AtomicUsize::new(0),
        });
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let running = Arc::clone(&running);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let running = Arc::clone(&running);
                    running.num_connections.fetch_add(1, Ordering::Relaxed);
                    // A client that goes away in between is what some tests are about.
                    std::thread::spawn(move || running.converse(&stream, is_storage).unwrap_or_default());
                }
            });
        }
        running
    }
}

impl RunningHub {
    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        locked(&self.requests).clone()
    }

    /// Bytes of files that were sent so far.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes.load(Ordering::Relaxed)
    }

    /// Connections that were made so far.
    pub fn num_connections(&self) -> usize {
        self.num_connections.load(Ordering::Relaxed)
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.hub.files.iter().map(|file| file.content.len() as u64).sum()
    }

    /// The content of a file.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn content(&self, name: &str) -> &[u8] {
        &self.file(name).expect("a file of this Hub").content
    }

    /// How many different ranges of files were asked for.
    pub fn num_ranges(&self) -> usize {
        let requests = locked(&self.requests);
        requests.iter().filter_map(|request| request.range.clone()).collect::<HashSet<_>>().len()
    }

    fn file(&self, name: &str) -> Option<&File> {
        self.hub.files.iter().find(|file| file.name == name)
    }

    /// Answers the requests of one connection; `None` when it is to be closed.
    fn converse(&self, stream: &TcpStream, is_storage: bool) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        loop {
            let (method, request) = read_request(&mut reader, is_storage)?;
            locked(&self.requests).push(request.clone());
            self.answer(stream, &method, &request)?;
        }
    }

    fn answer(&self, mut stream: &TcpStream, method: &str, request: &Request) -> Option<()> {
        let fault = self.take_fault(&request.path);
        match fault {
            Some(Fault::Status(status, lines)) => return send(stream, status, &lines, b"no"),
            Some(Fault::Raw(bytes)) => {
                stream.write_all(&bytes).ok()?;
                return None;
            }
            Some(Fault::Endless(first, again)) => {
                stream.write_all(&first).ok()?;
                loop {
                    stream.write_all(&again).ok()?;
                }
            }
            _ => {}
        }
        if request.path.starts_with("/api/models/org/tiny/revision/") {
            return send(stream, 200, &[], self.listing().to_string().as_bytes());
        }
        let prefix =
            if request.is_storage { "/stored/".to_owned() } else { format!("/org/tiny/resolve/{COMMIT}/") };
        let name = request.path.strip_prefix(&prefix).unwrap_or_default();
        let Some(file) = self.file(name.split('?').next().unwrap_or_default()) else {
            return send(stream, 404, &["X-Error-Code: EntryNotFound".to_owned()], b"not here");
        };
        if is_stored(&file.content) && !request.is_storage {
            // As the Hub does: the address is signed, and the file's hash is said before.
            let lines = [
                format!("Location: {}/stored/{}?signature=secret-signature", self.storage, file.name),
                format!("X-Linked-Etag: \"{}\"", file.etag),
                format!("X-Linked-Size: {}", file.content.len()),
            ];
            return send(stream, 302, &lines, b"");
        }
        self.send_file(stream, method, request, file, fault)
    }

    fn send_file(
        &self,
        mut stream: &TcpStream,
        method: &str,
        request: &Request,
        file: &File,
        fault: Option<Fault>,
    ) -> Option<()> {
        let size = file.content.len();
        let asked = request.range.as_deref().and_then(|range| parse_range(range, size));
        let is_whole = asked.is_none() || matches!(fault, Some(Fault::IgnoreRange));
        let range = asked.filter(|_| !is_whole).unwrap_or(0..size);
        let mut lines = vec![format!("ETag: \"{}\"", file.etag)];
        if !is_whole {
            let shift = usize::from(matches!(fault, Some(Fault::ShiftRange)));
            let claimed = if let Some(Fault::ClaimSize(claimed)) = fault { claimed } else { size as u64 };
            let (first, last) = (range.start + shift, range.end - 1);
            lines.push(format!("Content-Range: bytes {first}-{last}/{claimed}"));
        }
        let mut body = file.content[range].to_vec();
        if matches!(fault, Some(Fault::Corrupt)) {
            body[0] ^= 1;
        }
        let head = head(if is_whole { 200 } else { 206 }, &lines, body.len());
        stream.write_all(head.as_bytes()).ok()?;
        if method == "HEAD" {
            return Some(());
        }
        match fault {
            Some(Fault::CutAfter(count)) => {
                self.send_body(stream, &body[..count.min(body.len())])?;
                None
            }
            Some(Fault::StallAfter(count)) => {
                self.send_body(stream, &body[..count.min(body.len())])?;
                // Until the client has had enough.
                let _ = stream.read(&mut [0]);
                None
            }
            _ => self.send_body(stream, &body),
        }
    }

    fn send_body(&self, mut stream: &TcpStream, body: &[u8]) -> Option<()> {
        let piece = self.hub.bytes_per_second.map_or(body.len().max(1), |_| SLOW_PIECE);
        for bytes in body.chunks(piece) {
            stream.write_all(bytes).ok()?;
            self.num_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            if let Some(rate) = self.hub.bytes_per_second {
                std::thread::sleep(Duration::from_secs_f64(bytes.len() as f64 / rate as f64));
            }
        }
        Some(())
    }

    fn listing(&self) -> Value {
        let sibling = |file: &File| {
            let size = file.content.len();
            let mut sibling = json!({"rfilename": file.name, "size": size, "blobId": file.etag, "lfs": null});
            if is_stored(&file.content) {
                // The Git blob is the pointer then, whose hash says nothing of the content.
                sibling["blobId"] = json!("0".repeat(40));
                sibling["lfs"] = json!({"sha256": file.etag, "size": size, "pointerSize": 134});
            }
            sibling
        };
        let siblings: Vec<Value> = self.hub.files.iter().map(sibling).collect();
        self.hub.listing.clone().unwrap_or_else(|| json!({"sha": COMMIT, "siblings": siblings}))
    }

    fn take_fault(&self, path: &str) -> Option<Fault> {
        let mut rules = locked(&self.hub.rules);
        let rule = rules.iter_mut().find(|rule| rule.num_left > 0 && path.contains(&rule.part))?;
        rule.num_left -= 1;
        Some(rule.fault.clone())
    }
}

fn is_stored(content: &[u8]) -> bool {
    content.len() >= STORED_FROM
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read_request(reader: &mut impl BufRead, is_storage: bool) -> Option<(String, Request)> {
    let mut lines = reader.lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut request = Request { path, is_storage, range: None, authorization: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value.to_owned()),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Some((method, request))
}

/// The bytes that `bytes=FIRST-LAST` means.
fn parse_range(text: &str, size: usize) -> Option<Range<usize>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().unwrap_or(size));
    (first < size).then(|| first..size.min(last + 1))
}

fn head(status: u16, lines: &[String], length: usize) -> String {
    let mut head = format!("HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n");
    for line in lines {
        head.push_str(line);
        head.push_str("\r\n");
    }
    head + "\r\n"
}

fn send(mut stream: &TcpStream, status: u16, lines: &[String], body: &[u8]) -> Option<()> {
    let answer = [head(status, lines, body.len()).as_bytes(), body].concat();
    stream.write_all(&answer).ok()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
