//! The JSON report: everything needed to compare two runs, raw values included.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::args::SamplingArgs;
use crate::error::BenchmarkError;
use crate::machine::Machine;
use crate::measurements::{BatchMeasurements, Measurements, Run, milliseconds};
use crate::settings::Settings;
use crate::stats::Summary;

/// The whole document. Times are milliseconds, throughputs tokens a second; a figure without values is null.
#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    tool: Tool,
    /// Seconds since 1970 at the end of the run.
    unix_time: u64,
    /// Whether every run of every batch size is there.
    is_complete: bool,
    /// Why not, if something failed.
    failure: Option<String>,
    machine: Machine,
    shards: ShardsReport<'a>,
    parameters: Parameters<'a>,
    batches: Vec<BatchReport>,
}

#[derive(Debug, Serialize)]
struct Tool {
    name: &'static str,
    version: &'static str,
}

#[derive(Debug, Serialize)]
struct ShardsReport<'a> {
    world_size: usize,
    model_id: &'a str,
    version: &'a str,
    dtype: &'a str,
    device_type: &'a str,
    attention_impl: &'a str,
    block_size: u32,
    speculate: u32,
    support_chunking: bool,
    use_prefix_caching: bool,
    cache_tokens: Option<u64>,
    /// Present when this run had to warm the shards up itself.
    warmup_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Parameters<'a> {
    tokenizer_name: &'a str,
    revision: &'a str,
    batch_sizes: &'a [u32],
    sequence_length: u32,
    decode_length: u32,
    runs: usize,
    warmups: usize,
    sampling: &'a SamplingArgs,
}

#[derive(Debug, Serialize)]
struct BatchReport {
    batch_size: u32,
    summary: BatchSummary,
    runs: Vec<RunReport>,
}

#[derive(Debug, Serialize)]
struct BatchSummary {
    prefill_latency_ms: Summary,
    prefill_throughput: Summary,
    decode_latency_ms: Summary,
    decode_token_latency_ms: Summary,
    decode_throughput: Summary,
}

#[derive(Debug, Serialize)]
struct RunReport {
    prefill_latency_ms: f64,
    prefill_throughput: f64,
    decode_steps: u32,
    decode_latency_ms: Option<f64>,
    decode_token_latency_ms: Option<f64>,
    decode_throughput: Option<f64>,
}

impl<'a> Report<'a> {
    /// The report on `measurements`, taken on this machine just now.
    pub(crate) fn new(
        settings: &'a Settings,
        measurements: &'a Measurements,
        failure: Option<String>,
    ) -> Self {
        let shards = &measurements.shards;
        Self {
            tool: Tool { name: "quartet benchmark", version: env!("CARGO_PKG_VERSION") },
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            is_complete: measurements.batches.iter().all(|batch| batch.runs.len() == settings.runs),
            failure,
            machine: Machine::current(),
            shards: ShardsReport {
                world_size: shards.world_size,
                model_id: &shards.model_id,
                version: &shards.version,
                dtype: &shards.info.dtype,
                device_type: &shards.info.device_type,
                attention_impl: &shards.info.attention_impl,
                block_size: shards.info.block_size,
                speculate: shards.info.speculate,
                support_chunking: shards.info.support_chunking,
                use_prefix_caching: shards.info.use_prefix_caching,
                cache_tokens: shards.cache_tokens,
                warmup_ms: shards.warmup.map(milliseconds),
            },
            parameters: Parameters {
                tokenizer_name: &settings.model,
                revision: &settings.revision,
                batch_sizes: &settings.batch_sizes,
                sequence_length: settings.sequence_length,
                decode_length: settings.decode_length,
                runs: settings.runs,
                warmups: settings.warmups,
                sampling: &settings.sampling,
            },
            batches: measurements.batches.iter().map(BatchReport::from).collect(),
        }
    }
}

