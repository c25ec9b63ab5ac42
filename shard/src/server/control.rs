//! `quartet.v1`: who this is and whether it moves. Answered without the engine, so that it can be asked while a step hangs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::control::shard_control_server::ShardControl;
use proto::control::{
    HandshakeRequest, HandshakeResponse, MemoryEntry, PhaseEntry, StatusRequest, StatusResponse,
};
use tonic::{Request, Response, Status};

use super::relay::Relay;
use crate::engine::EngineHandle;

/// What this process is.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Given by whoever started it; empty when started by hand.
    pub instance_id: String,
    /// This rank.
    pub rank: usize,
    /// The sockets of all ranks, in rank order.
    pub sockets: Vec<PathBuf>,
    /// The model as it was asked for.
    pub model_id: String,
    /// The phases of the start, in order.
    pub startup: Vec<(String, Duration)>,
}

impl Identity {
    /// The sockets as the protocol writes them.
    pub(super) fn urls(&self) -> Vec<String> {
        self.sockets.iter().map(|path| format!("unix://{}", path.display())).collect()
    }
}

/// The control service.
pub(super) struct Control {
    engine: EngineHandle,
    identity: Identity,
    relay: Arc<Relay>,
    started_unix_nanos: u64,
}

impl Control {
    pub(super) fn new(engine: EngineHandle, identity: Identity, relay: Arc<Relay>) -> Self {
        // It serves as soon as the last phase has ended.
        let took: Duration = identity.startup.iter().map(|(_, duration)| *duration).sum();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let started_unix_nanos = now.saturating_sub(took).as_nanos() as u64;
        Self { engine, identity, relay, started_unix_nanos }
    }
}

#[tonic::async_trait]
impl ShardControl for Control {
    async fn handshake(
        &self,
        _request: Request<HandshakeRequest>,
    ) -> Result<Response<HandshakeResponse>, Status> {
        Ok(Response::new(HandshakeResponse {
            instance_id: self.identity.instance_id.clone(),
            // Ranks are few.
            rank: self.identity.rank as u32,
            world_size: self.identity.sockets.len() as u32,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            model_id: self.identity.model_id.clone(),
            last_call: self.relay.last().map(|call| call.to_string()).unwrap_or_default(),
        }))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let liveness = self.engine.liveness();
        let (steps_started, steps_finished) = liveness.steps();
        let (blocks_total, blocks_used) = liveness.blocks();
        let memory = liveness.memory().into_iter().map(|(name, bytes)| MemoryEntry { name, bytes }).collect();
        let startup = self
            .identity
            .startup
            .iter()
            .map(|(name, duration)| PhaseEntry { name: name.clone(), nanos: duration.as_nanos() as u64 })
            .collect();
        Ok(Response::new(StatusResponse {
            steps_started,
            steps_finished,
            blocks_total,
            blocks_used,
            memory,
            startup,
            started_unix_nanos: self.started_unix_nanos,
        }))
    }
}
