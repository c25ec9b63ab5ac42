//! The span of an HTTP request, for a collector only: below the caller's where its headers tell of one, above everything
//! that is done for the request. It ends with the last byte of the answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use process::TRACES_TARGET;
use tracing::field::Empty;
use tracing::{Instrument, Span};

/// Middleware of the routes. Probes and metrics are asked for all the time and are not traced.
pub(super) async fn trace(request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let span = request_span(&request);
    if span.is_disabled() {
        return next.run(request).await;
    }
    process::continue_trace(&span, |name| text(request.headers(), name));
    let response = next.run(request).instrument(span.clone()).await;
    span.record("http.response.status_code", response.status().as_u16());
    if response.status().is_server_error() {
        span.record("otel.status_code", "error");
    }
    response.map(|body| Body::new(TracedBody { body, span }))
}

fn request_span(request: &Request) -> Span {
    // Routes have no parameters, so that the path is the route.
    let path = request.uri().path();
    tracing::info_span!(
        target: TRACES_TARGET,
        "HTTP request",
        otel.name = format!("{} {path}", request.method()),
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = %request.method(),
        http.route = path,
        http.response.status_code = Empty,
        user_agent.original = text(request.headers(), header::USER_AGENT.as_str()),
    )
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Keeps the span until the answer is sent or its client has gone.
struct TracedBody {
    body: Body,
    span: Span,
}

impl HttpBody for TracedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for TracedBody {
    fn drop(&mut self) {
        // A span's end is the last time that it was left.
        self.span.in_scope(|| ());
    }
}
