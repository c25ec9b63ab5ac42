//! The report of `--env`: what this build and this machine are.

use std::fmt;
use std::process::Command;

/// Build and machine, in text-generation-inference's lines.
#[derive(Clone, Debug)]
pub struct EnvReport {
    nvidia_smi: Option<String>,
    xpu_smi: Option<String>,
    hpu_smi: Option<String>,
}

impl EnvReport {
    /// Asks the vendors' tools, where there are any. May take seconds.
    pub fn collect() -> Self {
        Self {
            nvidia_smi: output_of("nvidia-smi", &[]),
            xpu_smi: output_of("xpu-smi", &["discovery"]),
            hpu_smi: output_of("hl-smi", &[]),
        }
    }
}

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    // Three spaces, as upstream: the table stands below its heading.
    Some(String::from_utf8_lossy(&output.stdout).trim_end().replace('\n', "\n   "))
}

impl fmt::Display for EnvReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = "N/A";
        let (arch, os) = (std::env::consts::ARCH, std::env::consts::OS);
        writeln!(f, "Target: {arch}-{os}")?;
        writeln!(f, "Cargo version: {}", env!("CARGO_PKG_RUST_VERSION"))?;
        // Set by whoever builds a release; a plain build does not know.
        writeln!(f, "Commit sha: {}", option_env!("QUARTET_COMMIT_SHA").unwrap_or(unknown))?;
        writeln!(f, "Docker label: {}", option_env!("QUARTET_DOCKER_LABEL").unwrap_or(unknown))?;
        for (name, output) in
            [("nvidia-smi", &self.nvidia_smi), ("xpu-smi", &self.xpu_smi), ("hpu-smi", &self.hpu_smi)]
        {
            writeln!(f, "{name}:\n   {}", output.as_deref().unwrap_or(unknown))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_that_are_missing_are_not_available() {
        let report =
            EnvReport { nvidia_smi: Some("a\n   b".to_owned()), xpu_smi: None, hpu_smi: None }.to_string();
        assert!(report.starts_with("Target: "));
        assert!(report.contains("nvidia-smi:\n   a\n   b\nxpu-smi:\n   N/A\n"), "{report}");
        assert_eq!(output_of("no-such-program-of-anybody", &[]), None);
    }
}
