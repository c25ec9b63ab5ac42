//! Requests to the Hub: redirects, the token, time limits.
//!
//! hf-hub's own client has no time limits, and its retries append to a continued file from its start; so transfers are made
//! here, with the HTTP library that it brings, and hf-hub gives the layout of the cache and the Hub's paths.

use std::io::{self, Read};
use std::ops::Range;
use std::time::{Duration, SystemTime};

use ureq::http::{HeaderMap, Uri, header};
use ureq::{Agent, Body};

use super::failure::Failure;
use crate::args::HubOptions;

/// The public Hub.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Redirects one request may take; the Hub needs two.
const MAX_REDIRECTS: usize = 8;

/// A connection pool to the Hub, with our name and token.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    origin: Origin,
    authorization: Option<header::HeaderValue>,
    stall_timeout: Duration,
}

/// An answer with a success status.
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The headers of the last hop.
    pub(super) headers: HeaderMap,
    /// What the Hub itself says of the file.
    pub(super) linked: Linked,
    /// What follows.
    pub(super) body: Body,
}

/// What the Hub says of a file before it sends us elsewhere.
#[derive(Clone, Debug, Default)]
pub(super) struct Linked {
    /// The content's hash, without quotes.
    pub(super) etag: Option<String>,
    /// The content's size in bytes.
    pub(super) size: Option<u64>,
}

#[derive(Clone, Copy)]
enum Method {
    Get,
    Head,
}

