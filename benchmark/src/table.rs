//! The three tables that are printed at the end, in TGI's format.
//!
//! One thing differs on purpose: TGI blanks a cell that equals the one above it in *every* column, so that equal
//! latencies of two batch sizes lose a number. Here only the names of the steps are merged.

use tabled::builder::Builder;
use tabled::settings::Style;

use crate::measurements::{BatchMeasurements, Measurements};
use crate::settings::Settings;
use crate::stats::Summary;

/// Printed where there is nothing to measure: no decode step was asked for.
const NO_STEPS: &str = "no steps";

/// A step's name and the series it takes from a batch size.
type Series = (&'static str, fn(&BatchMeasurements) -> Vec<f64>);

const LATENCIES: [Series; 3] = [
    ("Prefill", BatchMeasurements::prefill_latencies),
    ("Decode (token)", BatchMeasurements::decode_token_latencies),
    ("Decode (total)", BatchMeasurements::decode_latencies),
];

const THROUGHPUTS: [Series; 2] =
    [("Prefill", BatchMeasurements::prefill_throughputs), ("Decode", BatchMeasurements::decode_throughputs)];

/// Parameters, latencies and throughputs as Markdown; a batch size that was not reached shows `NaN`.
pub(crate) fn render(settings: &Settings, measurements: &Measurements) -> String {
    let tables =
        [parameters(settings), latencies(settings, measurements), throughputs(settings, measurements)]
            .map(markdown);
    format!("\n{}\n", tables.join("\n\n"))
}

fn markdown(rows: Vec<Vec<String>>) -> String {
    let mut table = Builder::from_iter(rows).build();
    let text = table.with(Style::markdown()).to_string();
    text + "\n"
}

fn parameters(settings: &Settings) -> Vec<Vec<String>> {
    let sampling = &settings.sampling;
    let rows = [
        ("Parameter", "Value".to_string()),
        ("Model", settings.model.clone()),
        ("Sequence Length", settings.sequence_length.to_string()),
        ("Decode Length", settings.decode_length.to_string()),
        ("Top N Tokens", format!("{:?}", sampling.top_n_tokens)),
        ("N Runs", settings.runs.to_string()),
        ("Warmups", settings.warmups.to_string()),
        ("Temperature", format!("{:?}", sampling.temperature)),
        ("Top K", format!("{:?}", sampling.top_k)),
        ("Top P", format!("{:?}", sampling.top_p)),
        ("Typical P", format!("{:?}", sampling.typical_p)),
        ("Repetition Penalty", format!("{:?}", sampling.repetition_penalty)),
        ("Frequency Penalty", format!("{:?}", sampling.frequency_penalty)),
        ("Watermark", sampling.watermark.to_string()),
        ("Do Sample", sampling.do_sample.to_string()),
    ];
    rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect()
}

fn latencies(settings: &Settings, measurements: &Measurements) -> Vec<Vec<String>> {
    let columns = |summary: Summary| {
        [summary.average, summary.lowest, summary.highest, summary.p50, summary.p90, summary.p99].to_vec()
    };
    let header = ["Step", "Batch Size", "Average", "Lowest", "Highest", "p50", "p90", "p99"];
    rows(settings, measurements, &header, &LATENCIES, &columns, "ms")
}

fn throughputs(settings: &Settings, measurements: &Measurements) -> Vec<Vec<String>> {
    let columns = |summary: Summary| [summary.average, summary.lowest, summary.highest].to_vec();
    let header = ["Step", "Batch Size", "Average", "Lowest", "Highest"];
    rows(settings, measurements, &header, &THROUGHPUTS, &columns, "tokens/secs")
}

fn rows(
    settings: &Settings,
    measurements: &Measurements,
    header: &[&str],
    steps: &[Series],
    columns: &dyn Fn(Summary) -> Vec<f64>,
    unit: &str,
) -> Vec<Vec<String>> {
    let mut rows = vec![header.iter().map(ToString::to_string).collect()];
    for (step, series) in steps {
        let has_steps = !step.starts_with("Decode") || settings.decode_steps() > 0;
        for (index, batch) in measurements.batches.iter().enumerate() {
            let name = if index == 0 { step.to_string() } else { String::new() };
            let mut row = vec![name, batch.batch_size.to_string()];
            row.extend(columns(Summary::of(&series(batch))).into_iter().map(|value| match has_steps {
                true if value.is_nan() => "NaN".to_string(),
                true => format!("{value:.2} {unit}"),
                false => NO_STEPS.to_string(),
            }));
            rows.push(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measurements::tests::run;
    use crate::runner::Event;
    use crate::settings::tests::settings;

    fn measured(settings: &Settings) -> Measurements {
        let mut measurements = Measurements::new(&settings.batch_sizes);
        for ms in [10, 20] {
            measurements.record(&Event::RunDone { batch: 0, run: run(ms) });
        }
        measurements
    }

    #[test]
    fn the_tables_are_tgis() {
        let settings = settings(&["-b", "1", "-b", "32", "--top-p", "0.9", "--do-sample"]);
        let expected = "
| Parameter          | Value      |
|--------------------|------------|
| Model              | some/model |
| Sequence Length    | 10         |
| Decode Length      | 8          |
| Top N Tokens       | None       |
| N Runs             | 10         |
| Warmups            | 1          |
| Temperature        | None       |
| Top K              | None       |
| Top P              | Some(0.9)  |
| Typical P          | None       |
| Repetition Penalty | None       |
| Frequency Penalty  | None       |
| Watermark          | false      |
| Do Sample          | true       |


| Step           | Batch Size | Average  | Lowest   | Highest  | p50      | p90      | p99      |
|----------------|------------|----------|----------|----------|----------|----------|----------|
| Prefill        | 1          | 15.00 ms | 10.00 ms | 20.00 ms | 20.00 ms | 20.00 ms | 20.00 ms |
|                | 32         | NaN      | NaN      | NaN      | NaN      | NaN      | NaN      |
| Decode (token) | 1          | 7.50 ms  | 5.00 ms  | 10.00 ms | 10.00 ms | 10.00 ms | 10.00 ms |
|                | 32         | NaN      | NaN      | NaN      | NaN      | NaN      | NaN      |
| Decode (total) | 1          | 30.00 ms | 20.00 ms | 40.00 ms | 40.00 ms | 40.00 ms | 40.00 ms |
|                | 32         | NaN      | NaN      | NaN      | NaN      | NaN      | NaN      |


| Step    | Batch Size | Average           | Lowest            | Highest           |
|---------|------------|-------------------|-------------------|-------------------|
| Prefill | 1          | 7.50 tokens/secs  | 5.00 tokens/secs  | 10.00 tokens/secs |
|         | 32         | NaN               | NaN               | NaN               |
| Decode  | 1          | 15.00 tokens/secs | 10.00 tokens/secs | 20.00 tokens/secs |
|         | 32         | NaN               | NaN               | NaN               |

";
        assert_eq!(render(&settings, &measured(&settings)), expected);
    }

    #[test]
    fn one_token_needs_no_decode_and_prints_no_nan() {
        let settings = settings(&["-b", "1", "-d", "1"]);
        let mut measurements = Measurements::new(&settings.batch_sizes);
        measurements.record(&Event::RunDone { batch: 0, run: crate::Run { decode: None, ..run(10) } });
        let text = render(&settings, &measurements);
        assert!(!text.contains("NaN"), "{text}");
        assert!(text.contains("| Decode (token) | 1          | no steps | no steps |"), "{text}");
    }

    #[test]
    fn equal_numbers_of_neighbours_are_both_printed() {
        let settings = settings(&["-b", "1", "-b", "2"]);
        let mut measurements = measured(&settings);
        measurements.batches[1].runs = measurements.batches[0].runs.clone();
        let text = render(&settings, &measurements);
        assert_eq!(text.matches("| 15.00 ms |").count(), 2, "{text}");
    }
}
