//! The shard's two services on one Unix socket: text-generation-inference's `generate.v3` and our own control service.
//!
//! Everything asynchronous and every wire type is in here; the engine is called through its command queue.

mod control;
mod convert;
mod relay;
mod service;
mod socket;
#[cfg(test)]
mod tests;
mod trace;

use std::sync::Arc;
use std::time::Duration;

use process::SignalStream;
use proto::control::shard_control_server::ShardControlServer;
use proto::v3::text_generation_service_server::TextGenerationServiceServer;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic_reflection::server::v1alpha::{ServerReflection, ServerReflectionServer};

use crate::engine::{self, Engine, EngineExit};
use crate::error::ShardError;

use control::Control;
use relay::Relay;
use service::GenerationService;
use trace::TraceCalls;

pub use control::Identity;
pub use convert::{new_batch, warmup_request};
pub use socket::{BoundSocket, SocketFile};

/// Prompts of a full batch as text are large; upstream's shards accept messages of this size too.
const MAX_MESSAGE_BYTES: usize = (1 << 31) - 1;

/// How long calls under way may take to end once this process stops. Routers stop first, so normally there are none.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Serves until a signal asks to stop or the engine ends; removes the socket.
///
/// # Errors
/// What ended the engine, or [`ShardError::System`] when there can be no event loop.
pub fn run(socket: BoundSocket, engine: Engine, identity: Identity) -> Result<(), ShardError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("cannot start the event loop"))?;
    let outcome = runtime.block_on(serve(socket, engine, identity));
    // A step under way is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve(socket: BoundSocket, engine: Engine, identity: Identity) -> Result<(), ShardError> {
    let mut signals = SignalStream::new().map_err(system("cannot catch signals"))?;
    let (file, listener) = socket.into_parts();
    let listener = tokio::net::UnixListener::from_std(listener).map_err(system("cannot serve the socket"))?;
    let (exit_sender, mut engine_exit) = oneshot::channel();
    let handle = engine::spawn(engine, move |exit| {
        // Nobody listens any more when this process is about to end anyway.
        let _ = exit_sender.send(exit);
    })
    .map_err(system("cannot start the engine's thread"))?;

    let (stop, stopped) = oneshot::channel::<()>();
    let generation = GenerationService::new(handle.clone(), identity.urls());
    let reflection = reflection()?;
    let relay = Arc::new(Relay::new(&identity));
    let control = Control::new(handle, identity, Arc::clone(&relay));
    let connections = UnixListenerStream::new(listener)
        .map(move |accepted| accepted.map(|stream| relay::accept(stream, &relay)));
    let server = Server::builder()
        .layer(TraceCalls)
        .add_service(reflection)
        .add_service(
            TextGenerationServiceServer::new(generation).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(ShardControlServer::new(control))
        .serve_with_incoming_shutdown(connections, async {
            // A dropped sender means the same.
            let _ = stopped.await;
        });
    tokio::pin!(server);
    tracing::info!("Server started at unix://{}", file.path().display());
    let outcome = tokio::select! {
        signal = signals.next() => {
            tracing::info!("{signal} received, stopping");
            Ok(())
        }
        exit = &mut engine_exit => engine_outcome(exit),
        result = &mut server => result.map_err(|error| ShardError::Socket {
            path: file.path().to_path_buf(),
            problem: format!("cannot accept connections: {error}"),
        }),
    };
    file.remove();
    drop(stop);
    // Answers that are ready, such as the one that tells of the engine's failure, still go out.
    let _ = tokio::time::timeout(STOP_PATIENCE, &mut server).await;
    outcome
}

/// Lets tools such as grpcurl ask which services there are. `v1alpha` is what upstream's shards answer to; tools that
/// know `v1` fall back to it.
fn reflection() -> Result<ServerReflectionServer<impl ServerReflection>, ShardError> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1alpha()
        .map_err(|error| system("cannot describe the services")(std::io::Error::other(error)))
}

fn engine_outcome(exit: Result<EngineExit, oneshot::error::RecvError>) -> Result<(), ShardError> {
    match exit {
        Ok(EngineExit::Stopped) => Ok(()),
        Ok(EngineExit::Failed(error)) => Err(ShardError::EngineFailed(error)),
        Ok(EngineExit::Panicked(message)) => Err(ShardError::EnginePanicked(message)),
        Err(_) => Err(ShardError::EnginePanicked("its thread has gone".to_string())),
    }
}

fn system(action: &'static str) -> impl FnOnce(std::io::Error) -> ShardError {
    move |source| ShardError::System { action, source }
}
