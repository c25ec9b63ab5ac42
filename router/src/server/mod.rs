//! HTTP: routes, layers, and one file per group of endpoints. The only place that knows axum.

mod auth;
mod chat;
mod completions;
mod error_response;
mod generate;
mod headers;
mod health;
mod info;
mod metrics;
mod pulse;
mod sse;
mod state;
mod tokenize;
mod trace;
mod tunnel_listener;

use std::future::{Future, IntoFuture};
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, header};
use axum::middleware;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use futures::FutureExt;
use tokio::net::TcpListener;
use tower_http::cors::{AllowOrigin, CorsLayer};

pub use axum::http::HeaderValue;
pub use state::{AppState, ServerSettings};
use tunnel_listener::TunnelListener;

use crate::tunnel::Visitors;

/// All routes and layers.
pub fn app(state: AppState) -> Router {
    let settings = state.settings();
    let cors = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::CONTENT_TYPE])
        // On every answer, also where it varies with none of them: that is what caches of TGI's answers know.
        .vary([header::ORIGIN, header::ACCESS_CONTROL_REQUEST_METHOD, header::ACCESS_CONTROL_REQUEST_HEADERS])
        .allow_origin(if settings.cors_allow_origin.is_empty() {
            AllowOrigin::any()
        } else {
            AllowOrigin::list(settings.cors_allow_origin.iter().cloned())
        });
    let payload_limit = DefaultBodyLimit::max(settings.payload_limit);
    let mut routes = Router::new()
        .route("/", get(health::health).post(generate::compat_generate))
        .route("/generate", post(generate::generate))
        .route("/generate_stream", post(generate::generate_stream))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/chat_tokenize", post(tokenize::chat_tokenize))
        .route("/v1/models", get(info::models))
        .route("/info", get(info::info))
        .route("/health", get(health::health))
        .route("/ping", get(health::health))
        .route("/startup", get(health::startup))
        .route("/ready", get(health::ready))
        .route("/live", get(health::live))
        .route("/metrics", get(metrics::metrics));
    // Inside the guard: who has no key writes no spans.
    routes = routes.route_layer(middleware::from_fn(trace::trace));
    if let Some(key) = &settings.api_key {
        // Around the routes only: a path that does not exist is 404 with or without a key.
        let guard = auth::ApiKey::new(key);
        routes = routes.route_layer(middleware::from_fn_with_state(guard, auth::require_key));
    }
    routes.layer(payload_limit).layer(cors).with_state(state)
}

/// Serves until `shutdown` resolves, then until the last request is answered. Meanwhile new requests are refused with 503,
/// by a server that still listens: a load balancer takes a while to notice that `/ready` is 503 too, and whoever gets an
/// answer knows that nothing was begun. Visitors of a tunnel are served as those of the port are.
///
/// # Errors
/// The listener fails.
pub async fn serve(
    listener: TcpListener,
    visitors: Option<Visitors>,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // A token is a small packet that must not wait for the next one.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY could not be set: {error}");
        }
    });
    let permits = state.infer().permits().clone();
    let drained = async move {
        shutdown.await;
        permits.close();
        permits.all_returned().await;
    };
    let (app, drained) = (app(state), drained.shared());
    let at_port = axum::serve(listener, app.clone()).with_graceful_shutdown(drained.clone());
    let Some(visitors) = visitors else { return at_port.await };
    let through_tunnel = axum::serve(TunnelListener(visitors), app).with_graceful_shutdown(drained);
    tokio::try_join!(at_port.into_future(), through_tunnel.into_future()).map(|_| ())
}

/// Now, for the `created` fields.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