impl From<&BatchMeasurements> for BatchReport {
    fn from(batch: &BatchMeasurements) -> Self {
        Self {
            batch_size: batch.batch_size,
            summary: BatchSummary {
                prefill_latency_ms: Summary::of(&batch.prefill_latencies()),
                prefill_throughput: Summary::of(&batch.prefill_throughputs()),
                decode_latency_ms: Summary::of(&batch.decode_latencies()),
                decode_token_latency_ms: Summary::of(&batch.decode_token_latencies()),
                decode_throughput: Summary::of(&batch.decode_throughputs()),
            },
            runs: batch.runs.iter().map(RunReport::from).collect(),
        }
    }
}

impl From<&Run> for RunReport {
    fn from(run: &Run) -> Self {
        Self {
            prefill_latency_ms: milliseconds(run.prefill.latency),
            prefill_throughput: run.prefill.throughput,
            decode_steps: run.decode.map_or(0, |decode| decode.steps),
            decode_latency_ms: run.decode.map(|decode| milliseconds(decode.latency)),
            decode_token_latency_ms: run.decode.map(|decode| milliseconds(decode.token_latency)),
            decode_throughput: run.decode.map(|decode| decode.throughput),
        }
    }
}

/// The place a report will go to. It is opened before the run, so that minutes of measuring are not lost to a wrong
/// path, under a name of its own, so that a report is there complete or not at all.
#[derive(Debug)]
pub(crate) struct ReportFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
}

impl ReportFile {
    /// Opens `path`.partial.
    pub(crate) fn create(path: &Path) -> Result<Self, BenchmarkError> {
        let output_error = |reason: String| BenchmarkError::Output { path: path.to_path_buf(), reason };
        if path.is_dir() {
            return Err(output_error("it is a directory".to_string()));
        }
        let mut name =
            path.file_name().ok_or_else(|| output_error("it names no file".to_string()))?.to_os_string();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = File::create(&partial).map_err(|error| output_error(error.to_string()))?;
        Ok(Self { path: path.to_path_buf(), partial, file })
    }

    /// Writes `report` and gives the file its name.
    pub(crate) fn write(mut self, report: &Report<'_>) -> Result<(), BenchmarkError> {
        let written = serde_json::to_string_pretty(report)
            .map_err(std::io::Error::from)
            .and_then(|text| writeln!(self.file, "{text}"))
            .and_then(|()| std::fs::rename(&self.partial, &self.path));
        written.map_err(|error| BenchmarkError::Output { path: self.path.clone(), reason: error.to_string() })
    }
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        // Gone already when the report was written.
        let _ = std::fs::remove_file(&self.partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measurements::tests::run;
    use crate::runner::Event;
    use crate::settings::tests::settings;

    #[test]
    fn a_report_holds_raw_runs_and_summary() {
        let settings = settings(&["-b", "1", "-b", "2", "-r", "1"]);
        let mut measurements = Measurements::new(&settings.batch_sizes);
        measurements.record(&Event::RunDone { batch: 0, run: run(10) });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        let file = ReportFile::create(&path).unwrap();
        assert!(!path.exists(), "nothing is there before it is complete");
        file.write(&Report::new(&settings, &measurements, Some("lost".to_string()))).unwrap();
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(report["is_complete"], false);
        assert_eq!(report["failure"], "lost");
        assert_eq!(report["batches"][0]["runs"][0]["decode_latency_ms"], 20.0);
        assert_eq!(report["batches"][0]["summary"]["prefill_latency_ms"]["p99"], 10.0);
        assert!(report["batches"][1]["summary"]["prefill_latency_ms"]["p99"].is_null());
        assert_eq!(report["parameters"]["sequence_length"], 10);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no partial file is left");
    }

    #[test]
    fn a_wrong_path_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| ReportFile::create(path).unwrap_err().to_string();
        assert!(refused(folder.path()).contains("it is a directory (--output-json)"));
        assert!(refused(&folder.path().join("none/x.json")).contains("No such file"));
        drop(ReportFile::create(&folder.path().join("x.json")).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
