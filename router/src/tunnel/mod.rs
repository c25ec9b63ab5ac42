//! A tunnel to ngrok: what visits the edge is served as if it had come to the port.
//!
//! One task, the keeper, has the session with ngrok: it authenticates at once, so that a wrong token is told before a model is
//! loaded, offers the edge its connections only when there is somebody to answer them, and opens a broken tunnel again. What
//! connections carry is none of its business; [`crate::server`] takes them.

mod backoff;
mod keeper;
mod refusal;

use std::fmt;
use std::path::PathBuf;

use ngrok::session::SessionBuilder;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use keeper::{HEARTBEAT_INTERVAL, HEARTBEAT_TOLERANCE, Keeper};
pub use refusal::Refused;

/// A visitor's connection.
pub type Connection = ngrok::EdgeConn;

/// The connections that come through the tunnel, whichever session they come by.
pub type Visitors = mpsc::Receiver<Connection>;

/// Connections that may wait to be taken; taking one is a matter of microseconds.
const WAITING_VISITORS: usize = 64;

/// Where the tunnel goes, and who says so.
#[derive(Clone, PartialEq, Eq)]
pub struct TunnelSettings {
    /// Proves whose tunnel it is. Shown nowhere.
    pub authtoken: String,
    /// Value of the label `edge`.
    pub edge: String,
    /// `host:port` of ngrok's own ingress, when it is not the public one.
    pub server_addr: Option<String>,
    /// PEM file of the authority that the ingress is certified by, `host` for those of the machine; default: ngrok's own.
    pub root_cas: Option<PathBuf>,
    /// What the dashboard shows as this tunnel's other end.
    pub forwards_to: String,
}

impl fmt::Debug for TunnelSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelSettings")
            .field("edge", &self.edge)
            .field("server_addr", &self.server_addr)
            .field("root_cas", &self.root_cas)
            .field("forwards_to", &self.forwards_to)
            .finish_non_exhaustive()
    }
}

impl TunnelSettings {
    /// A client that would open it.
    ///
    /// # Errors
    /// The address is none, or the file cannot be read: one line.
    fn client(&self) -> Result<SessionBuilder, String> {
        let mut client = ngrok::Session::builder();
        client.authtoken(&self.authtoken).client_info("quartet", env!("CARGO_PKG_VERSION"), None::<String>);
        for heartbeat in [
            client.heartbeat_interval(HEARTBEAT_INTERVAL).map(|_| ()).map_err(|error| error.to_string()),
            client.heartbeat_tolerance(HEARTBEAT_TOLERANCE).map(|_| ()).map_err(|error| error.to_string()),
        ] {
            heartbeat?;
        }
        if let Some(address) = &self.server_addr {
            client.server_addr(address).map_err(|_| {
                format!("--ngrok-server-addr is `{address}`, expected HOST:PORT of an ngrok ingress")
            })?;
        }
        if let Some(path) = &self.root_cas {
            let shown = path.display();
            client
                .root_cas(path.to_string_lossy())
                .map_err(|error| format!("--ngrok-root-cas {shown} cannot be read: {error}"))?;
        }
        Ok(client)
    }
}

/// A tunnel; it closes when this is dropped, at once and without a word to ngrok.
#[derive(Debug)]
pub struct Tunnel {
    serve: Option<oneshot::Sender<()>>,
    visitors: Option<Visitors>,
    stop: Option<oneshot::Sender<()>>,
    /// None once it has ended.
    keeper: Option<JoinHandle<Result<(), Refused>>>,
}

impl Tunnel {
    /// Begins to authenticate.
    ///
    /// # Errors
    /// One line about settings that mean nothing.
    pub fn open(settings: TunnelSettings) -> Result<Self, String> {
        let client = settings.client()?;
        let (serve, may_serve) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let (connections, visitors) = mpsc::channel(WAITING_VISITORS);
        let keeper = tokio::spawn(Keeper::new(settings, client, connections).run(may_serve, stopped));
        Ok(Self { serve: Some(serve), visitors: Some(visitors), stop: Some(stop), keeper: Some(keeper) })
    }

    /// From now on the edge may send visitors. The second call has none to give.
    pub fn take_visitors(&mut self) -> Option<Visitors> {
        if let Some(serve) = self.serve.take() {
            // A keeper that is gone was refused, which `refused` tells.
            let _ = serve.send(());
        }
        self.visitors.take()
    }

    /// Resolves when ngrok says that it will never open this tunnel. What may pass is not told here: the keeper tries again.
    pub async fn refused(&mut self) -> Refused {
        let Some(keeper) = &mut self.keeper else { return std::future::pending().await };
        let ended = keeper.await;
        self.keeper = None;
        match ended {
            Ok(Err(refused)) => refused,
            Ok(Ok(())) => std::future::pending().await,
            Err(panic) => Refused::failed(&panic),
        }
    }

    /// Takes leave of ngrok, once everybody who came through is answered: what they were sent is on its way before that.
    pub async fn close(mut self) {
        drop(self.stop.take());
        if let Some(keeper) = &mut self.keeper {
            // Bounded by the keeper. A refusal that nobody has heard of comes too late to matter.
            let _ = keeper.await;
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
    }
}
