//! The report for people: aligned columns, and a bar that shows which rank has what.

use std::fmt::Write as _;

use super::{CommandReport, Report};
use crate::footprint::{CacheForecast, Footprint, RankFootprint};
use crate::preflight::Severity;

/// Cells of a bar.
const BAR: usize = 48;

pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    head(&mut out, report);
    match (&report.footprint, &report.unknown) {
        (Some(footprint), _) => {
            memory(&mut out, report, footprint);
            split(&mut out, footprint);
        }
        (None, unknown) => {
            let reason = unknown.as_deref().unwrap_or("nothing tells");
            line(&mut out, "\nMemory and tensor split are not known:");
            line(&mut out, &format!("  {reason}"));
        }
    }
    limits(&mut out, report);
    if !report.notices.is_empty() {
        line(&mut out, "\nNotices");
        report.notices.iter().for_each(|notice| line(&mut out, &format!("  {notice}")));
    }
    if !report.findings.is_empty() {
        line(&mut out, "\nPreflight, here and now");
        for finding in &report.findings {
            let severity = if finding.severity == Severity::Error { "error" } else { "warning" };
            line(&mut out, &format!("  {severity}: {}", finding.line));
        }
    }
    line(&mut out, "\nCommands");
    report.commands.iter().for_each(|command| process(&mut out, command));
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

fn head(out: &mut String, report: &Report) {
    let model = &report.model;
    let commit = model.commit.as_ref().map(|commit| format!(" at {commit}")).unwrap_or_default();
    let mut about = String::new();
    if let Some(footprint) = &report.footprint {
        let kept = if footprint.is_quantized { ", weights stay quantized" } else { "" };
        // Writing to a text cannot fail.
        let _ = write!(
            about,
            ", {} layers, {}{kept}, KV cache {}, context {}",
            footprint.num_layers, footprint.dtype, footprint.kv_dtype, footprint.max_context
        );
    }
    line(out, &format!("Model    {}{commit}{about}", model.id));
    match &model.root {
        Some(root) => {
            let files =
                if model.files == 1 { "1 weight file" } else { &format!("{} weight files", model.files) };
            line(out, &format!("Files    {root} ({files}, {} MiB)", mebibytes(model.file_bytes)));
        }
        None => line(out, "Files    not on this disk; serving downloads them first"),
    }
    let shards = report.commands.len().saturating_sub(1);
    line(out, &format!("Shards   {shards} on {}", report.device));
    line(out, &format!("Listen   http://{}", report.listen));
    line(out, &format!("Sockets  {}-RANK", report.sockets));
}

fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// A table; numbers are aligned at their right.
fn table(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    for row in rows {
        let mut text = String::from(" ");
        for (column, cell) in row.iter().enumerate().take(columns) {
            let padding = " ".repeat(width(column) - cell.chars().count());
            text.push_str(&format!(" {padding}{cell} "));
        }
        line(out, &text);
    }
}

