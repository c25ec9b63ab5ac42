//! Statistics of a series: plain functions, no state.

use serde::Serialize;

/// The figures that are printed for a series. Every field is NaN when the series is empty.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) average: f64,
    pub(crate) lowest: f64,
    pub(crate) highest: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
}

impl Summary {
    /// Summarises `values`, in whatever order they are.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self {
            // 0 / 0 is the NaN of an empty series.
            average: sorted.iter().sum::<f64>() / sorted.len() as f64,
            lowest: sorted.first().copied().unwrap_or(f64::NAN),
            highest: sorted.last().copied().unwrap_or(f64::NAN),
            p50: percentile(&sorted, 50),
            p90: percentile(&sorted, 90),
            p99: percentile(&sorted, 99),
        }
    }
}

/// TGI's percentile: the element at index ⌊percent · n / 100⌋, without interpolation; NaN for an empty series.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted.get(percent * sorted.len() / 100).copied().unwrap_or(f64::NAN)
}

/// One bar of a histogram.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Bin {
    /// Where the bar begins.
    pub(crate) lower: f64,
    /// Values from there up to the next bar; the last bar holds the highest value too.
    pub(crate) count: u64,
}

/// Counts `values` in `bins` bars of equal width; one bar when all values are equal, none when there are none.
pub(crate) fn histogram(values: &[f64], bins: usize) -> Vec<Bin> {
    let Summary { lowest, highest, .. } = Summary::of(values);
    if values.is_empty() || bins == 0 {
        return Vec::new();
    }
    let bins = if highest > lowest { bins } else { 1 };
    let width = (highest - lowest) / bins as f64;
    let mut histogram: Vec<Bin> =
        (0..bins).map(|index| Bin { lower: lowest + index as f64 * width, count: 0 }).collect();
    for value in values {
        // A float cast to an integer saturates; an all-equal series divides 0 by 0, and NaN casts to 0.
        let index = ((value - lowest) / width) as usize;
        histogram[index.min(bins - 1)].count += 1;
    }
    histogram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_runs_have_tgis_percentiles() {
        let shuffled = [7.0, 1.0, 10.0, 3.0, 9.0, 2.0, 8.0, 4.0, 6.0, 5.0];
        let summary = Summary::of(&shuffled);
        assert_eq!((summary.lowest, summary.highest, summary.average), (1.0, 10.0, 5.5));
        assert_eq!((summary.p50, summary.p90, summary.p99), (6.0, 10.0, 10.0), "the 6th and the 10th of ten");
    }

    #[test]
    fn a_hundred_runs_separate_the_percentiles() {
        let values: Vec<f64> = (0..100).rev().map(f64::from).collect();
        let summary = Summary::of(&values);
        assert_eq!((summary.p50, summary.p90, summary.p99), (50.0, 90.0, 99.0));
    }

    #[test]
    fn one_value_is_every_figure_and_none_is_not_a_number() {
        assert_eq!(
            Summary::of(&[4.0]),
            Summary { average: 4.0, lowest: 4.0, highest: 4.0, p50: 4.0, p90: 4.0, p99: 4.0 }
        );
        let empty = Summary::of(&[]);
        assert!(empty.average.is_nan() && empty.lowest.is_nan() && empty.p99.is_nan());
    }

    #[test]
    fn a_histogram_loses_no_value() {
        let bins = histogram(&[0.0, 0.9, 1.0, 2.5, 4.0], 4);
        let counts: Vec<u64> = bins.iter().map(|bin| bin.count).collect();
        assert_eq!(counts, [2, 1, 1, 1]);
        assert_eq!(bins[1].lower, 1.0);
        assert_eq!(histogram(&[3.0, 3.0], 5), [Bin { lower: 3.0, count: 2 }]);
        assert_eq!(histogram(&[], 5), []);
    }
}
