//! The task that has the session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use ngrok::Session;
use ngrok::config::TunnelBuilder;
use ngrok::prelude::TunnelCloser;
use ngrok::session::{ConnectError, SessionBuilder, default_connect};
use ngrok::tunnel::LabeledTunnel;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;

use super::backoff::Backoff;
use super::refusal::{Refused, told};
use super::{Connection, TunnelSettings};

/// How often ngrok is asked for a sign of life, and how long it may take: a network that swallows packets breaks no connection.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
pub(super) const HEARTBEAT_TOLERANCE: Duration = Duration::from_secs(10);

/// The longest that a step of opening may take.
const OPENING: Duration = Duration::from_secs(20);

/// The longest that taking leave may take.
const CLOSING: Duration = Duration::from_secs(2);

/// Keeps one tunnel, by one session after the other.
pub(super) struct Keeper {
    settings: TunnelSettings,
    client: SessionBuilder,
    connections: mpsc::Sender<Connection>,
}

/// A session, and who is told that it gives no sign of life.
struct Open {
    session: Session,
    silence: Arc<Notify>,
}

/// Why a session is of no use, or is no more.
enum End {
    /// Nobody wants it any more.
    Stopped,
    /// It will never be, for the reason given.
    Refused(Refused),
    /// Another try may help. One line.
    Broken(String),
}

impl Keeper {
    pub(super) fn new(
        settings: TunnelSettings,
        client: SessionBuilder,
        connections: mpsc::Sender<Connection>,
    ) -> Self {
        Self { settings, client, connections }
    }

    /// Keeps the tunnel until `stopped`; the edge gets it when `may_serve` says so.
    ///
    /// # Errors
    /// The token is wrong, which ends this at the start only: a service that is up does not end because of it.
    pub(super) async fn run(
        self,
        may_serve: oneshot::Receiver<()>,
        mut stopped: oneshot::Receiver<()>,
    ) -> Result<(), Refused> {
        let mut session = match self.connect().await {
            Ok(session) => Some(session),
            Err(End::Refused(refused)) => return Err(refused),
            Err(End::Broken(why)) => {
                tracing::warn!("No ngrok session yet: {why}");
                None
            }
            Err(End::Stopped) => None,
        };
        if may_serve.await.is_err() {
            return Ok(());
        }
        let mut backoff = Backoff::default();
        loop {
            let mut open_since = None;
            let why = match self.hold(session.take(), &mut open_since, &mut stopped).await {
                End::Stopped => return Ok(()),
                End::Refused(refused) => refused.to_string(),
                End::Broken(why) => why,
            };
            let wait = backoff.after(open_since);
            let what = if open_since.is_some() { "The ngrok tunnel broke" } else { "No ngrok tunnel" };
            tracing::warn!("{what}: {why}; next try in {wait:?}");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = &mut stopped => return Ok(()),
            }
        }
    }

    /// A session that ngrok has accepted.
    async fn connect(&self) -> Result<Open, End> {
        let silence = Arc::new(Notify::new());
        let mut client = self.client.clone();
        client.connector(|host: String, port, tls, lost| async move {
            // The crate's own retries wait 50 ms, 2.5 s, 2 min, 104 min and tell nobody: after a loss the session ends here.
            match lost {
                Some(_) => Err(ConnectError::Canceled),
                None => default_connect(host, port, tls, None).await,
            }
        });
        let told_of_silence = Arc::clone(&silence);
        client.handle_heartbeat(move |latency: Option<Duration>| {
            if latency.is_none() {
                told_of_silence.notify_one();
            }
            // A ready future would have to be movable between threads with its error in it.
            async { Ok(()) }
        });
        match timeout(OPENING, client.connect()).await {
            Ok(Ok(session)) => Ok(Open { session, silence }),
            Ok(Err(error)) => Err(match Refused::from_connect(&error, &self.settings.authtoken) {
                Some(refused) => End::Refused(refused),
                None => End::Broken(told(&error, &self.settings.authtoken)),
            }),
            Err(_) => Err(End::Broken(format!("ngrok gave no answer within {OPENING:?}"))),
        }
    }

    /// Opens the tunnel, on `session` if there is one, and hands its visitors on until it ends.
    async fn hold(
        &self,
        session: Option<Open>,
        open_since: &mut Option<Instant>,
        stopped: &mut oneshot::Receiver<()>,
    ) -> End {
        let opening = async {
            let open = match session {
                Some(open) => open,
                None => self.connect().await?,
            };
            let tunnel = self.bind(&open.session).await?;
            Ok((open, tunnel))
        };
        let (mut open, mut tunnel) = tokio::select! {
            opened = opening => match opened {
                Ok(opened) => opened,
                Err(end) => return end,
            },
            _ = &mut *stopped => return End::Stopped,
        };
        *open_since = Some(Instant::now());
        tracing::info!("The ngrok tunnel to the edge {} is open", self.settings.edge);
        let end = tokio::select! {
            why = self.hand_on(&mut tunnel) => End::Broken(why),
            () = open.silence.notified() => End::Broken("ngrok gives no sign of life".to_owned()),
            _ = stopped => End::Stopped,
        };
        // The answer to this comes behind everything that visitors were sent. A broken session needs no farewell.
        if matches!(end, End::Stopped) {
            let _ = timeout(CLOSING, tunnel.close()).await;
        }
        let _ = timeout(CLOSING, open.session.close()).await;
        end
    }

    async fn bind(&self, session: &Session) -> Result<LabeledTunnel, End> {
        let mut tunnel = session.labeled_tunnel();
        tunnel.label("edge", &self.settings.edge).forwards_to(&self.settings.forwards_to);
        match timeout(OPENING, tunnel.listen()).await {
            Ok(Ok(tunnel)) => Ok(tunnel),
            Ok(Err(error)) => Err(End::Broken(format!(
                "ngrok does not open the edge {}: {}",
                self.settings.edge,
                told(&error, &self.settings.authtoken)
            ))),
            Err(_) => Err(End::Broken(format!("ngrok gave no answer within {OPENING:?}"))),
        }
    }

    /// Until the tunnel ends; the answer is why, in one line.
    async fn hand_on(&self, tunnel: &mut LabeledTunnel) -> String {
        loop {
            match tunnel.next().await {
                // A server that takes no more is about to stop this.
                Some(Ok(connection)) => drop(self.connections.send(connection).await),
                Some(Err(error)) => return told(&error, &self.settings.authtoken),
                None => return "the session is over".to_owned(),
            }
        }
    }
}
