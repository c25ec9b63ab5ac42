//! Throughput over latency, one point a run and one colour a batch size.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Style};
use ratatui::symbols::Marker;
use ratatui::text::Span;
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType};

use crate::measurements::BatchMeasurements;

/// Easy to tell apart on dark and on light ground; used again from the start after the last.
const COLORS: [Color; 6] =
    [Color::Red, Color::Green, Color::Yellow, Color::Blue, Color::Magenta, Color::Cyan];

/// Half of the window shrinks by this with each zoom step.
const ZOOM_FACTOR: f64 = 0.9;

/// One chart: a title, and how to take x and y from a batch size.
pub(super) struct Scatter {
    pub(super) title: &'static str,
    pub(super) latencies: fn(&BatchMeasurements) -> Vec<f64>,
    pub(super) throughputs: fn(&BatchMeasurements) -> Vec<f64>,
}

impl Scatter {
    /// Draws all runs of all batch sizes into `area`.
    pub(super) fn draw(&self, frame: &mut Frame<'_>, area: Rect, batches: &[BatchMeasurements], zoom: i32) {
        let series: Vec<(String, Vec<(f64, f64)>)> = batches
            .iter()
            .map(|batch| {
                let points = (self.latencies)(batch).into_iter().zip((self.throughputs)(batch)).collect();
                (format!("Batch: {}", batch.batch_size), points)
            })
            .collect();
        let points = || series.iter().flat_map(|(_, points)| points.iter().copied());
        let x_bounds = window(points().map(|(x, _)| x), zoom);
        let y_bounds = window(points().map(|(_, y)| y), zoom);
        let datasets = series
            .iter()
            .zip(COLORS.into_iter().cycle())
            .map(|((name, points), color)| {
                Dataset::default()
                    .name(name.as_str())
                    .marker(Marker::Block)
                    .graph_type(GraphType::Scatter)
                    .style(Style::default().fg(color))
                    .data(points)
            })
            .collect();
        let chart = Chart::new(datasets)
            .block(Block::bordered().title(self.title))
            .x_axis(axis("ms", x_bounds))
            .y_axis(axis("tokens/secs", y_bounds));
        frame.render_widget(chart, area);
    }
}

fn axis(unit: &'static str, bounds: [f64; 2]) -> Axis<'static> {
    let [low, high] = bounds;
    let labels = [low, (low + high) / 2.0, high].map(|value| Span::raw(format!("{value:.2}")));
    Axis::default().title(unit).style(Style::default().fg(Color::Gray)).bounds(bounds).labels(labels)
}

/// The values with a margin of a tenth, magnified `zoom` steps around their middle; never empty.
fn window(values: impl Iterator<Item = f64>, zoom: i32) -> [f64; 2] {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |range, value| (range.0.min(value), range.1.max(value)));
    if low > high {
        return [0.0, 1.0];
    }
    let middle = (low + high) / 2.0;
    let spread = if high > low { (high - low) / 2.0 } else { (middle.abs() / 2.0).max(0.5) };
    let half = spread * 1.1 * ZOOM_FACTOR.powi(zoom);
    [(middle - half).max(0.0), middle + half]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_holds_all_values_and_shrinks_around_the_middle() {
        let values = [10.0, 20.0];
        let [low, high] = window(values.into_iter(), 0);
        assert!(low < 10.0 && high > 20.0);
        let [zoomed_low, zoomed_high] = window(values.into_iter(), 5);
        assert!(zoomed_low > low && zoomed_high < high && zoomed_low < 15.0);
        let [wide_low, wide_high] = window(values.into_iter(), -5);
        assert!(wide_low < low && wide_high > high);
    }

    #[test]
    fn a_window_is_never_empty() {
        assert_eq!(window([].into_iter(), 0), [0.0, 1.0]);
        assert_eq!(window([f64::NAN, f64::INFINITY].into_iter(), 0), [0.0, 1.0]);
        for value in [0.0, 7.0] {
            let [low, high] = window([value].into_iter(), 20);
            assert!(low < high && low <= value && value <= high);
        }
    }
}
