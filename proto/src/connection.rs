//! The connection below a client: one, and only ever one; and the stream below it, which a shard uses too.
//!
//! A channel that connects again by itself would hand a call over to the successor of the shard it was meant for, which
//! has none of its batches. So a client stands for one life of one shard: when that ends, every call fails, and
//! whoever needs the successor connects anew, knowing that everything has to be told again.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// Resolves when a connection has ended. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Closed(watch::Receiver<()>);

impl Closed {
    /// Waits for the end; at once when it has come.
    pub async fn wait(mut self) {
        // Nothing is ever sent: an error says that the sender, and with it the connection, is gone.
        while self.0.changed().await.is_ok() {}
    }
}

/// Connects to the socket at `path`.
///
/// # Errors
/// Nobody listens there, or whoever does speaks another protocol.
pub(crate) async fn connect(path: &Path) -> Result<(Channel, Closed), ConnectError> {
    let stream = UnixStream::connect(path).await.map_err(ConnectError::Socket)?;
    let (stream, closed) = Watched::new(stream, ());
    let only = Arc::new(Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_: Uri| {
        let taken = only.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the shard has closed the connection");
        std::future::ready(taken.map(TokioIo::new).ok_or_else(gone))
    });
    // The authority is never resolved: the connector above ignores it.
    let endpoint = Endpoint::from_static("http://shard.invalid");
    let channel = endpoint.connect_with_connector(connector).await.map_err(ConnectError::Protocol)?;
    Ok((channel, closed))
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The operating system's answer.
    #[error("{0}")]
    Socket(io::Error),
    /// tonic's.
    #[error("{}", innermost(.0))]
    Protocol(Error),
}

/// tonic wraps the interesting cause in "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A stream that tells of its end: whoever speaks HTTP over it drops it when the other side has gone. A server finds `info`
/// in the extensions of every request that came over it.
pub struct Watched<I> {
    stream: UnixStream,
    info: I,
    _open: watch::Sender<()>,
}

impl<I> Watched<I> {
    /// The stream, and what resolves when it has ended.
    pub fn new(stream: UnixStream, info: I) -> (Self, Closed) {
        let (open, closed) = watch::channel(());
        (Self { stream, info, _open: open }, Closed(closed))
    }
}

impl<I: Clone + Send + Sync + 'static> Connected for Watched<I> {
    type ConnectInfo = I;

    fn connect_info(&self) -> I {
        self.info.clone()
    }
}

impl<I: Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<I: Unpin> AsyncWrite for Watched<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
