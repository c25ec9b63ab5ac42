//! The span of a call, for a collector only: below the router's, which comes in the call's metadata. Names and attributes are
//! those of upstream's shards.

use std::task::{Context, Poll};

use futures::TryFutureExt;
use futures::future::MapOk;
use process::TRACES_TARGET;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};
use tracing::field::Empty;
use tracing::instrument::Instrumented;
use tracing::{Instrument, Span};

/// Only these calls: the launcher asks the control service all the time.
const TRACED_SERVICE: &str = "generate.v3.TextGenerationService";

/// Puts a span around each call.
#[derive(Clone, Copy)]
pub(super) struct TraceCalls;

impl<S> Layer<S> for TraceCalls {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced(inner)
    }
}

/// A service whose calls have spans.
#[derive(Clone)]
pub(super) struct Traced<S>(S);

impl<S, B, R> Service<Request<B>> for Traced<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Instrumented<MapOk<S::Future, fn(Response<R>) -> Response<R>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let span = call_span(&request);
        self.0.call(request).map_ok(note_status as fn(_) -> _).instrument(span)
    }
}

fn call_span<B>(request: &Request<B>) -> Span {
    let path = request.uri().path();
    let Some((service, method)) = path.trim_start_matches('/').split_once('/') else { return Span::none() };
    if service != TRACED_SERVICE {
        return Span::none();
    }
    let header = |name: &str| request.headers().get(name)?.to_str().ok();
    let span = tracing::info_span!(
        target: TRACES_TARGET,
        "call",
        otel.name = path,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        rpc.grpc.status_code = Empty,
        rpc.user_agent = header("user-agent"),
        net.transport = "unix",
    );
    if !span.is_disabled() {
        process::continue_trace(&span, header);
    }
    span
}

/// A call that fails is answered with its status in the headers; one that does not, in the trailers.
fn note_status<R>(response: Response<R>) -> Response<R> {
    let span = Span::current();
    if !span.is_disabled() {
        let status = response.headers().get("grpc-status").and_then(|code| code.to_str().ok());
        let code: i64 = status.and_then(|code| code.parse().ok()).unwrap_or(0);
        span.record("rpc.grpc.status_code", code);
        if code != 0 {
            span.record("otel.status_code", "error");
        }
    }
    response
}
