//! What all handlers share.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::http::HeaderValue;
use proto::ShardedClient;
use tokio::sync::watch;

use super::pulse::Pulse;
use crate::infer::Infer;
use crate::metrics::Metrics;
use crate::scheduler::HealthFlag;
use crate::types::{Info, Startup};

/// How the HTTP side behaves.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Clients must show it on all but the open routes.
    pub api_key: Option<String>,
    /// Origins browsers may come from; empty: any.
    pub cors_allow_origin: Vec<HeaderValue>,
    /// Bytes of a request body.
    pub payload_limit: usize,
    /// Prompts of one completions request.
    pub max_client_batch_size: usize,
    /// How long shards that have work may stand still before `/live` fails; zero: for ever.
    pub liveness_timeout: Duration,
    /// Value of `x-compute-type`.
    pub compute_type: HeaderValue,
}

/// Shared by all handlers. Cloning is cheap.
#[derive(Clone)]
pub struct AppState {
    inner: Arc<Inner>,
}

struct Inner {
    infer: Infer,
    info: Info,
    settings: ServerSettings,
    shards: watch::Receiver<ShardedClient>,
    health: HealthFlag,
    pulse: Pulse,
    startup: OnceLock<Startup>,
}

impl AppState {
    /// Puts the parts together.
    pub fn new(
        infer: Infer,
        info: Info,
        settings: ServerSettings,
        shards: watch::Receiver<ShardedClient>,
        health: HealthFlag,
    ) -> Self {
        let pulse = Pulse::new(settings.liveness_timeout);
        Self {
            inner: Arc::new(Inner { infer, info, settings, shards, health, pulse, startup: OnceLock::new() }),
        }
    }

    pub(super) fn infer(&self) -> &Infer {
        &self.inner.infer
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        self.inner.infer.metrics()
    }

    pub(super) fn info(&self) -> &Info {
        &self.inner.info
    }

    /// Notes where the time of the start went; the first word counts.
    pub(crate) fn note_startup(&self, startup: Startup) {
        self.metrics().set_startup(&startup);
        // A second one would be a bug that hurts nobody.
        let _ = self.inner.startup.set(startup);
    }

    /// Where the time of the start went, once that is known.
    pub(super) fn startup(&self) -> Option<&Startup> {
        self.inner.startup.get()
    }

    pub(super) fn settings(&self) -> &ServerSettings {
        &self.inner.settings
    }

    /// A client of the shards' present life.
    pub(super) fn shards(&self) -> ShardedClient {
        self.inner.shards.borrow().clone()
    }

    pub(super) fn health(&self) -> &HealthFlag {
        &self.inner.health
    }

    pub(super) fn pulse(&self) -> &Pulse {
        &self.inner.pulse
    }

    /// `{version}-{label of the image, or native}`.
    pub(super) fn system_fingerprint(&self) -> String {
        let info = self.info();
        format!("{}-{}", info.version, info.docker_label.unwrap_or("native"))
    }
}
