//! Traces: spans that leave this process for an OpenTelemetry collector (OTLP over gRPC).
//!
//! What is exported are the spans of our own targets, whatever the log shows, and those of [`TRACES_TARGET`], which are for
//! the collector only. A collector that is away or hangs costs spans and nothing else: they are queued up to a fixed number,
//! sent by threads of their own, and the log has one line when it begins and one when it is over.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::propagation::Extractor;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanExporter};
use tokio::runtime::{Builder, Handle, Runtime};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Uri};
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use crate::args::OUR_TARGETS;

/// Target of the spans that only a collector sees: no level of the log shows it unless it is asked for by name.
pub const TRACES_TARGET: &str = "otlp";

/// One attempt to connect to the collector.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// One delivery, connecting and repeating included. Meanwhile spans wait in the queue, and are dropped when it is full.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// What the last delivery may delay the end of this process by. Router and shards end one after the other: twice this in all.
const FLUSH_PATIENCE: Duration = Duration::from_millis(750);

/// Address of an OTLP collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint(Uri);

impl OtlpEndpoint {
    /// Reads the value of `--otlp-endpoint`: `http://HOST:PORT`, `https://HOST:PORT`, or `HOST:PORT`, which is http.
    ///
    /// # Errors
    /// One line about what was found and what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mistake = || {
            format!(
                "--otlp-endpoint is `{text}`, expected the address of an OTLP collector for gRPC, such as \
                 http://localhost:4317"
            )
        };
        let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = with_scheme.parse().map_err(|_| mistake())?;
        let is_known = matches!(uri.scheme_str(), Some("http" | "https"));
        // What follows the host is a port that the parser takes, or nothing.
        let is_port = uri.authority().is_some_and(|authority| {
            authority.as_str().ends_with(authority.host()) || authority.port_u16().is_some()
        });
        if !is_known || !is_port || uri.host().is_none_or(str::is_empty) {
            return Err(mistake());
        }
        Ok(Self(uri))
    }

    /// A channel that connects when it is first used.
    fn channel(&self) -> Result<Channel, tonic::transport::Error> {
        let mut endpoint =
            Endpoint::from(self.0.clone()).connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT);
        if self.0.scheme_str() == Some("https") {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_enabled_roots())?;
        }
        Ok(endpoint.connect_lazy())
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

/// Where spans go, and whose they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSettings {
    /// The collector.
    pub endpoint: OtlpEndpoint,
    /// `service.name` of every span.
    pub service_name: String,
    /// `service.instance.id`, which tells processes of one name apart.
    pub instance: Option<String>,
}

/// Why no spans can be exported.
#[derive(Debug)]
pub struct TraceError(String);

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "traces cannot be exported: {}", self.0)
    }
}

impl std::error::Error for TraceError {}

/// The export of this process's spans. Dropping it delivers what is left, within a bound.
#[derive(Debug)]
pub struct TraceExport {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl TraceExport {
    /// Starts to export. Spans come from [`Self::layer`].
    ///
    /// # Errors
    /// The operating system refuses a thread, or there are no certificates for https.
    pub(crate) fn start(settings: TraceSettings) -> Result<Self, TraceError> {
        // Threads of their own: neither requests nor steps wait for a collector, and the last spans are sent when the
        // program's other threads are gone.
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("traces")
            .enable_all()
            .build()
            .map_err(|error| TraceError(error.to_string()))?;
        let exporter = {
            let _entered = runtime.enter();
            CollectorClient::new(&settings.endpoint, runtime.handle().clone())?
        };
        let mut resource = Resource::builder()
            .with_service_name(settings.service_name)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        if let Some(instance) = settings.instance {
            resource = resource.with_attribute(KeyValue::new("service.instance.id", instance));
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(resource.build())
            .build();
        global::set_text_map_propagator(TraceContextPropagator::new());
        Ok(Self { provider, runtime: Some(runtime) })
    }

    /// Turns spans of the subscriber it is added to into exported ones.
    pub(crate) fn layer<S>(&self) -> Box<dyn Layer<S> + Send + Sync>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let ours = OUR_TARGETS.into_iter().chain([TRACES_TARGET]).map(|target| (target, LevelFilter::INFO));
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("quartet"))
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(Targets::new().with_targets(ours))
            .boxed()
    }
}

