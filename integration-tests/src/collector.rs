//! An OTLP collector that keeps the spans it gets.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1 as wire;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Spans are sent within seconds; the machine may be compiling beside the tests.
const DEADLINE: Duration = Duration::from_secs(60);

/// A span as it arrived.
#[derive(Debug, Clone)]
pub struct Span {
    /// `service.name` of its process.
    pub service: String,
    /// `service.instance.id` of its process; empty when there is none.
    pub instance: String,
    /// The span itself.
    pub span: wire::Span,
}

impl Span {
    /// An attribute as text; `None` when it is missing.
    pub fn attribute(&self, name: &str) -> Option<String> {
        attribute(&self.span.attributes, name)
    }

    /// Whether `self` lies directly below `parent`.
    pub fn is_below(&self, parent: &Span) -> bool {
        self.span.trace_id == parent.span.trace_id && self.span.parent_span_id == parent.span.span_id
    }
}

fn attribute(attributes: &[KeyValue], name: &str) -> Option<String> {
    let value = attributes.iter().find(|attribute| attribute.key == name)?.value.as_ref()?.value.as_ref()?;
    Some(match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

/// A collector on a free port; ends in `Drop`.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// Starts to listen.
    ///
    /// # Errors
    /// No free port, or no thread.
    pub fn start() -> Result<Self> {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let incoming = {
            let _entered = runtime.enter();
            TcpIncoming::bind(([127, 0, 0, 1], 0).into())?
        };
        let address = incoming.local_addr().context("the address of a listener")?;
        let service = TraceServiceServer::new(Keeper(Arc::clone(&spans)));
        let thread = std::thread::Builder::new().name("collector".to_string()).spawn(move || {
            let stopped = async { drop(stopped.await) };
            let served =
                Server::builder().add_service(service).serve_with_incoming_shutdown(incoming, stopped);
            // It ends when the test does; what went wrong before shows in missing spans.
            let _ = runtime.block_on(served);
        })?;
        Ok(Self { address, spans, stop: Some(stop), thread: Some(thread) })
    }

    /// The value for `--otlp-endpoint`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What arrived so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `is_complete` says so of what arrived.
    ///
    /// # Errors
    /// It does not within a generous time; the message has the names of all spans.
    pub fn wait(&self, is_complete: impl Fn(&[Span]) -> bool) -> Result<Vec<Span>> {
        let end = Instant::now() + DEADLINE;
        loop {
            let spans = self.spans();
            if is_complete(&spans) {
                return Ok(spans);
            }
            if Instant::now() > end {
                let names: Vec<&str> = spans.iter().map(|span| span.span.name.as_str()).collect();
                bail!("incomplete after {DEADLINE:?}: {names:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of it has failed the test already.
            let _ = thread.join();
        }
    }
}

struct Keeper(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Keeper {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for resource_spans in request.into_inner().resource_spans {
            let resource = resource_spans.resource.unwrap_or_default().attributes;
            let named = |name: &str| attribute(&resource, name).unwrap_or_default();
            let (service, instance) = (named("service.name"), named("service.instance.id"));
            let spans = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| Span {
                service: service.clone(),
                instance: instance.clone(),
                span,
            }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