fn memory(out: &mut String, report: &Report, footprint: &Footprint) {
    line(out, "\nMemory of each rank in MiB");
    let heads = [
        "rank",
        "device",
        "free now",
        "weights",
        "workspace",
        "logits",
        "KV cache",
        "KV bytes/token",
        "tokens",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let mut problems = Vec::new();
    for (rank, part) in footprint.ranks.iter().enumerate() {
        let device = report.devices.get(rank);
        let name = device.map_or_else(|| report.device.to_owned(), |device| device.id.clone());
        let free = device.and_then(|device| device.free_bytes).map(mebibytes);
        let (cache, tokens) = match &part.cache {
            Some(CacheForecast::Fits { num_blocks, total_tokens, .. }) => {
                (mebibytes(num_blocks.saturating_mul(part.block_bytes)).to_string(), total_tokens.to_string())
            }
            Some(CacheForecast::TooLittle(problem)) => {
                problems.push(format!("  rank {rank}: {problem}"));
                ("-".to_owned(), "0".to_owned())
            }
            None => ("?".to_owned(), "?".to_owned()),
        };
        rows.push(vec![
            rank.to_string(),
            name,
            free.map_or_else(|| "?".to_owned(), |free| free.to_string()),
            mebibytes(part.weight_bytes).to_string(),
            mebibytes(part.workspace_bytes).to_string(),
            mebibytes(part.logits_bytes).to_string(),
            cache,
            (part.block_bytes / footprint.block_size.max(1) as u64).to_string(),
            tokens,
        ]);
    }
    if report.devices.is_empty() {
        // The processor's memory is one for all ranks: it is not a rank's own.
        rows.iter_mut().for_each(|row| drop(row.remove(2)));
    }
    table(out, &rows);
    problems.iter().for_each(|problem| line(out, problem));
}

/// What a rank has of something that is split.
type PartOf = fn(&RankFootprint) -> [usize; 2];

fn split(out: &mut String, footprint: &Footprint) {
    line(out, "\nTensor split; each cell of a bar is the number of the rank that has it");
    let kinds: [(&str, PartOf); 4] = [
        ("query heads", |rank| rank.query_heads),
        ("KV heads", |rank| rank.kv_heads),
        ("feed-forward", |rank| rank.feed_forward),
        ("vocabulary", |rank| rank.vocabulary),
    ];
    for (name, range) in kinds {
        let ranges: Vec<[usize; 2]> = footprint.ranks.iter().map(range).collect();
        let texts: Vec<String> = ranges.iter().map(|range| inclusive(*range)).collect();
        line(out, &format!("  {name:<12} {}  {}", bar(&ranges), texts.join(" | ")));
    }
}

fn inclusive([start, end]: [usize; 2]) -> String {
    match end.saturating_sub(start) {
        0 => "-".to_owned(),
        1 => start.to_string(),
        _ => format!("{start}-{}", end - 1),
    }
}

/// One cell for each forty-eighth; where several ranks have the same, they share its cells.
fn bar(ranges: &[[usize; 2]]) -> String {
    let total = ranges.iter().map(|range| range[1]).max().unwrap_or(0);
    let cell = |cell: usize| {
        let at = cell * total / BAR;
        let owners: Vec<usize> =
            (0..ranges.len()).filter(|&rank| (ranges[rank][0]..ranges[rank][1]).contains(&at)).collect();
        let first_cell = (0..=cell).rev().take_while(|&cell| cell * total / BAR == at).last().unwrap_or(cell);
        let rank = owners.get((cell - first_cell) % owners.len().max(1)).copied();
        rank.and_then(|rank| char::from_digit((rank % 36) as u32, 36)).unwrap_or('.')
    };
    (0..BAR).map(cell).collect()
}

fn limits(out: &mut String, report: &Report) {
    line(out, "\nLimits in tokens");
    let limits = &report.limits;
    let shown = |limit: Option<u64>| {
        limit.map_or_else(|| "measured at warm-up".to_owned(), |limit| limit.to_string())
    };
    for (name, limit) in [
        ("prompt (max-input-tokens)", shown(limits.max_input_tokens)),
        ("prompt and answer (max-total-tokens)", shown(limits.max_total_tokens)),
        ("prompts of a step (max-batch-prefill-tokens)", limits.max_batch_prefill_tokens.to_string()),
        ("all running requests (max-batch-total-tokens)", shown(limits.max_batch_total_tokens)),
    ] {
        line(out, &format!("  {name:<46} {limit}"));
    }
}

fn process(out: &mut String, command: &CommandReport) {
    line(out, &format!("  {}", command.name));
    let pairs: Vec<String> =
        command.env.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
    pairs.chunks(4).for_each(|pairs| line(out, &format!("    {} \\", pairs.join(" "))));
    let words: Vec<String> = command.args.iter().map(|word| quoted(word)).collect();
    line(out, &format!("    {} {}", quoted(&command.program), words.join(" ")));
}

/// As a shell reads it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@+*".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_show_who_has_what() {
        assert_eq!(bar(&[[0, 2], [2, 3]]), format!("{}{}", "0".repeat(32), "1".repeat(16)));
        // Two ranks that keep the same head share its cells.
        assert_eq!(bar(&[[0, 1], [0, 1]]), "01".repeat(24));
        assert_eq!(bar(&[[0, 49152]]), "0".repeat(48));
        assert_eq!(bar(&[]), ".".repeat(48));
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["rank", "x"], ["0", "12345"]].map(|row| row.map(str::to_owned).to_vec());
        let mut out = String::new();
        table(&mut out, &rows);
        assert_eq!(out, "  rank      x\n     0  12345\n");
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("/a/b-c:1"), "/a/b-c:1");
        assert_eq!(quoted(""), "''");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn ranges_are_written_with_their_last() {
        assert_eq!([inclusive([0, 6]), inclusive([6, 7]), inclusive([3, 3])], ["0-5", "6", "-"]);
    }
}
