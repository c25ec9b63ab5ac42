//! Whether children are ready: a shard when it answers this launcher's handshake, the router when `/health` is 200.
//!
//! There is no timeout: a large model may load for minutes, and a child that dies is noticed elsewhere at once.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::ShardClient;

use crate::router_http;
use crate::startup_ledger::RankStart;

/// A small model is ready in tens of milliseconds, so the first looks are close together.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Looks cost little, but a load that takes a minute should not be looked at twelve thousand times.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// A handshake is answered without the engine; a slower answer is a hang and is asked again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How often to say that one is still waiting, as upstream.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Pauses that grow, and a line every ten seconds.
struct Patience {
    pause: Duration,
    started: Instant,
    said: Instant,
}

impl Patience {
    fn new() -> Self {
        let now = Instant::now();
        Self { pause: FIRST_PAUSE, started: now, said: now }
    }

    async fn wait(&mut self, for_what: &str, last_answer: &str) {
        if self.said.elapsed() >= SAY_EVERY {
            self.said = Instant::now();
            let waited = self.started.elapsed().as_secs();
            tracing::info!("Waiting for {for_what} to be ready for {waited} s; last answer: {last_answer}");
        }
        tokio::time::sleep(self.pause).await;
        self.pause = self.pause.mul_f64(1.25).min(LONGEST_PAUSE);
    }
}

/// Returns when the shard on `socket`, which was started at `spawned`, has answered with `instance_id` and `rank`.
pub async fn shard_ready(
    socket: PathBuf,
    instance_id: String,
    rank: usize,
    spawned: SystemTime,
) -> RankStart {
    let mut patience = Patience::new();
    loop {
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, shake_hands(&socket, &instance_id, rank)).await;
        match answer.unwrap_or_else(|_| Err("none within two seconds".to_owned())) {
            Ok(client) => return rank_start(client, spawned, SystemTime::now()).await,
            Err(reason) => patience.wait("shard", &reason).await,
        }
    }
}

/// What the shard counted. A start is not held up by one that says nothing.
async fn rank_start(mut shard: ShardClient, spawned: SystemTime, ready: SystemTime) -> RankStart {
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, shard.status()).await;
    let status = asked.ok().and_then(Result::ok).unwrap_or_default();
    let phases = status.startup.into_iter().map(|phase| (phase.name, Duration::from_nanos(phase.nanos)));
    let began = Duration::from_nanos(status.started_unix_nanos);
    RankStart {
        spawned,
        began: (!began.is_zero()).then_some(UNIX_EPOCH + began),
        phases: phases.collect(),
        ready,
    }
}

async fn shake_hands(socket: &Path, instance_id: &str, rank: usize) -> Result<ShardClient, String> {
    let mut client = ShardClient::connect(socket).await.map_err(|error| error.to_string())?;
    let answer = client.handshake().await.map_err(|error| error.to_string())?;
    if answer.instance_id != instance_id {
        return Err(format!("a shard of another launcher (instance {:?})", answer.instance_id));
    }
    if answer.rank as usize != rank {
        return Err(format!("rank {} on the socket of rank {rank}", answer.rank));
    }
    Ok(client)
}

/// Returns when `GET /health` on the router that listens on `bind` answers 200.
pub async fn router_healthy(bind: SocketAddr) {
    let mut patience = Patience::new();
    loop {
        match tokio::time::timeout(ANSWER_TIMEOUT, router_http::status_of(bind, "/health")).await {
            Ok(Ok(status)) if status == "200" => return,
            Ok(Ok(status)) => patience.wait("router", &format!("/health {status}")).await,
            Ok(Err(error)) => patience.wait("router", &error.to_string()).await,
            Err(_) => patience.wait("router", "none within two seconds").await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proto::control::shard_control_server::{ShardControl, ShardControlServer};
    use proto::control::{HandshakeRequest, HandshakeResponse, StatusRequest, StatusResponse};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;

    /// Shards that sit on the socket one after the other: their instance and rank. The last one stays.
    #[derive(Clone)]
    struct Shards(Arc<Mutex<Vec<(&'static str, u32)>>>);

    #[tonic::async_trait]
    impl ShardControl for Shards {
        async fn handshake(
            &self,
            _: Request<HandshakeRequest>,
        ) -> Result<Response<HandshakeResponse>, Status> {
            let mut shards = self.0.lock().unwrap();
            let (instance_id, rank) = if shards.len() > 1 { shards.remove(0) } else { shards[0] };
            let instance_id = instance_id.to_owned();
            Ok(Response::new(HandshakeResponse { instance_id, rank, ..Default::default() }))
        }

        async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
            Ok(Response::new(StatusResponse::default()))
        }
    }

    #[tokio::test]
    async fn a_shard_is_ready_when_it_is_this_starts_and_this_rank() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s-1");
        // A file is no answer.
        std::fs::write(&socket, "").unwrap();
        let ready = tokio::spawn(shard_ready(socket.clone(), "this".to_owned(), 1, SystemTime::now()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!ready.is_finished());
        std::fs::remove_file(&socket).unwrap();
        let shards = Shards(Arc::new(Mutex::new(vec![("", 1), ("earlier", 1), ("this", 0), ("this", 1)])));
        let listener = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let service = ShardControlServer::new(shards.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        let serving = tokio::spawn(server.serve_with_incoming(listener));
        ready.await.unwrap();
        assert_eq!(shards.0.lock().unwrap().as_slice(), [("this", 1)], "the others were not taken for it");
        serving.abort();
    }

    #[tokio::test]
    async fn router_is_healthy_at_its_first_200() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bind = listener.local_addr().unwrap();
        let router = tokio::spawn(async move {
            for status in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                let read = stream.read(&mut request).await.unwrap();
                assert!(request[..read].starts_with(b"GET /health HTTP/1.1\r\n"));
                stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await.unwrap();
            }
        });
        router_healthy(bind).await;
        router.await.unwrap();
    }
}
