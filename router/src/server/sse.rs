//! Streams of server-sent events, written as bytes.
//!
//! This is the hot path of the router: a poll takes what tokens are there, serializes each once, and hands hyper one
//! buffer. Nothing is locked and no timer is touched for a token: the keep-alive timer is only looked at when it
//! fires, and then put off if something was sent meanwhile.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use crate::infer::{GenerateStream, InferError};
use crate::scheduler::Event;

/// Silence after which a comment keeps proxies from closing the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A buffer this full is sent before more is added: a slow client must not make it grow.
const FLUSH_BYTES: usize = 16 * 1024;

/// Room for a token's event; larger ones grow the buffer.
const EVENT_BYTES: usize = 384;

/// How events look on one route.
pub(super) trait EventWriter: Send + Unpin + 'static {
    /// Writes what `event` of the stream number `index` becomes.
    fn write(&mut self, index: usize, event: Result<Event, InferError>, out: &mut Vec<u8>);

    /// Writes what comes after the last event.
    fn finish(&mut self, out: &mut Vec<u8>);
}

/// One event: `data: `, the JSON, a blank line.
pub(super) fn write_event(out: &mut Vec<u8>, event: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    let start = out.len();
    if serde_json::to_writer(&mut *out, event).is_err() {
        // Our types cannot fail to serialize; if one ever does, the client gets TGI's words for it.
        out.truncate(start);
        out.extend_from_slice(
            br#"{"error":"Stream event serialization error","error_type":"stream_serialization_error"}"#,
        );
    }
    out.extend_from_slice(b"\n\n");
}

/// The end mark of OpenAI's routes.
pub(super) fn write_done(out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: [DONE]\n\n");
}

/// Answers with events. The status is 200 even when there was an error: it becomes the only event.
pub(super) fn respond<W: EventWriter>(
    headers: HeaderMap,
    streams: Result<Vec<GenerateStream>, InferError>,
    writer: W,
) -> Response {
    let mut response = Body::from_stream(SseBody::new(streams, writer)).into_response();
    let response_headers = response.headers_mut();
    response_headers.extend(headers);
    response_headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response_headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

struct SseBody<W> {
    /// A finished stream is dropped at once, which gives its permit back.
    streams: Vec<Option<GenerateStream>>,
    failed: Option<InferError>,
    writer: W,
    keep_alive: Pin<Box<Sleep>>,
    last_sent: Instant,
    is_finished: bool,
}

impl<W: EventWriter> SseBody<W> {
    fn new(streams: Result<Vec<GenerateStream>, InferError>, writer: W) -> Self {
        let (streams, failed) = match streams {
            Ok(streams) => (streams.into_iter().map(Some).collect(), None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let keep_alive = Box::pin(tokio::time::sleep(KEEP_ALIVE));
        Self { streams, failed, writer, keep_alive, last_sent: Instant::now(), is_finished: false }
    }

    /// Writes one event of every stream that has one; whether any had.
    fn poll_round(&mut self, context: &mut Context<'_>, out: &mut Vec<u8>) -> bool {
        let mut has_written = false;
        for (index, slot) in self.streams.iter_mut().enumerate() {
            let Some(stream) = slot else { continue };
            match stream.poll_next(context) {
                Poll::Pending => {}
                Poll::Ready(None) => *slot = None,
                Poll::Ready(Some(event)) => {
                    if matches!(event, Ok(Event::Last(..)) | Err(_)) {
                        *slot = None;
                    }
                    self.writer.write(index, event, out);
                    has_written = true;
                }
            }
        }
        has_written
    }

    fn poll_keep_alive(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            std::task::ready!(self.keep_alive.as_mut().poll(context));
            let now = Instant::now();
            let is_due = now >= self.last_sent + KEEP_ALIVE;
            if is_due {
                self.last_sent = now;
            }
            self.keep_alive.as_mut().reset(self.last_sent + KEEP_ALIVE);
            if is_due {
                return Poll::Ready(());
            }
        }
    }
}

impl<W: EventWriter> Stream for SseBody<W> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.is_finished {
            return Poll::Ready(None);
        }
        let mut out = Vec::new();
        if let Some(error) = this.failed.take() {
            this.writer.write(0, Err(error), &mut out);
        }
        while out.len() < FLUSH_BYTES {
            out.reserve(EVENT_BYTES);
            if !this.poll_round(context, &mut out) {
                break;
            }
        }
        if this.streams.iter().all(Option::is_none) {
            this.is_finished = true;
            this.writer.finish(&mut out);
        }
        if !out.is_empty() {
            this.last_sent = Instant::now();
            return Poll::Ready(Some(Ok(out.into())));
        }
        if this.is_finished {
            return Poll::Ready(None);
        }
        std::task::ready!(this.poll_keep_alive(context));
        Poll::Ready(Some(Ok(Bytes::from_static(b":\n\n"))))
    }
}
