//! The machine the numbers were taken on.

use serde::Serialize;

/// What a reader needs to know to compare numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Machine {
    /// The processor's name as the kernel gives it; absent where the kernel gives none.
    pub(crate) cpu_model: Option<String>,
    /// Processors this program may use.
    pub(crate) logical_cores: Option<usize>,
    pub(crate) architecture: &'static str,
    pub(crate) operating_system: &'static str,
}

impl Machine {
    /// The machine this program runs on.
    pub(crate) fn current() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            cpu_model: cpu_model(&cpuinfo),
            logical_cores: std::thread::available_parallelism().ok().map(usize::from),
            architecture: std::env::consts::ARCH,
            operating_system: std::env::consts::OS,
        }
    }
}

/// The value of the first `model name` line.
fn cpu_model(cpuinfo: &str) -> Option<String> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "model name")
        .map(|(_, value)| value.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_the_first_one_named() {
        let cpuinfo =
            "processor\t: 0\nmodel\t\t: 1\nmodel name\t: Some CPU @ 2.0GHz\n\nmodel name\t: Other\n";
        assert_eq!(cpu_model(cpuinfo).as_deref(), Some("Some CPU @ 2.0GHz"));
        assert_eq!(cpu_model(""), None);
    }
}
