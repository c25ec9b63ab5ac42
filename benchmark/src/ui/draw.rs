//! One frame: title, tabs, gauges, figures and histograms of the chosen batch size, charts of all.

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Bar, BarChart, Block, Gauge, Paragraph, Tabs};

use super::app::App;
use super::charts::Scatter;
use crate::measurements::{BatchMeasurements, Measurements};
use crate::settings::Settings;
use crate::stats::{Summary, histogram};

const KEYS: &str = "<- | tab | ->: change batch | +/-: zoom | q / CTRL + c: quit";

/// The same where there is no room for it beside the title.
const SHORT_KEYS: &str = "tab | +/- | q";

/// Columns of a histogram's bar: a latency such as `1234.5` fits below it.
const BAR_WIDTH: u16 = 6;

const PREFILL_CHART: Scatter = Scatter {
    title: "Prefill throughput over latency",
    latencies: BatchMeasurements::prefill_latencies,
    throughputs: BatchMeasurements::prefill_throughputs,
};

const DECODE_CHART: Scatter = Scatter {
    title: "Decode throughput over latency",
    latencies: BatchMeasurements::decode_latencies,
    throughputs: BatchMeasurements::decode_throughputs,
};

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, settings: &Settings, measurements: &Measurements, app: &App) {
    let rows = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Length(3),
        Constraint::Length(13),
        Constraint::Min(10),
    ]);
    let [title, tabs, gauges, figures, charts] = frame.area().layout(&rows);
    draw_title(frame, title, settings);
    draw_tabs(frame, tabs, measurements, app);
    draw_gauges(frame, gauges, settings, measurements, app);
    if let Some(batch) = measurements.batches.get(app.tab) {
        draw_figures(frame, figures, batch);
    }
    let [left, right] = charts.layout(&Layout::horizontal([Constraint::Fill(1); 2]));
    PREFILL_CHART.draw(frame, left, &measurements.batches, app.zoom);
    DECODE_CHART.draw(frame, right, &measurements.batches, app.zoom);
}

fn draw_title(frame: &mut Frame<'_>, area: Rect, settings: &Settings) {
    let title = format!(
        "Model: {} | Sequence Length: {} | Decode Length: {}",
        settings.model, settings.sequence_length, settings.decode_length
    );
    let fits = |keys: &str| Line::from(title.as_str()).width() + keys.len() < usize::from(area.width);
    let keys = if fits(KEYS) { KEYS } else { SHORT_KEYS };
    // A long title is cut, not run into.
    let columns = [Constraint::Fill(1), Constraint::Length(keys.len() as u16 + 1)];
    let [left, right] = area.layout(&Layout::horizontal(columns));
    frame.render_widget(Paragraph::new(title).style(Style::default().fg(Color::White)), left);
    frame.render_widget(
        Paragraph::new(keys).alignment(Alignment::Right).style(Style::default().fg(Color::Gray)),
        right,
    );
}

fn draw_tabs(frame: &mut Frame<'_>, area: Rect, measurements: &Measurements, app: &App) {
    let tabs = Tabs::new(measurements.batches.iter().map(|batch| format!("Batch: {}", batch.batch_size)))
        .block(Block::bordered().title("Tabs"))
        .select(app.tab)
        .style(Style::default().fg(Color::Cyan))
        .highlight_style(Style::default().fg(Color::White).add_modifier(Modifier::BOLD));
    frame.render_widget(tabs, area);
}

fn draw_gauges(
    frame: &mut Frame<'_>,
    area: Rect,
    settings: &Settings,
    measurements: &Measurements,
    app: &App,
) {
    let [total, batch] = area.layout(&Layout::horizontal([Constraint::Fill(1); 2]));
    let done = measurements.batches.iter().filter(|batch| batch.runs.len() >= settings.runs).count();
    let runs = measurements.batches.get(measurements.current_batch).map_or(0, |batch| batch.runs.len());
    let color = |color| if app.failure.is_some() { Color::Red } else { color };
    // TGI's gauges only turn red; why is what the user needs to know.
    let total_label =
        app.failure.clone().unwrap_or_else(|| format!("{done} / {}", measurements.batches.len()));
    frame.render_widget(
        gauge("Total Progress", color(Color::Green), done, measurements.batches.len()).label(total_label),
        total,
    );
    frame.render_widget(
        gauge("Batch Progress", color(Color::Blue), runs, settings.runs)
            .label(format!("{runs} / {}", settings.runs)),
        batch,
    );
}

