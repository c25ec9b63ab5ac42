//! Calls that reached some ranks only.
//!
//! The ranks meet in every step. A caller that dies between sending a call to one rank and to the next would leave the first
//! waiting for the second, with no end. So whoever loses its caller during a call hands the call on to the others, and each
//! rank carries out every call once, whoever brings it.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use proto::v3::{DecodeRequest, PrefillRequest, WarmupRequest};
use proto::{CallId, ClientError, ShardClient};
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

    /// Begins a call. What comes back is to be kept until there is an answer: dropped before that, it hands the call on.
    ///
    /// # Errors
    /// `ALREADY_EXISTS`: it has been begun before.
    pub(super) fn begin(&self, id: Option<CallId>, call: impl FnOnce() -> Call) -> Result<Pending, Status> {
        let Some(id) = id else { return Ok(Pending(None)) };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.client == id.client && id.number <= last.number) {
            return Err(Status::already_exists(format!("call {id} has been made before")));
        }
        *last = Some(id);
        if self.peers.is_empty() {
            return Ok(Pending(None));
        }
        Ok(Pending(Some(Unanswered { id, call: call(), peers: self.peers.clone() })))
    }
}

/// A call without an answer.
struct Unanswered {
    id: CallId,
    call: Call,
    peers: Vec<PathBuf>,
}

/// Whoever drops it says that the caller has gone.
pub(super) struct Pending(Option<Unanswered>);

impl Pending {
    /// There is an answer.
    pub(super) fn answered(mut self) {
        self.0 = None;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(Unanswered { id, call, peers }) = self.0.take() else { return };
        // Without an event loop this process is about to end, and its peers will notice.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        tracing::warn!("the caller of call {id} has gone, the other ranks are told");
        for peer in peers {
            let call = call.clone();
            runtime.spawn(async move {
                let outcome = match ShardClient::connect(&peer).await {
                    Ok(client) => call.send(client.as_call(id)).await,
                    Err(error) => Err(error),
                };
                // That the peer knows the call already is the rule.
                if let Err(error) = outcome {
                    tracing::debug!("{}: {error}", peer.display());
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(client: u64, number: u64) -> Option<CallId> {
        Some(CallId { client, number })
    }

    #[test]
    fn every_call_is_begun_once() {
        let call = || Call::Decode(DecodeRequest::default());
        let relay = Relay::new(&Identity::default());
        let mut begins = |id| relay.begin(id, call).map(Pending::answered).is_ok();
        assert!(begins(id(7, 1)) && begins(id(7, 3)));
        assert!(!begins(id(7, 3)) && !begins(id(7, 2)));
        assert!(begins(id(8, 1)), "another client counts anew");
        assert!(begins(None) && begins(None), "calls without a name are never refused");
    }
}
