//! The short table at the end of a run, from its summary.
//!
//! Renders what the summary holds and computes nothing but the geometric mean; the report shows
//! more. Invariant: a cell without a figure shows its status, never a blank or a zero.

use std::fmt::Write as _;

use programs::Group;
use reports_data::held_against::{self, FLOORS, standings};
use reports_data::{FLOOR, Manifest, Metric, ModeInfo, NATIVE, Phase, Role, Summary, SummaryRow};

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    Table,
    /// Every row of the summary, tab-separated.
    Tsv,
    /// The summary as JSON.
    Json,
}

/// Renders a summary.
///
/// # Errors
/// JSON that can't be written; the summary's types rule that out.
pub fn render(
    format: Format,
    manifest: &Manifest,
    summary: &Summary,
) -> Result<String, serde_json::Error> {
    match format {
        Format::Table => Ok(table(manifest, summary)),
        Format::Tsv => Ok(tsv(summary)),
        Format::Json => serde_json::to_string_pretty(summary).map(|json| json + "\n"),
    }
}

fn table(manifest: &Manifest, summary: &Summary) -> String {
    let modes: Vec<&str> = columns_of(manifest)
        .map(|mode| mode.name.as_str())
        .collect();
    let mut workloads: Vec<&str> = Vec::new();
    for row in warm_times(summary) {
        if !workloads.contains(&row.workload.as_str()) {
            workloads.push(&row.workload);
        }
    }
    workloads.sort_by_key(|name| catalogue_position(name));

    let mut lines = vec![header(manifest)];
    let mut notes: Vec<(String, Vec<String>)> = Vec::new();
    for workload in &workloads {
        let mut line = vec![(*workload).to_owned()];
        for mode in &modes {
            let time = summary.find(workload, mode, Phase::Warm, &Metric::TIME.name);
            line.push(time.map_or("-".to_owned(), |row| cell(summary, row)));
            if let Some(row) = time.filter(|row| !row.status.is_ok()) {
                let note = format!("{} in {mode}: {}", row.status, row.reason);
                match notes.iter_mut().find(|(text, _)| *text == note) {
                    Some((_, names)) => names.push((*workload).to_owned()),
                    None => notes.push((note, vec![(*workload).to_owned()])),
                }
            }
        }
        lines.push(line);
    }
    lines.push(means(summary, &modes));

    let mut text = String::from("warm time of one iteration, median (times native)\n\n");
    text.push_str(&columns(&lines));
    if !notes.is_empty() {
        text.push('\n');
    }
    for (note, names) in notes {
        let _ = writeln!(text, "{note} [{}]", names.join(" "));
    }
    text.push_str(&floors(manifest, summary));
    text
}

/// What has a column: floors have lines of their own.
fn columns_of(manifest: &Manifest) -> impl Iterator<Item = &ModeInfo> {
    let modes = manifest.modes.iter();
    modes.filter(|mode| mode.role != Role::Floor)
}

