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
    let mut response = Body::from_stream(SseBody::new(streams, writer, KEEP_ALIVE)).into_response();
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
    /// How long silence may last.
    max_silence: Duration,
    keep_alive: Pin<Box<Sleep>>,
    last_sent: Instant,
    is_finished: bool,
}

impl<W: EventWriter> SseBody<W> {
    fn new(streams: Result<Vec<GenerateStream>, InferError>, writer: W, max_silence: Duration) -> Self {
        let (streams, failed) = match streams {
            Ok(streams) => (streams.into_iter().map(Some).collect(), None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let keep_alive = Box::pin(tokio::time::sleep(max_silence));
        let last_sent = Instant::now();
        Self { streams, failed, writer, max_silence, keep_alive, last_sent, is_finished: false }
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
            let is_due = now >= self.last_sent + self.max_silence;
            if is_due {
                self.last_sent = now;
            }
            self.keep_alive.as_mut().reset(self.last_sent + self.max_silence);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::StreamExt;
    use tokio::sync::mpsc;

    use super::*;
    use crate::infer::Permits;
    use crate::metrics::{BucketLimits, Metrics};
    use crate::scheduler::{GeneratedToken, HealthFlag, Scheduled, SchedulerError};

    /// `[index]` for a token, `!` for an error, `.` at the end.
    struct Marks;

    impl EventWriter for Marks {
        fn write(&mut self, index: usize, event: Result<Event, InferError>, out: &mut Vec<u8>) {
            match event {
                Ok(_) => out.extend_from_slice(format!("[{index}]").as_bytes()),
                Err(_) => out.push(b'!'),
            }
        }

        fn finish(&mut self, out: &mut Vec<u8>) {
            out.push(b'.');
        }
    }

    type Sender = mpsc::UnboundedSender<Result<Event, SchedulerError>>;

    fn stream() -> (Sender, GenerateStream) {
        let (sender, events) = mpsc::unbounded_channel();
        let limits = BucketLimits { max_input_tokens: 1, max_total_tokens: 2 };
        let metrics = Arc::new(Metrics::new(limits).unwrap());
        let permit = Permits::new(1, HealthFlag::default()).take().unwrap();
        let arrived = std::time::Instant::now();
        (sender, GenerateStream::new(Scheduled { events }, 1, arrived, permit, metrics))
    }

    fn token() -> Result<Event, SchedulerError> {
        Ok(Event::Token(GeneratedToken::default()))
    }

    async fn next(body: &mut SseBody<Marks>) -> Option<String> {
        let bytes = body.next().await?.unwrap();
        Some(String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn what_is_there_goes_out_in_one_buffer_interleaved() {
        let ((first, a), (second, b)) = (stream(), stream());
        let mut body = SseBody::new(Ok(vec![a, b]), Marks, KEEP_ALIVE);
        for sender in [&first, &first, &second] {
            sender.send(token()).unwrap();
        }
        assert_eq!(next(&mut body).await.unwrap(), "[0][1][0]");
        second.send(token()).unwrap();
        drop((first, second));
        assert_eq!(next(&mut body).await.unwrap(), "![1]!.", "no last token is an error");
        assert_eq!(next(&mut body).await, None);
    }

    #[tokio::test]
    async fn silence_is_broken_by_a_comment_and_tokens_put_it_off() {
        let (sender, stream) = stream();
        let silence = Duration::from_millis(60);
        let mut body = SseBody::new(Ok(vec![stream]), Marks, silence);
        tokio::time::sleep(silence / 2).await;
        sender.send(token()).unwrap();
        assert_eq!(next(&mut body).await.unwrap(), "[0]");
        let started = Instant::now();
        assert_eq!(next(&mut body).await.unwrap(), ":\n\n");
        assert!(started.elapsed() >= silence - Duration::from_millis(2), "{:?}", started.elapsed());
        let started = Instant::now();
        assert_eq!(next(&mut body).await.unwrap(), ":\n\n");
        assert!(started.elapsed() >= silence - Duration::from_millis(2), "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_refusal_is_one_event_and_the_end() {
        let mut body = SseBody::new(Err(InferError::Incomplete), Marks, KEEP_ALIVE);
        assert_eq!(next(&mut body).await.unwrap(), "!.");
        assert_eq!(next(&mut body).await, None);
    }
}
