//! ngrok's end of a tunnel: an ingress that agents authenticate at, and an edge whose visitors they serve.
//!
//! The wire is TLS, in it muxado, in it streams that begin with their type. An agent asks with one JSON object a stream; a visitor is
//! a stream from here, which begins with a header of little-endian length.

use std::net::{Shutdown, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use muxado::typed::{StreamType, Typed, TypedAccept, TypedOpenClose, TypedSession, TypedStream};
use muxado::{MuxadoOpen, SessionBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

const AUTH: u32 = 0;
const UNBIND: u32 = 2;
const VISITOR: u32 = 3;
const BIND_LABELLED: u32 = 7;
const HEARTBEAT: u32 = u32::MAX;

/// Tunnels open within a second; the machine may be compiling beside the tests.
const DEADLINE: Duration = Duration::from_secs(90);

/// An ngrok of one account. Gone in `Drop`.
#[derive(Debug)]
pub struct FakeNgrok {
    ingress: SocketAddr,
    edge: SocketAddr,
    folder: TempDir,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

#[derive(Default)]
struct Shared {
    token: String,
    /// Labels of each tunnel that was opened, in order.
    opened: Mutex<Vec<Value>>,
    /// How many were given back.
    closed: AtomicUsize,
    is_silent: AtomicBool,
    /// Raw connections of agents, to break them.
    sockets: Mutex<Vec<std::net::TcpStream>>,
    /// Where visitors go.
    agent: Mutex<Option<Typed<MuxadoOpen>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("opened", &self.opened)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl FakeNgrok {
    /// An ngrok that takes this token only.
    ///
    /// # Errors
    /// No certificate, port or thread.
    pub fn start(token: &str) -> Result<Self> {
        Self::start_at(token, 0)
    }

    /// As [`Self::start`], with an ingress at `port`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at(token: &str, port: u16) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("quartet-ngrok-").tempdir()?;
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(folder.path().join("ca.pem"), certified.cert.pem())?;
        let key =
            PrivateKeyDer::try_from(certified.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
        let tls = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (ingress, edge) = runtime.block_on(async {
            tokio::try_join!(TcpListener::bind(("127.0.0.1", port)), TcpListener::bind(("127.0.0.1", 0)))
        })?;
        let addresses = (ingress.local_addr()?, edge.local_addr()?);
        let shared = Arc::new(Shared { token: token.to_owned(), ..Shared::default() });
        runtime.spawn(accept_agents(ingress, TlsAcceptor::from(Arc::new(tls)), Arc::clone(&shared)));
        runtime.spawn(accept_visitors(edge, Arc::clone(&shared)));
        Ok(Self { ingress: addresses.0, edge: addresses.1, folder, shared, runtime: Some(runtime) })
    }

    /// The value for `NGROK_SERVER_ADDR`.
    pub fn address(&self) -> String {
        format!("localhost:{}", self.ingress.port())
    }

    /// The value for `NGROK_ROOT_CAS`.
    pub fn root_cas(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// Where visitors come in.
    pub fn edge(&self) -> u16 {
        self.edge.port()
    }

    /// Waits until `count` tunnels were opened since the start; the answer is their labels.
    ///
    /// # Errors
    /// They are not within a generous time.
    pub fn wait_opened(&self, count: usize) -> Result<Vec<Value>> {
        let end = Instant::now() + DEADLINE;
        loop {
            let opened = lock(&self.shared.opened).clone();
            if opened.len() >= count {
                return Ok(opened);
            }
            if Instant::now() > end {
                bail!("{} tunnels instead of {count} after {DEADLINE:?}", opened.len());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// How many tunnels were given back properly.
    pub fn closed(&self) -> usize {
        self.shared.closed.load(Ordering::SeqCst)
    }

    /// Breaks every connection with an agent.
    pub fn cut(&self) {
        *lock(&self.shared.agent) = None;
        for socket in lock(&self.shared.sockets).drain(..) {
            // Fails where the agent was first.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// From now on (or no longer) agents get no sign of life, as in a network that swallows packets.
    pub fn set_silent(&self, is_silent: bool) {
        self.shared.is_silent.store(is_silent, Ordering::SeqCst);
    }
}

impl Drop for FakeNgrok {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept_agents(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), Arc::clone(&shared));
        // What an agent does wrong shows in what the test waits for in vain.
        tokio::spawn(async move { serve_agent(socket, tls, shared).await });
    }
}

async fn serve_agent(socket: TcpStream, tls: TlsAcceptor, shared: Arc<Shared>) -> Result<()> {
    let socket = socket.into_std()?;
    lock(&shared.sockets).push(socket.try_clone()?);
    let stream = tls.accept(TcpStream::from_std(socket)?).await?;
    let session = Typed::new(SessionBuilder::new(stream).server().start());
    let (agent, mut asked) = session.split_typed();
    loop {
        let stream = asked.accept_typed().await?;
        let (agent, shared) = (agent.clone(), Arc::clone(&shared));
        tokio::spawn(async move { answer(stream, agent, &shared).await });
    }
}

async fn answer(mut stream: TypedStream, agent: Typed<MuxadoOpen>, shared: &Shared) -> Result<()> {
    let kind = *stream.typ();
    if kind == HEARTBEAT {
        return beat(stream, shared).await;
    }
    let question = read_json(&mut stream).await?;
    let reply = match kind {
        AUTH => authenticate(&question, &shared.token),
        BIND_LABELLED => {
            *lock(&shared.agent) = Some(agent);
            lock(&shared.opened).push(question["Labels"].clone());
            json!({"Id": "tunnel"})
        }
        UNBIND => {
            *lock(&shared.agent) = None;
            shared.closed.fetch_add(1, Ordering::SeqCst);
            json!({})
        }
        _ => json!({"Error": format!("a question of type {kind} is not known here")}),
    };
    stream.write_all(reply.to_string().as_bytes()).await?;
    stream.shutdown().await?;
    Ok(())
}

/// As ngrok does it: a refusal repeats the token.
fn authenticate(question: &Value, token: &str) -> Value {
    let given = question["Extra"]["AuthToken"].as_str().unwrap_or_default();
    if given == token {
        return json!({"Version": "3", "ClientId": "agent", "Extra": {}});
    }
    let text = format!(
        "The authtoken you specified is properly formed, but it is invalid.\nYour authtoken: {given}\n\nERR_NGROK_107\n"
    );
    json!({"Version": "3", "ClientId": "", "Error": text, "Extra": {}})
}

async fn beat(mut stream: TypedStream, shared: &Shared) -> Result<()> {
    let mut beat = [0; 4];
    loop {
        stream.read_exact(&mut beat).await?;
        if !shared.is_silent.load(Ordering::SeqCst) {
            stream.write_all(&beat).await?;
        }
    }
}

/// An agent leaves its side open while it waits, so the end of the object is all there is to go by.
async fn read_json(stream: &mut TypedStream) -> Result<Value> {
    let mut read = Vec::new();
    loop {
        if stream.read_buf(&mut read).await? == 0 {
            bail!("an agent left in the middle of a question");
        }
        if let Ok(value) = serde_json::from_slice(&read) {
            return Ok(value);
        }
    }
}

async fn accept_visitors(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((socket, from)) = listener.accept().await {
        let agent = lock(&shared.agent).clone();
        // Without an agent the visitor finds a closed door: the socket is dropped.
        let Some(agent) = agent else { continue };
        tokio::spawn(async move { lead(socket, from, agent).await });
    }
}

/// Leads a visitor through the tunnel.
async fn lead(mut socket: TcpStream, from: SocketAddr, mut agent: Typed<MuxadoOpen>) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut stream = agent.open_typed(StreamType::clamp(VISITOR)).await?;
    let header = json!({
        "Id": "tunnel", "ClientAddr": from.to_string(), "Proto": "https", "EdgeType": "3", "PassthroughTLS": false,
    })
    .to_string();
    let length = i64::try_from(header.len()).context("a header's length")?;
    stream.write_all(&length.to_le_bytes()).await?;
    stream.write_all(header.as_bytes()).await?;
    copy_bidirectional(&mut socket, &mut *stream).await?;
    Ok(())
}