/// The host's own operations, and how the modes that are made of them stand to them. Empty in a run
/// without floors.
fn floors(manifest: &Manifest, summary: &Summary) -> String {
    let rows: Vec<(&str, &SummaryRow)> = FLOORS
        .iter()
        .filter_map(|(name, about)| {
            let row = summary.find(name, FLOOR, Phase::Warm, &Metric::TIME.name)?;
            Some((*about, row))
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut text = String::from("\nfloors of the host:");
    for (index, (about, row)) in rows.iter().enumerate() {
        let separator = if index == 0 { " " } else { ", " };
        let figure = match row.value {
            Some(value) => duration(value),
            None => format!("{} ({})", row.status, row.reason),
        };
        let _ = write!(text, "{separator}{about} {figure}");
    }
    text.push('\n');
    let engine = |mode: &&ModeInfo| mode.engine == held_against::ENGINE;
    for mode in columns_of(manifest).filter(engine) {
        for standing in standings(summary, &mode.name) {
            let aim = standing.aim;
            let (what, bound) = match aim.floor {
                Some(floor) => (
                    format!("{} of {floor}", times(standing.measure())),
                    times(aim.most),
                ),
                None => (duration(standing.time), duration(aim.most)),
            };
            let verdict = if standing.is_met() { "met" } else { "missed" };
            let _ = writeln!(
                text,
                "{} in {}: {what}, aim at most {bound}: {verdict}",
                aim.workload, mode.name
            );
        }
    }
    text
}

fn warm_times(summary: &Summary) -> impl Iterator<Item = &SummaryRow> {
    summary.rows.iter().filter(|row| {
        row.phase == Phase::Warm && row.metric == Metric::TIME.name && row.mode != FLOOR
    })
}

fn catalogue_position(name: &str) -> usize {
    programs::CATALOGUE
        .iter()
        .position(|workload| workload.name == name)
        .unwrap_or(usize::MAX)
}

fn header(manifest: &Manifest) -> Vec<String> {
    std::iter::once("workload".to_owned())
        .chain(columns_of(manifest).map(|mode| mode.label.clone()))
        .collect()
}

fn cell(summary: &Summary, row: &SummaryRow) -> String {
    let Some(value) = row.value else {
        return row.status.to_string();
    };
    let slowdown = &Metric::SLOWDOWN.name;
    let slowdown = summary.find(&row.workload, &row.mode, Phase::Warm, slowdown);
    match slowdown.and_then(|row| row.value) {
        Some(ratio) => format!("{} ({})", duration(value), times(ratio)),
        None => duration(value),
    }
}

/// Geometric means of the compute workloads' slowdowns, each with how many stand behind it. Devices
/// are no part of it: a mean over processor and disk says nothing about either.
fn means(summary: &Summary, modes: &[&str]) -> Vec<String> {
    let mut line = vec!["compute, geomean".to_owned()];
    for mode in modes {
        let rows: Vec<&SummaryRow> = summary
            .rows
            .iter()
            .filter(|row| row.mode == *mode && row.metric == Metric::SLOWDOWN.name)
            .filter(|row| programs::find(&row.workload).is_some_and(|w| w.group == Group::Compute))
            .collect();
        let logs: Vec<f64> = rows
            .iter()
            .filter_map(|row| row.value)
            .filter(|&value| value > 0.0)
            .map(f64::ln)
            .collect();
        line.push(if logs.is_empty() || *mode == NATIVE {
            "-".to_owned()
        } else {
            let mean = (logs.iter().sum::<f64>() / logs.len() as f64).exp();
            format!("{} ({} of {})", times(mean), logs.len(), rows.len())
        });
    }
    line
}

fn times(ratio: f64) -> String {
    if ratio < 10.0 {
        format!("{ratio:.2}x")
    } else {
        format!("{ratio:.1}x")
    }
}

/// Nanoseconds with three significant digits and a unit that keeps them short.
fn duration(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let decimals = match value {
        value if value < 10.0 => 2,
        value if value < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {unit}")
}

fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ = if column == 0 {
                write!(row, "{cell:<width$}")
            } else {
                write!(row, "  {cell:>width$}")
            };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

fn tsv(summary: &Summary) -> String {
    let mut text = String::from(
        "workload\tmode\tphase\tmetric\tunit\tvalue\tci_low\tci_high\tn\tstatus\treason\n",
    );
    let figure = |value: Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
    for row in &summary.rows {
        let cells = [
            row.workload.clone(),
            row.mode.clone(),
            row.phase.to_string(),
            row.metric.clone(),
            row.unit.to_string(),
            figure(row.value),
            figure(row.ci_low),
            figure(row.ci_high),
            row.n.to_string(),
            row.status.to_string(),
            row.reason.replace(['\t', '\n'], " "),
        ];
        text.push_str(&cells.join("\t"));
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_three_digits() {
        for (ns, text) in [
            (1.234, "1.23 ns"),
            (66.04, "66.0 ns"),
            (999.4, "999 ns"),
            (15_826.0, "15.8 µs"),
            (2.5e6, "2.50 ms"),
            (3e9, "3.00 s"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }

    #[test]
    fn columns_are_aligned_by_characters() {
        let lines = [vec!["a", "1 µs"], vec!["long", "10 ns"]]
            .map(|line| line.into_iter().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(columns(&lines), "a      1 µs\nlong  10 ns\n");
    }
}
