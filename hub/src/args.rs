//! Where models are kept and where they come from: options and environment.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};

/// A path that may be empty: clap refuses an empty `PathBuf`, but an empty variable must count as unset.
fn lenient_path() -> ValueParser {
    OsStringValueParser::new().map(PathBuf::from).into()
}

/// Options about the Hub and its cache; flattened into each program's own.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct HubArgs {
    /// The location of the huggingface hub cache. Used to override the location if you want to provide a mounted
    /// disk for instance
    #[arg(long, env, value_parser = lenient_path())]
    pub huggingface_hub_cache: Option<PathBuf>,

    /// The location of the weights cache: a flat directory that holds the weight files
    #[arg(long, env, value_parser = lenient_path())]
    pub weights_cache_override: Option<PathBuf>,

    /// Cache directory, as huggingface_hub reads it.
    #[arg(long, env, hide = true, value_parser = lenient_path())]
    pub hf_hub_cache: Option<PathBuf>,

    /// Parent of the cache directory `hub` and of the token file.
    #[arg(long, env, hide = true, value_parser = lenient_path())]
    pub hf_home: Option<PathBuf>,

    /// Parent of `huggingface` when HF_HOME is not set, in place of `.cache` in the home directory.
    #[arg(long, env, hide = true, value_parser = lenient_path())]
    pub xdg_cache_home: Option<PathBuf>,

    /// Home directory; the cache is under `.cache/huggingface` in it.
    #[arg(long, env, hide = true, value_parser = lenient_path())]
    pub home: Option<PathBuf>,

    /// Address of the Hub, for mirrors.
    #[arg(long, env, hide = true)]
    pub hf_endpoint: Option<String>,

    /// Access token; upstream's launcher passes it on as HF_TOKEN, so it wins over that.
    #[arg(long, env, hide = true, hide_env_values = true)]
    pub hf_api_token: Option<Secret>,

    /// Access token.
    #[arg(long, env, hide = true, hide_env_values = true)]
    pub hf_token: Option<Secret>,

    /// Access token under its old name.
    #[arg(long, env, hide = true, hide_env_values = true)]
    pub hugging_face_hub_token: Option<Secret>,

    /// File with the access token.
    #[arg(long, env, hide = true, value_parser = lenient_path())]
    pub hf_token_path: Option<PathBuf>,

    /// `1`, `true`, `yes` or `on`: no network, only what is in the cache.
    #[arg(long, env, hide = true)]
    pub hf_hub_offline: Option<String>,

    /// Seconds without a byte after which a connection of a download is made anew, as huggingface_hub names it. Default: 20.
    #[arg(long, env, hide = true, value_parser = clap::value_parser!(u64).range(1..))]
    pub hf_hub_download_timeout: Option<u64>,

    /// `1`, `true`, `yes` or `on`: downloads show log lines on a terminal too.
    #[arg(long, env, hide = true)]
    pub hf_hub_disable_progress_bars: Option<String>,

    /// Connections of a download. Default: 8.
    #[arg(long, env = "QUARTET_DOWNLOAD_CONNECTIONS", hide = true, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub download_connections: Option<u64>,

    /// Bytes of a file that one request of a download asks for, at least 65536. Default: 67108864.
    #[arg(long, env = "QUARTET_DOWNLOAD_SEGMENT_BYTES", hide = true, value_parser = clap::value_parser!(u64).range(65536..))]
    pub download_segment_bytes: Option<u64>,
}

impl HubArgs {
    /// What these options mean. Reads the token file when no variable holds a token.
    pub fn options(&self) -> HubOptions {
        let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let hf_home = given(&self.hf_home).unwrap_or_else(|| {
            let caches = given(&self.xdg_cache_home)
                .unwrap_or_else(|| given(&self.home).unwrap_or_default().join(".cache"));
            caches.join("huggingface")
        });
        let cache_dir = given(&self.huggingface_hub_cache)
            .or_else(|| given(&self.hf_hub_cache))
            .unwrap_or_else(|| hf_home.join("hub"));
        let token_path = given(&self.hf_token_path).unwrap_or_else(|| hf_home.join("token"));
        let token = [&self.hf_api_token, &self.hf_token, &self.hugging_face_hub_token]
            .into_iter()
            .flatten()
            .find(|token| !token.reveal().is_empty())
            .cloned()
            // No token file is the normal case: then the Hub is asked anonymously.
            .or_else(|| std::fs::read_to_string(token_path).ok().map(Secret::from))
            .filter(|token| !token.reveal().is_empty());
        HubOptions {
            cache_dir,
            endpoint: self.hf_endpoint.as_deref().unwrap_or_default().trim_end_matches('/').to_owned(),
            token,
            offline: self.hf_hub_offline.as_deref().is_some_and(is_true),
            weights_cache_override: given(&self.weights_cache_override),
            download: self.download_options(),
        }
    }

