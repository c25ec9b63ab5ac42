//! The API key. Every route needs it unless it is listed here.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Routes that probes, scrapers and clients without a key may read.
const OPEN_TO_GET: [&str; 9] =
    ["/", "/health", "/ping", "/startup", "/ready", "/live", "/info", "/metrics", "/v1/models"];

/// TGI leaves this one open, although it tokenizes.
const OPEN_TO_POST: [&str; 1] = ["/chat_tokenize"];

/// The header a client must send.
#[derive(Clone)]
pub(super) struct ApiKey(Arc<str>);

impl ApiKey {
    pub(super) fn new(key: &str) -> Self {
        Self(format!("Bearer {key}").into())
    }

    /// TGI compares the whole header without regard to case. The time taken tells nothing about where they differ.
    fn matches(&self, header: &[u8]) -> bool {
        let expected = self.0.as_bytes();
        let lower = |byte: &u8| byte.to_ascii_lowercase();
        let difference = expected.iter().zip(header).fold(0, |bits, (a, b)| bits | (lower(a) ^ lower(b)));
        expected.len() == header.len() && difference == 0
    }
}

/// Answers 401 with an empty body when the key is missing or wrong.
pub(super) async fn require_key(State(key): State<ApiKey>, request: Request, next: Next) -> Response {
    let header = request.headers().get(header::AUTHORIZATION);
    if is_open(request.method(), request.uri().path())
        || header.is_some_and(|header| key.matches(header.as_bytes()))
    {
        next.run(request).await
    } else {
        StatusCode::UNAUTHORIZED.into_response()
    }
}

fn is_open(method: &Method, path: &str) -> bool {
    match *method {
        Method::GET | Method::HEAD => OPEN_TO_GET.contains(&path),
        Method::POST => OPEN_TO_POST.contains(&path),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_header_is_compared_without_case() {
        let key = ApiKey::new("Secret");
        assert!(key.matches(b"Bearer Secret"));
        assert!(key.matches(b"bearer sECRET"));
        for wrong in [&b"Bearer Secre"[..], b"Bearer Secret1", b"Secret", b"", b"Basic Secret!"] {
            assert!(!key.matches(wrong));
        }
    }

    #[test]
    fn only_reading_is_open() {
        assert!(is_open(&Method::GET, "/health"));
        assert!(!is_open(&Method::POST, "/"));
        assert!(!is_open(&Method::PUT, "/health"));
        assert!(!is_open(&Method::GET, "/generate"));
    }
}
