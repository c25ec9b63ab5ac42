//! Calls that reached some ranks only.
//!
//! The ranks meet in every step. A caller that dies between sending a call to one rank and to the next would leave the first
//! waiting for the second, with no end: in that call, or in the step that it computes ahead after the answer. So when a
//! connection ends, its last call is handed on to the other ranks, and each rank carries out every call once, whoever
//! brings it. The next caller waits until all ranks have begun the same call ([`proto::ShardedClient::connect`]).

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use proto::v3::{DecodeRequest, PrefillRequest, WarmupRequest};
use proto::{CallId, ClientError, ShardClient, Watched};
use tokio::net::UnixStream;
use tonic::Status;

use super::control::Identity;

/// A call in which the ranks wait for one another.
#[derive(Debug, Clone)]
pub(super) enum Call {
    Warmup(WarmupRequest),
    Prefill(PrefillRequest),
    Decode(DecodeRequest),
}

impl Call {
    async fn send(self, mut client: ShardClient) -> Result<(), ClientError> {
        match self {
            Call::Warmup(request) => client.warmup(request).await.map(drop),
            Call::Prefill(PrefillRequest { batch, cached_batch }) => {
                client.prefill(batch.unwrap_or_default(), cached_batch).await.map(drop)
            }
            Call::Decode(DecodeRequest { batches }) => client.decode(batches).await.map(drop),
        }
    }
}

/// What this rank has carried out, and whom it would tell.
pub(super) struct Relay {
    peers: Vec<PathBuf>,
    last: Mutex<Option<CallId>>,
}

impl Relay {
    pub(super) fn new(identity: &Identity) -> Self {
        let own = identity.rank;
        let others = identity.sockets.iter().enumerate().filter(|(rank, _)| *rank != own);
        Self { peers: others.map(|(_, socket)| socket.clone()).collect(), last: Mutex::new(None) }
    }

    /// The last call that was begun.
    pub(super) fn last(&self) -> Option<CallId> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call is to be carried out: it has not been before.
    fn begin(&self, id: CallId) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = last.is_none_or(|last| last.client != id.client || id.number > last.number);
        if is_new {
            *last = Some(id);
        }
        is_new
    }

    /// Hands a call on to the other ranks, most of which know it already.
    fn hand_on(&self, id: CallId, call: &Call) {
        for peer in self.peers.clone() {
            let call = call.clone();
            tokio::spawn(async move {
                let outcome = match ShardClient::connect(&peer).await {
                    Ok(client) => call.send(client.as_call(id)).await,
                    Err(error) => Err(error),
                };
                match outcome {
                    Ok(()) => tracing::warn!("{} had not got call {id} of a lost caller", peer.display()),
                    Err(error) => tracing::debug!("{}: {error}", peer.display()),
                }
            });
        }
    }
}

/// Whoever calls over one connection.
pub(super) struct Caller {
    relay: Arc<Relay>,
    last: Mutex<Option<(CallId, Call)>>,
}

impl Caller {
    /// Begins a call; one without a name is always new.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`: it has been begun before.
    pub(super) fn begin(&self, id: Option<CallId>, call: impl FnOnce() -> Call) -> Result<(), Status> {
        let Some(id) = id else { return Ok(()) };
        if !self.relay.begin(id) {
            return Err(Status::already_exists(format!("call {id} has been made before")));
        }
        if !self.relay.peers.is_empty() {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((id, call()));
        }
        Ok(())
    }

    fn gone(&self) {
        if let Some((id, call)) = self.last.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.relay.hand_on(id, &call);
        }
    }
}

/// A connection that knows its caller, who is taken for gone when it ends.
pub(super) fn accept(stream: UnixStream, relay: &Arc<Relay>) -> Watched<Arc<Caller>> {
    let caller = Arc::new(Caller { relay: Arc::clone(relay), last: Mutex::new(None) });
    let (connection, closed) = Watched::new(stream, Arc::clone(&caller));
    tokio::spawn(async move {
        closed.wait().await;
        caller.gone();
    });
    connection
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_begun_once() {
        let relay = Arc::new(Relay::new(&Identity::default()));
        let callers = [(); 2].map(|()| Caller { relay: Arc::clone(&relay), last: Mutex::new(None) });
        let begins = |caller: usize, client, number| {
            let call = || Call::Decode(DecodeRequest::default());
            callers[caller].begin(Some(CallId { client, number }), call).is_ok()
        };
        assert!(begins(0, 7, 1) && begins(0, 7, 3));
        assert!(!begins(0, 7, 3) && !begins(1, 7, 3) && !begins(1, 7, 2), "whoever brings it");
        assert!(begins(0, 8, 1), "another client counts anew");
        assert!(callers[0].begin(None, || Call::Decode(DecodeRequest::default())).is_ok());
    }
}
