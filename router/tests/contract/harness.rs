//! A router in this process, on a port of its own.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clap::Parser;
use router::args::Args;
use router::chat_template::ChatTemplate;
use router::config::RouterConfig;
use router::scheduler::Scheduler;
use router::startup::{self, ModelParts};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::http::{self, Answer};
use crate::shard::{FakeShard, Script};

/// Words are tokens: `a` 1, `b` 2, anything else 0.
const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],
    "normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"[UNK]":0,"a":1,"b":2},"unk_token":"[UNK]"}}"#;

const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('bad role') }}{% endif %}\
    <{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

pub(crate) struct TestRouter {
    pub(crate) address: SocketAddr,
    pub(crate) shard: FakeShard,
    pub(crate) scheduler: Scheduler,
    pub(crate) server: JoinHandle<()>,
    shutdown: Option<oneshot::Sender<()>>,
    directory: tempfile::TempDir,
}

impl TestRouter {
    pub(crate) async fn start(script: Script, flags: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("shard-0");
        let shard = FakeShard::start(&socket, script);
        let socket = socket.display().to_string();
        let required =
            ["router", "--max-batch-prefill-tokens", "64", "--master-shard-uds-path", socket.as_str()];
        let config = RouterConfig::from_args(Args::parse_from([&required, flags].concat())).unwrap();
        let bound = || UnixStream::connect(&socket).is_ok();
        while !bound() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let shards =
            startup::connect_and_warm_up(config.master_shard_uds_path.clone(), config.batching).await;
        let model = ModelParts {
            model_id: "test/model".to_string(),
            sha: None,
            tokenizer: hub::tokenizer_from_json(TOKENIZER.as_bytes()).unwrap(),
            template: ChatTemplate::new(TEMPLATE, None, None),
        };
        let assembled = startup::assemble(&config, shards.unwrap(), model, &Handle::current()).unwrap();
        let (state, scheduler) = (assembled.state, assembled.scheduler);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, requested) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let requested = async move { drop(requested.await) };
            router::server::serve(listener, None, state, requested).await.unwrap();
        });
        Self { address, shard, scheduler, server, shutdown: Some(shutdown), directory }
    }

    pub(crate) async fn plain() -> Self {
        Self::start(Script::default(), &[]).await
    }

    pub(crate) async fn slow(step: Duration, flags: &[&str]) -> Self {
        Self::start(Script { step, ..Default::default() }, flags).await
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let request = http::request_bytes(method, path, headers, body);
        http::read_answer(http::open(self.address, &request).await).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], body).await
    }

    /// A request whose answer is not read yet.
    pub(crate) async fn open(&self, path: &str, body: &str) -> tokio::net::TcpStream {
        let headers = [("content-type", "application/json")];
        http::open(self.address, &http::request_bytes("POST", path, &headers, body)).await
    }

    /// The value of a metric's series.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
    }

    /// Waits until `condition` holds, at most 5 seconds.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&crate::shard::State) -> bool) {
        for _ in 0..2_500 {
            if condition(&self.shard.state.lock().unwrap()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("never: {what}");
    }

    /// The next life of the shard, at the same socket.
    pub(crate) fn revive(&mut self, script: Script) {
        self.shard = FakeShard::start(&self.directory.path().join("shard-0"), script);
    }

    pub(crate) fn shut_down(&mut self) {
        drop(self.shutdown.take());
    }
}