impl Drop for TraceExport {
    fn drop(&mut self) {
        // What did not get through in time is lost, and the log has said so when it began.
        let _ = self.provider.shutdown_with_timeout(FLUSH_PATIENCE);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Puts `span` below the caller's, where the caller's headers (W3C trace context) tell of one. `header`: the value of the
/// header with that lower-case name. To be called before the span is first entered.
pub fn continue_trace<'a>(span: &Span, header: impl Fn(&str) -> Option<&'a str>) {
    let headers = Headers(&header);
    let context = global::get_text_map_propagator(|propagator| propagator.extract(&headers));
    // An error says that nobody exports this span.
    let _ = span.set_parent(context);
}

struct Headers<'f, 'a>(&'f dyn Fn(&str) -> Option<&'a str>);

impl Extractor for Headers<'_, '_> {
    fn get(&self, key: &str) -> Option<&str> {
        (self.0)(key)
    }

    fn keys(&self) -> Vec<&str> {
        // Trace context is asked for by name.
        Vec::new()
    }
}

/// Delivers spans, and says once when it cannot and once when it can again.
#[derive(Debug)]
struct CollectorClient {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    runtime: Handle,
    endpoint: OtlpEndpoint,
    is_failing: AtomicBool,
}

impl CollectorClient {
    fn new(endpoint: &OtlpEndpoint, runtime: Handle) -> Result<Self, TraceError> {
        let channel = endpoint.channel().map_err(|error| TraceError(error.to_string()))?;
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|error| TraceError(error.to_string()))?;
        let (exporter, endpoint) = (Arc::new(exporter), endpoint.clone());
        Ok(Self { exporter, runtime, endpoint, is_failing: AtomicBool::new(false) })
    }

    fn note(&self, outcome: &OTelSdkResult) {
        let has_failed = outcome.is_err();
        let was_failing = self.is_failing.swap(has_failed, Ordering::Relaxed);
        match outcome {
            Err(error) if !was_failing => tracing::warn!(
                "the OTLP collector at {} takes no spans, they are dropped until it does: {}",
                self.endpoint,
                reason(error)
            ),
            Ok(()) if was_failing => {
                tracing::info!("the OTLP collector at {} takes spans again", self.endpoint);
            }
            _ => {}
        }
    }
}

/// The innermost cause, or the collector's status: the exporter writes the layers above it in front.
fn reason(error: &OTelSdkError) -> String {
    match error {
        OTelSdkError::Timeout(patience) => format!("no answer within {} s", patience.as_secs()),
        other => {
            let text = other.to_string();
            text.rsplit(": ").next().unwrap_or_default().to_owned()
        }
    }
}

impl SpanExporter for CollectorClient {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exporter = Arc::clone(&self.exporter);
        // The thread that asks has no timers; the exporter itself bounds single attempts only.
        let delivery = self.runtime.spawn(async move {
            let timeout = tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(batch));
            timeout.await.unwrap_or(Err(OTelSdkError::Timeout(EXPORT_TIMEOUT)))
        });
        let outcome =
            delivery.await.unwrap_or_else(|error| Err(OTelSdkError::InternalFailure(error.to_string())));
        self.note(&outcome);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        // Called before the first delivery, so nobody shares it yet.
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let read = |text: &str| OtlpEndpoint::parse(text).unwrap().to_string();
        assert_eq!(read("http://collector:4317"), "http://collector:4317");
        assert_eq!(read("https://otel.example.org"), "https://otel.example.org");
        assert_eq!(read("localhost:4317"), "http://localhost:4317");
        assert_eq!(read("http://[::1]:4317/"), "http://[::1]:4317");
    }

    #[test]
    fn a_failure_is_told_by_its_cause() {
        let text = "TonicTracesClient export failed with gRPC code: Unavailable: transport error: Connection refused";
        assert_eq!(reason(&OTelSdkError::InternalFailure(text.to_owned())), "Connection refused");
        assert_eq!(reason(&OTelSdkError::Timeout(EXPORT_TIMEOUT)), "no answer within 5 s");
    }

    #[test]
    fn what_is_no_address_is_told_in_one_line() {
        for text in [
            "",
            " ",
            "grpc://x:1",
            "http://",
            "http://:4317",
            "http://x:99999",
            "http://x:",
            "unix:///run/x",
            "a b",
        ] {
            let mistake = OtlpEndpoint::parse(text).expect_err(text);
            assert!(mistake.starts_with(&format!("--otlp-endpoint is `{text}`, expected")), "{mistake}");
            assert!(!mistake.contains('\n'));
        }
    }
}