fn gauge(title: &'static str, color: Color, done: usize, of: usize) -> Gauge<'static> {
    let ratio = (done as f64 / of.max(1) as f64).clamp(0.0, 1.0);
    Gauge::default()
        .block(Block::bordered().title(title))
        .gauge_style(Style::default().fg(color))
        .ratio(ratio)
}

fn draw_figures(frame: &mut Frame<'_>, area: Rect, batch: &BatchMeasurements) {
    let columns = Layout::horizontal([Constraint::Percentage(25); 4]);
    let halves = Layout::vertical([Constraint::Length(8), Constraint::Length(5)]);
    let [prefill, prefill_bars, decode, decode_bars] = area.layout(&columns);

    let [top, bottom] = prefill.layout(&halves);
    draw_latency(frame, top, "Prefill Latency", &batch.prefill_latencies());
    draw_throughput(frame, bottom, "Prefill Throughput", &batch.prefill_throughputs());
    draw_histogram(frame, prefill_bars, "Prefill Latency Histogram (ms)", &batch.prefill_latencies());

    let [top, bottom] = decode.layout(&halves);
    let [total, token] = top.layout(&Layout::horizontal([Constraint::Fill(1); 2]));
    draw_latency(frame, total, "Decode Total Latency", &batch.decode_latencies());
    draw_latency(frame, token, "Decode Token Latency", &batch.decode_token_latencies());
    draw_throughput(frame, bottom, "Decode Throughput", &batch.decode_throughputs());
    draw_histogram(frame, decode_bars, "Decode Latency Histogram (ms)", &batch.decode_latencies());
}

fn draw_latency(frame: &mut Frame<'_>, area: Rect, title: &str, values: &[f64]) {
    let summary = Summary::of(values);
    let line = |name: &str, value: f64| Line::raw(format!("{name}: {value:.2} ms"));
    let colored = |name: &str, value: f64, color| line(name, value).style(Style::default().fg(color));
    let lines = vec![
        line("Average", summary.average),
        line("Lowest", summary.lowest),
        line("Highest", summary.highest),
        colored("p50", summary.p50, Color::Green),
        colored("p90", summary.p90, Color::Yellow),
        colored("p99", summary.p99, Color::Red),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title.to_string())), area);
}

fn draw_throughput(frame: &mut Frame<'_>, area: Rect, title: &str, values: &[f64]) {
    let summary = Summary::of(values);
    let line = |name: &str, value: f64| Line::raw(format!("{name}: {value:.2} tokens/secs"));
    let lines = vec![
        line("Average", summary.average),
        line("Lowest", summary.lowest),
        line("Highest", summary.highest),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title.to_string())), area);
}

fn draw_histogram(frame: &mut Frame<'_>, area: Rect, title: &str, values: &[f64]) {
    let bins = usize::from((area.width.saturating_sub(2) / (BAR_WIDTH + 1)).max(1));
    let bars: Vec<Bar<'_>> = histogram(values, bins)
        .into_iter()
        .map(|bin| Bar::new(bin.count).label(Line::from(Span::raw(format!("{:.1}", bin.lower)))))
        .collect();
    let chart = BarChart::vertical(bars)
        .block(Block::bordered().title(title.to_string()))
        .bar_width(BAR_WIDTH)
        .bar_gap(1)
        .bar_style(Style::default().fg(Color::Blue));
    frame.render_widget(chart, area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::measurements::tests::run;
    use crate::runner::Event;
    use crate::settings::tests::settings;

    fn drawn(measurements: &Measurements, app: &App, width: u16, height: u16) -> String {
        let settings = settings(&["-b", "1", "-b", "8", "-r", "2"]);
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &settings, measurements, app)).unwrap();
        terminal.backend().to_string()
    }

    fn measured() -> Measurements {
        let mut measurements = Measurements::new(&[1, 8]);
        for ms in [10, 20] {
            measurements.record(&Event::RunDone { batch: 0, run: run(ms) });
        }
        measurements
    }

    #[test]
    fn a_frame_shows_every_part() {
        let text = drawn(&measured(), &App::new(2), 200, 45);
        for part in [
            "Model: some/model | Sequence Length: 10 | Decode Length: 8",
            "q / CTRL + c: quit",
            "Batch: 1",
            "Batch: 8",
            "Total Progress",
            "1 / 2",
            "Batch Progress",
            "2 / 2",
            "Prefill Latency",
            "Average: 15.00 ms",
            "p99: 20.00 ms",
            "Decode Total Latency",
            "Decode Token Latency",
            "Lowest: 5.00 ms",
            "Highest: 10.00 tokens/secs",
            "Prefill Latency Histogram",
            "Decode Latency Histogram",
            "Prefill throughput over latency",
            "Decode throughput over latency",
        ] {
            assert!(text.contains(part), "`{part}` is missing in\n{text}");
        }
        assert!(text.contains('█') || text.contains('•') || text.contains('■'), "points are drawn");
    }

    #[test]
    fn a_narrow_frame_has_a_short_list_of_keys_beside_the_whole_title() {
        let text = drawn(&measured(), &App::new(2), 80, 45);
        let title = text.lines().next().unwrap();
        assert!(title.contains("| Decode Length: 8 ") && title.contains(" tab | +/- | q"), "{title}");
    }

    #[test]
    fn a_failure_is_told_in_the_gauge() {
        let mut app = App::new(2);
        app.failure = Some("decode failed: lost".to_string());
        assert!(drawn(&measured(), &app, 160, 45).contains("decode failed: lost"));
    }

    #[test]
    fn any_size_and_any_state_can_be_drawn() {
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            for zoom in [-20, 0, 20] {
                let mut app = App::new(2);
                app.zoom = zoom;
                drawn(&measured(), &app, width, height);
                drawn(&Measurements::new(&[]), &app, width, height);
            }
        }
    }
}
