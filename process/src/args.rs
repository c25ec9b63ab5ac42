//! The logging options every program takes, and what they mean.

use crate::logging::{LogSettings, Program};

/// Our crates, as they appear as targets of log lines.
///
/// A bare level applies to these only: the libraries below (HTTP, gRPC, tokenizers) stay quiet, as they
/// do in text-generation-inference.
pub(crate) const OUR_TARGETS: [&str; 9] =
    ["launcher", "router", "shard", "benchmark", "hub", "process", "proto", "models", "backend"];

/// Logging options; flattened into each program's own.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct LogArgs {
    /// What to log: a level, or a filter such as `router=debug,hyper=warn`. Default `info`.
    #[arg(long, env = "LOG_LEVEL", hide = true)]
    pub log_level: Option<String>,

    /// The value `1` turns colours OFF (upstream's meaning, kept); any other leaves them on.
    #[arg(long, env = "LOG_COLORIZE", hide = true)]
    pub log_colorize: Option<String>,

    /// Output the logs in JSON format (useful for telemetry)
    #[arg(long, env = "JSON_OUTPUT")]
    pub json_output: bool,
}

impl LogArgs {
    /// What these options mean for `program`.
    pub fn settings(&self, program: Program) -> LogSettings {
        LogSettings {
            program,
            json: self.json_output,
            filter: resolve_filter(self.log_level.as_deref().unwrap_or("info")),
            ansi: self.log_colorize.as_deref() != Some("1"),
        }
    }
}

/// Turns the value of `LOG_LEVEL` into a filter over our targets.
///
/// Exactly `warn`, `info` and `debug` mean "this level for Quartet, nothing from others". Anything else is a
/// filter already; the target names of text-generation-inference in it are translated into ours, so that
/// a deployment's `LOG_LEVEL=text_generation_router=debug` keeps its effect.
pub fn resolve_filter(log_level: &str) -> String {
    match log_level {
        "warn" | "info" | "debug" => {
            OUR_TARGETS.iter().map(|target| format!("{target}={log_level}")).collect::<Vec<_>>().join(",")
        }
        filter => filter.split(',').map(translate_directive).collect::<Vec<_>>().join(","),
    }
}

/// Replaces an upstream crate name at the start of one filter directive.
fn translate_directive(directive: &str) -> String {
    let directive = directive.trim();
    let end = directive.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(directive.len());
    let (target, rest) = directive.split_at(end);
    let ours = match target {
        "text_generation_launcher" => "launcher",
        "text_generation_router" | "text_generation_router_v2" | "text_generation_router_v3" => "router",
        "text_generation_client" => "proto",
        "text_generation_benchmark" => "benchmark",
        other => other,
    };
    format!("{ours}{rest}")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        log: LogArgs,
    }

    #[test]
    fn bare_level_covers_our_crates_only() {
        let filter = resolve_filter("info");
        assert!(filter.starts_with("launcher=info,router=info,shard=info,benchmark=info,"));
        assert!(filter.split(',').all(|directive| directive.ends_with("=info")));
    }

    #[test]
    fn other_values_are_filters() {
        assert_eq!(resolve_filter("trace"), "trace");
        assert_eq!(resolve_filter("error"), "error");
        assert_eq!(resolve_filter("router=debug,hyper=warn"), "router=debug,hyper=warn");
    }

    #[test]
    fn upstream_names_are_translated() {
        assert_eq!(
            resolve_filter("text_generation_launcher=debug, text_generation_router::server=trace"),
            "launcher=debug,router::server=trace"
        );
        assert_eq!(resolve_filter("text_generation_router_v3=warn"), "router=warn");
        assert_eq!(resolve_filter("my_text_generation_router=warn"), "my_text_generation_router=warn");
    }

    #[test]
    fn colour_switch_is_inverted_as_upstream() {
        let args = |colorize: &str| Cli::parse_from(["x", "--log-colorize", colorize]).log;
        assert!(!args("1").settings(Program::Router).ansi);
        assert!(args("0").settings(Program::Router).ansi);
        assert!(LogArgs::default().settings(Program::Router).ansi);
    }

    #[test]
    fn json_output_is_a_switch() {
        assert!(Cli::parse_from(["x", "--json-output"]).log.settings(Program::Launcher).json);
        assert!(!Cli::parse_from(["x"]).log.settings(Program::Launcher).json);
    }
}
