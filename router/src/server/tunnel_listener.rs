//! Visitors of a tunnel, as axum takes connections.

use std::io;
use std::net::SocketAddr;

use axum::serve::Listener;
use ngrok::conn::ConnInfo;

use crate::tunnel::{Connection, Visitors};

/// Gives each visitor's connection with the address that the visitor came from.
pub(super) struct TunnelListener(pub(super) Visitors);

impl Listener for TunnelListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        match self.0.recv().await {
            Some(connection) => {
                let visitor = connection.remote_addr();
                (connection, visitor)
            }
            // Nobody will come any more. Whoever serves the port decides when that is the end.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a tunnel has no address here"))
    }
}