    fn download_options(&self) -> DownloadOptions {
        let usual = DownloadOptions::default();
        let has_no_bars = self.hf_hub_disable_progress_bars.as_deref().is_some_and(is_true);
        DownloadOptions {
            connections: self.download_connections.map_or(usual.connections, |count| count as usize),
            segment_bytes: self.download_segment_bytes.unwrap_or(usual.segment_bytes),
            stall_timeout: self.hf_hub_download_timeout.map_or(usual.stall_timeout, Duration::from_secs),
            progress: if has_no_bars { ProgressOutput::Lines } else { ProgressOutput::Auto },
            ..usual
        }
    }
}

/// huggingface_hub's reading of a boolean variable.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

/// Where models are kept and where they come from.
#[derive(Clone, Debug, Default)]
pub struct HubOptions {
    /// Directory of `models--organisation--name` folders, the layout all Hugging Face libraries share.
    pub cache_dir: PathBuf,
    /// Address of the Hub without a trailing slash; empty = the public Hub.
    pub endpoint: String,
    /// Access token for private and gated models.
    pub token: Option<Secret>,
    /// No network at all.
    pub offline: bool,
    /// A flat directory that holds the weight files, whatever the model id.
    pub weights_cache_override: Option<PathBuf>,
    /// How downloads are made.
    pub download: DownloadOptions,
}

/// How downloads are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadOptions {
    /// Connections at once, all files together: enough to fill a fast line, few enough to be polite.
    pub connections: usize,
    /// Bytes of a file that one request asks for: large, since every request costs one of the Hub's rate limit.
    pub segment_bytes: u64,
    /// Without a byte for so long, a connection counts as dead and is made anew.
    pub stall_timeout: Duration,
    /// Pause before the second try of what failed; further ones are twice as long each.
    pub first_pause: Duration,
    /// How the user is told.
    pub progress: ProgressOutput,
}

impl Default for DownloadOptions {
    fn default() -> Self {
        Self {
            connections: 8,
            segment_bytes: 64 << 20,
            stall_timeout: Duration::from_secs(20),
            first_pause: Duration::from_millis(500),
            progress: ProgressOutput::Auto,
        }
    }
}

/// How the user is told how far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProgressOutput {
    /// Bars when standard error is a terminal, else as `Lines`.
    #[default]
    Auto,
    /// One log line a second.
    Lines,
    /// The same, with the figures as fields of their own, for logs that machines read.
    Structured,
}

/// Text that never appears in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, to send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text.trim().to_owned())
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.trim().to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        hub: HubArgs,
    }

    fn parse(args: &[&str]) -> HubOptions {
        Cli::parse_from([&["x", "--home", "/nowhere"], args].concat()).hub.options()
    }

    #[test]
    fn cache_directory_follows_the_documented_order() {
        let all = ["--huggingface-hub-cache", "/a", "--hf-hub-cache", "/b", "--hf-home", "/c"];
        assert_eq!(parse(&all).cache_dir, PathBuf::from("/a"));
        assert_eq!(parse(&all[2..]).cache_dir, PathBuf::from("/b"));
        assert_eq!(parse(&all[4..]).cache_dir, PathBuf::from("/c/hub"));
        assert_eq!(parse(&["--xdg-cache-home", "/d"]).cache_dir, PathBuf::from("/d/huggingface/hub"));
        assert_eq!(parse(&[]).cache_dir, PathBuf::from("/nowhere/.cache/huggingface/hub"));
    }

    #[test]
    fn downloads_have_defaults_and_bounds() {
        assert_eq!(parse(&[]).download, DownloadOptions::default());
        let download =
            parse(&["--hf-hub-download-timeout", "7", "--hf-hub-disable-progress-bars", "1"]).download;
        assert_eq!(
            (download.stall_timeout, download.progress),
            (Duration::from_secs(7), ProgressOutput::Lines)
        );
        let download = parse(&["--download-connections", "2", "--download-segment-bytes", "65536"]).download;
        assert_eq!((download.connections, download.segment_bytes), (2, 65536));
        for bad in [["--download-connections", "0"], ["--hf-hub-download-timeout", "0"]] {
            assert!(Cli::try_parse_from(["x", bad[0], bad[1]]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_empty_value_counts_as_unset() {
        let options = parse(&["--huggingface-hub-cache", "", "--hf-home", "/c", "--hf-token", ""]);
        assert_eq!(options.cache_dir, PathBuf::from("/c/hub"));
        assert!(options.token.is_none());
    }

    #[test]
    fn tokens_have_an_order_and_are_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let token = |args: &[&str]| parse(&[&["--hf-home", home], args].concat()).token.unwrap();
        assert_eq!(token(&[]).reveal(), "from-file");
        assert_eq!(token(&["--hugging-face-hub-token", "old"]).reveal(), "old");
        let both = token(&["--hugging-face-hub-token", "old", "--hf-token", "new"]);
        assert_eq!(both.reveal(), "new");
        assert_eq!(format!("{both:?}"), "***");
    }

    #[test]
    fn offline_accepts_huggingface_spellings() {
        for (value, expected) in [("1", true), ("TRUE", true), ("yes", true), ("0", false), ("", false)] {
            assert_eq!(parse(&["--hf-hub-offline", value]).offline, expected, "{value:?}");
        }
    }
}