impl Client {
    /// A client for the Hub of `options`.
    ///
    /// # Errors
    /// The endpoint is no HTTP address, or the token cannot be sent.
    pub(super) fn new(options: &HubOptions) -> Result<Self, Failure> {
        let endpoint = if options.endpoint.is_empty() { DEFAULT_ENDPOINT } else { &options.endpoint };
        let origin = Origin::of(endpoint).ok_or_else(|| {
            Failure::Wrong(format!("found HF_ENDPOINT {endpoint:?}, expected http(s)://HOST[:PORT]"))
        })?;
        let authorization = match &options.token {
            None => None,
            Some(token) => {
                let value = header::HeaderValue::from_str(&format!("Bearer {}", token.reveal()));
                // The text of a wrong token is kept out of the message.
                let mut value = value.map_err(|_| {
                    Failure::Wrong("the access token has characters that no token has".to_owned())
                })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let stall_timeout = options.download.stall_timeout;
        let limit = Some(stall_timeout);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed by hand, since the token must not go along.
            .max_redirects(0)
            .user_agent(concat!("quartet/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .timeout_per_write(limit)
            .max_idle_connections_per_host(options.download.connections)
            .build();
        Ok(Self { agent: config.into(), endpoint: endpoint.to_owned(), origin, authorization, stall_timeout })
    }

    /// `GET`s a path of the Hub, or a range of bytes of what is there.
    ///
    /// # Errors
    /// There is no answer, or one without a success status.
    pub(super) fn get(&self, path: &str, range: Option<Range<u64>>) -> Result<Answer, Failure> {
        self.follow(Method::Get, path, range)
    }

    /// `HEAD`s a path of the Hub.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub(super) fn head(&self, path: &str) -> Result<Answer, Failure> {
        self.follow(Method::Head, path, None)
    }

    /// The whole body of a path, when it is no longer than `limit` bytes and comes within a time in proportion.
    ///
    /// # Errors
    /// As [`Client::get`], or the body is longer or slower than that.
    pub(super) fn get_text(&self, path: &str, limit: u64) -> Result<String, Failure> {
        let mut reader = self.get(path, None)?.body.into_reader();
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        let started = std::time::Instant::now();
        // A server that sends a byte now and then never stalls.
        let deadline = self.stall_timeout * 6;
        loop {
            match reader.read(&mut buffer).map_err(|error| self.broken_read(&error))? {
                0 => break,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
            if bytes.len() as u64 > limit {
                return Err(Failure::Wrong(format!(
                    "found an answer of more than {} MiB, expected a list of files",
                    limit >> 20
                )));
            }
            if started.elapsed() > deadline {
                let seconds = deadline.as_secs_f64();
                return Err(Failure::Connection(format!("the answer is not complete after {seconds:.0} s")));
            }
        }
        String::from_utf8(bytes).map_err(|_| Failure::Wrong("the answer is not text".to_owned()))
    }

    /// What a failed read of a body means.
    pub(super) fn broken_read(&self, error: &io::Error) -> Failure {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
            Some(inner) => self.broken(inner),
            None => Failure::Connection(format!("the connection broke: {error}")),
        }
    }

    fn broken(&self, error: &ureq::Error) -> Failure {
        let seconds = self.stall_timeout.as_secs_f64();
        match error {
            ureq::Error::Timeout(_) => Failure::Connection(format!("nothing came for {seconds} s")),
            ureq::Error::LargeResponseHeader(_, allowed) => {
                Failure::Wrong(format!("found headers of more than {allowed} bytes"))
            }
            // Its text has the address, and signed addresses are secrets.
            ureq::Error::BadUri(_) => Failure::Wrong("found an address that is none".to_owned()),
            error => Failure::Connection(one_line(&error.to_string())),
        }
    }

    fn follow(&self, method: Method, path: &str, range: Option<Range<u64>>) -> Result<Answer, Failure> {
        let mut url = format!("{}{path}", self.endpoint);
        let mut linked = Linked::default();
        for _ in 0..=MAX_REDIRECTS {
            let is_hub = Origin::of(&url).is_some_and(|origin| origin == self.origin);
            let mut request = match method {
                Method::Get => self.agent.get(&url),
                Method::Head => self.agent.head(&url),
            };
            // Sizes and ranges are of the file itself.
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if let Some(Range { start, end }) = range {
                request = request.header(header::RANGE, format!("bytes={start}-{}", end.saturating_sub(1)));
            }
            // To the Hub only: whoever it sends us to has no business with the token.
            if let Some(value) = self.authorization.as_ref().filter(|_| is_hub) {
                request = request.header(header::AUTHORIZATION, value);
            }
            let response = request.call().map_err(|error| self.broken(&error))?;
            let (parts, body) = response.into_parts();
            let status = parts.status.as_u16();
            if is_hub || linked.etag.is_none() {
                linked.note(&parts.headers, parts.status.is_success());
            }
            match status {
                200..=299 => return Ok(Answer { status, headers: parts.headers, linked, body }),
                301 | 302 | 303 | 307 | 308 => url = redirected(&url, &parts.headers)?,
                _ => return Err(refusal(status, &parts.headers, is_hub)),
            }
        }
        Err(Failure::Wrong(format!("found more than {MAX_REDIRECTS} redirects in a row")))
    }
}

impl Linked {
    /// Takes what one hop says; what an earlier one said stays.
    fn note(&mut self, headers: &HeaderMap, is_last: bool) {
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        self.etag = self.etag.take().or(etag);
        let length = if is_last { text(headers, "content-length") } else { None };
        let size = text(headers, "x-linked-size").or(length).and_then(|size| size.trim().parse().ok());
        self.size = self.size.or(size);
    }
}

/// Scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    /// `None` for what is no HTTP address.
    fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let usual_port = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        Some(Self { scheme, host, port: uri.port_u16().unwrap_or(usual_port) })
    }
}

/// Where a redirect leads.
fn redirected(from: &str, headers: &HeaderMap) -> Result<String, Failure> {
    let location = text(headers, "location").unwrap_or_default();
    let scheme = from.split("://").next().unwrap_or_default();
    let url = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        let authority = from.split('/').nth(2).unwrap_or_default();
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    match Origin::of(&url) {
        Some(origin) if scheme == "https" && origin.scheme != "https" => {
            Err(Failure::Wrong(format!("found a redirect to {} without encryption", origin.host)))
        }
        Some(_) => Ok(url),
        // The address may carry a signature, so it is not shown.
        None => Err(Failure::Wrong("found a redirect to what is no HTTP address".to_owned())),
    }
}

fn refusal(status: u16, headers: &HeaderMap, from_hub: bool) -> Failure {
    let code = text(headers, "x-error-code").unwrap_or_default();
    let code = code.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    Failure::Status { status, code, retry_after: retry_after(headers, SystemTime::now()), from_hub }
}

/// The pause a server asks for: `Retry-After` in seconds or as a date, else the rest of the Hub's rate limit window.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    if let Some(value) = text(headers, "retry-after").map(str::trim) {
        if let Ok(seconds) = value.parse() {
            return Some(Duration::from_secs(seconds));
        }
        let date = httpdate::parse_http_date(value).ok()?;
        // A date that is over means now.
        return Some(date.duration_since(now).unwrap_or_default());
    }
    let window = text(headers, "ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
    window.parse().ok().map(Duration::from_secs)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Another's words as one line of bounded length.
pub(super) fn one_line(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn origins_differ_in_scheme_host_or_port() {
        let hub = Origin::of("https://hub.example").unwrap();
        assert_eq!(Origin::of("https://HUB.example:443/a/b").unwrap(), hub);
        for other in ["http://hub.example", "https://hub.example:444", "https://cdn.hub.example"] {
            assert_ne!(Origin::of(other).unwrap(), hub, "{other}");
        }
        assert_eq!(Origin::of("ftp://hub.example"), None);
        assert_eq!(Origin::of("/path"), None);
    }

    #[test]
    fn redirects_are_resolved_and_never_lose_encryption() {
        let to = |location| redirected("https://hub.example/a", &headers(&[("location", location)]));
        assert_eq!(to("/b").unwrap(), "https://hub.example/b");
        assert_eq!(to("//cdn.example/b").unwrap(), "https://cdn.example/b");
        assert_eq!(to("https://cdn.example/b?sig=1").unwrap(), "https://cdn.example/b?sig=1");
        for (bad, text) in [("http://cdn.example/b", "without encryption"), ("file:///etc/passwd", "no HTTP")]
        {
            assert!(to(bad).unwrap_err().to_string().contains(text), "{bad}");
        }
        assert!(redirected("https://hub.example/a", &HeaderMap::new()).is_err());
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let of = |pairs: &[(&'static str, &str)]| retry_after(&headers(pairs), now);
        assert_eq!(of(&[("retry-after", "12")]), Some(Duration::from_secs(12)));
        let later = httpdate::fmt_http_date(now + Duration::from_secs(30));
        assert_eq!(of(&[("retry-after", &later)]), Some(Duration::from_secs(30)));
        let over = httpdate::fmt_http_date(now - Duration::from_secs(30));
        assert_eq!(of(&[("retry-after", &over)]), Some(Duration::ZERO));
        assert_eq!(of(&[("retry-after", "soon")]), None);
        assert_eq!(of(&[("ratelimit", "\"api\";r=0;t=55")]), Some(Duration::from_secs(55)));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn the_hubs_word_on_a_file_stays_when_storage_says_something_else() {
        let mut linked = Linked::default();
        linked.note(&headers(&[("x-linked-etag", "\"abc\""), ("x-linked-size", "7")]), false);
        linked.note(&headers(&[("etag", "\"other\""), ("content-length", "9")]), true);
        assert_eq!((linked.etag.as_deref(), linked.size), (Some("abc"), Some(7)));
        let mut plain = Linked::default();
        plain.note(&headers(&[("etag", "W/\"x-1\""), ("content-length", "9")]), true);
        assert_eq!((plain.etag.as_deref(), plain.size), (Some("x-1"), Some(9)));
    }

    #[test]
    fn a_token_that_cannot_be_sent_is_not_shown() {
        let options = HubOptions { token: Some("hf_se\ncret".into()), ..HubOptions::default() };
        let error = Client::new(&options).unwrap_err().to_string();
        assert!(error.contains("access token") && !error.contains("hf_se"), "{error}");
        let good = HubOptions { token: Some("hf_secret".into()), ..HubOptions::default() };
        assert!(!format!("{:?}", Client::new(&good).unwrap()).contains("hf_secret"));
    }
}
