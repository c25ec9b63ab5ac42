//! The shards over several lives, for the batching task; and the present client, for the health check.

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::{ClientError, ShardedClient};
use tokio::sync::watch;

use super::warmup::{WarmedUp, connect_and_warm_up};
use crate::RouterError;
use crate::config::{BatchingConfig, Limits};
use crate::scheduler::{Regained, ShardGroup, Unrecoverable};

/// A small model is back within tenths of a second, so the first looks are close together.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// A look is one refused connection; a large model takes minutes to load.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// How often to say that one is still waiting.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Shards that somebody else starts again, always at the same socket.
pub(super) struct Shards {
    master_uds_path: PathBuf,
    flags: BatchingConfig,
    client: ShardedClient,
    present: watch::Sender<ShardedClient>,
}

impl Shards {
    /// `client` has warmed them up, with `limits` as the outcome: later shards must allow requests of the same lengths,
    /// because validation has promised them.
    pub(super) fn new(
        master_uds_path: PathBuf,
        flags: BatchingConfig,
        client: ShardedClient,
        limits: &Limits,
    ) -> Self {
        let flags = BatchingConfig {
            max_input_tokens: Some(limits.max_input_tokens),
            max_total_tokens: Some(limits.max_total_tokens),
            ..flags
        };
        let present = watch::Sender::new(client.clone());
        Self { master_uds_path, flags, client, present }
    }

    /// Always the present client.
    pub(super) fn watch(&self) -> watch::Receiver<ShardedClient> {
        self.present.subscribe()
    }
}

impl ShardGroup for Shards {
    type Client = ShardedClient;

    fn client(&mut self) -> &mut ShardedClient {
        &mut self.client
    }

    fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.client.closed()
    }

    async fn reconnect(&mut self) -> Result<Regained, Unrecoverable> {
        let (mut pause, mut said) = (FIRST_PAUSE, Instant::now());
        loop {
            let error = match connect_and_warm_up(self.master_uds_path.clone(), self.flags).await {
                Ok(WarmedUp { client, limits, .. }) => {
                    self.present.send_replace(client.clone());
                    self.client = client;
                    return Ok(Regained { max_batch_total_tokens: limits.max_batch_total_tokens });
                }
                Err(error) if is_transient(&error) => error,
                Err(error) => return Err(Unrecoverable(error.to_string())),
            };
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                tracing::info!("still waiting for the shards; last answer: {error}");
            }
            tokio::time::sleep(pause).await;
            pause = pause.mul_f64(1.5).min(LONGEST_PAUSE);
        }
    }
}

/// Whether it passes while the shards are being started: some are not there yet, or an old one is still there.
fn is_transient(error: &RouterError) -> bool {
    matches!(error, RouterError::Shards { source, .. }
        if source.is_lost() || matches!(source, ClientError::Disagreement(_)))
}
