//! Exits per operation: what the VMM counted in the warm windows, and what the host's kernel did.
//!
//! Invariant: counts of different sources and of different columns are never added up.

use std::collections::BTreeSet;

use maud::{Markup, html};
use reports_data::{ExitRow, Metric, Phase};

use super::nothing;
use crate::Result;
use crate::chart::{Bar, Panel, stacked_bars};
use crate::format;
use crate::palette::kind_index;
use crate::table::{Tools, head, number_head, table};
use crate::view::View;

/// Source of the translator's callouts.
pub(super) const TRANSLATOR: &str = "translator";
/// Source of exits to the VMM.
const VMM: &str = "vmm";

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let tallies: Vec<Tally<'_>> = tallies(view)
        .into_iter()
        .filter(|tally| tally.source != TRANSLATOR)
        .collect();
    let caution = html! {
        p.caution {
            "An exit is a transition from guest to VMM. A translator's callout is not a VM exit: it \
            stays in the process and is shown under " a href="#translator" { "the translator" } ". \
            Exits of different engines stand side by side and are never added up: they cost \
            different amounts and mean different things."
        }
    };
    if tallies.is_empty() {
        return Ok(html! { (caution) (nothing("No exits were counted in this run.")) });
    }
    let title = "Exits to the VMM per iteration, warm, by kind";
    let chart = stacked_bars(
        "exits-chart",
        title,
        &panels(view, &tallies, VMM, Phase::Warm),
    )?;
    Ok(html! {
        (caution)
        @match chart {
            Some(chart) => (chart),
            None => (nothing("The VMM counted no exit in any warm window.")),
        }
        (without_exits(view, &tallies))
        (tally_table("exits-table", "Exits by reason: mean per iteration over the windows, with the smallest and the largest", view, &tallies))
    })
}

/// One reason in all windows of one workload, column and phase.
pub(super) struct Tally<'a> {
    pub(super) workload: &'a str,
    pub(super) mode: &'a str,
    pub(super) phase: Phase,
    pub(super) source: &'a str,
    pub(super) kind: &'a str,
    pub(super) reason: &'a str,
    /// Counts of all windows together.
    pub(super) count: u64,
    /// Windows, those without this reason included.
    pub(super) windows: usize,
    /// Windows that had this reason.
    seen: usize,
    /// Per iteration: mean over the windows, smallest, largest.
    pub(super) mean: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// Brings the windows together, in the page's order. A window that lacks a reason counts as 0.
pub(super) fn tallies<'a>(view: &View<'a>) -> Vec<Tally<'a>> {
    let mut tallies: Vec<Tally<'a>> = Vec::new();
    let rows = &view.run.exits;
    for workload in view.workloads.iter().copied() {
        for column in &view.columns {
            for &phase in Phase::ALL {
                let here: Vec<&ExitRow> = rows
                    .iter()
                    .filter(|row| {
                        row.workload == workload && row.mode == column.name && row.phase == phase
                    })
                    .collect();
                if here.is_empty() {
                    continue;
                }
                let windows = windows(view, workload, column.name, phase, &here);
                let start = tallies.len();
                for row in here {
                    let known = tallies[start..].iter_mut().find(|tally| {
                        tally.source == row.source
                            && tally.kind == row.kind
                            && tally.reason == row.reason
                    });
                    match known {
                        Some(tally) => tally.add(row),
                        None => tallies.push(Tally::new(row, windows)),
                    }
                }
                for tally in &mut tallies[start..] {
                    tally.close();
                }
            }
        }
    }
    tallies
}

/// How many windows there were: rounds with an ok time, and rounds that left counts.
fn windows(
    view: &View<'_>,
    workload: &str,
    mode: &str,
    phase: Phase,
    counts: &[&ExitRow],
) -> usize {
    let timed = view.run.samples.iter().filter(|sample| {
        sample.workload == workload
            && sample.mode == mode
            && sample.phase == phase
            && sample.metric.name == Metric::TIME.name
            && sample.status.is_ok()
    });
    let mut rounds: BTreeSet<(&str, u32)> = timed.map(|s| (s.run.as_str(), s.round)).collect();
    rounds.extend(counts.iter().map(|row| (row.run.as_str(), row.round)));
    rounds.len()
}

impl<'a> Tally<'a> {
    fn new(row: &'a ExitRow, windows: usize) -> Self {
        Tally {
            workload: &row.workload,
            mode: &row.mode,
            phase: row.phase,
            source: &row.source,
            kind: &row.kind,
            reason: &row.reason,
            count: row.count,
            windows,
            seen: 1,
            // The sum, until `close`.
            mean: row.per_iteration,
            low: row.per_iteration,
            high: row.per_iteration,
        }
    }

    fn add(&mut self, row: &ExitRow) {
        self.count = self.count.saturating_add(row.count);
        self.seen += 1;
        self.mean += row.per_iteration;
        self.low = self.low.min(row.per_iteration);
        self.high = self.high.max(row.per_iteration);
    }

    fn close(&mut self) {
        self.mean /= self.windows as f64;
        if self.seen < self.windows {
            self.low = 0.0;
        }
    }
}

/// Panels for one source and phase: workloads that have any count.
pub(super) fn panels<'a>(
    view: &View<'a>,
    tallies: &[Tally<'a>],
    source: &str,
    phase: Phase,
) -> Vec<Panel<'a>> {
    let of = |workload: &str, mode: &str| {
        let mut parts: Vec<(usize, f64)> = Vec::new();
        for tally in tallies.iter().filter(|tally| {
            tally.workload == workload
                && tally.mode == mode
                && tally.source == source
                && tally.phase == phase
        }) {
            let kind = kind_index(tally.kind);
            match parts.iter_mut().find(|part| part.0 == kind) {
                Some(part) => part.1 += tally.mean,
                None => parts.push((kind, tally.mean)),
            }
        }
        parts.sort_by_key(|part| part.0);
        parts
    };
    // Columns that count at all: a foreign VMM does not, and an empty bar would claim that it had none.
    let counting: Vec<_> = view
        .columns
        .iter()
        .filter(|column| {
            tallies
                .iter()
                .any(|t| t.mode == column.name && t.source == source)
        })
        .collect();
    view.workloads
        .iter()
        .filter_map(|workload| {
            let bars: Vec<Bar<'a>> = counting
                .iter()
                .filter(|column| view.time(workload, column.name, phase).figure().is_some())
                .map(|column| Bar {
                    label: column.label,
                    parts: of(workload, column.name),
                })
                .collect();
            let any = bars.iter().any(|bar| !bar.parts.is_empty());
            any.then_some(Panel {
                label: workload,
                bars,
            })
        })
        .collect()
}

/// Names the workloads whose windows had no exit at all in a column that counts.
fn without_exits(view: &View<'_>, tallies: &[Tally<'_>]) -> Markup {
    let lines: Vec<(&str, Vec<&str>)> = view
        .columns
        .iter()
        .filter(|column| {
            tallies
                .iter()
                .any(|t| t.mode == column.name && t.source == VMM)
        })
        .map(|column| {
            let quiet = view.compared().filter(|workload| {
                view.warm(workload, column.name).is_some()
                    && !tallies.iter().any(|tally| {
                        tally.workload == *workload
                            && tally.mode == column.name
                            && tally.source == VMM
                            && tally.phase == Phase::Warm
                    })
            });
            (column.label, quiet.collect())
        })
        .collect();
    html! {
        @for (label, quiet) in &lines {
            @if !quiet.is_empty() {
                p { b { (label) } " had no exit to the VMM in the warm windows of " (quiet.join(", ")) "." }
            }
        }
    }
}

/// The raw table.
pub(super) fn tally_table(
    id: &str,
    caption: &str,
    view: &View<'_>,
    tallies: &[Tally<'_>],
) -> Markup {
    let head = html! {
        tr {
            (head("Workload")) (head("Mode")) (head("Phase")) (head("Source")) (head("Kind"))
            (head("Reason")) (number_head("Per iteration")) (number_head("Counted"))
            (number_head("Windows"))
        }
    };
    let body = html! {
        tbody {
            @for tally in tallies {
                tr {
                    th scope="row" { (tally.workload) }
                    td { (view.run.manifest.label(tally.mode)) }
                    td { (tally.phase) }
                    td { (tally.source) }
                    td { span.swatch style={ "background:var(--k" (kind_index(tally.kind)) ")" } {} (tally.kind) }
                    td { (tally.reason) }
                    td.num data-v=(tally.mean) {
                        (format::count(tally.mean))
                        @if tally.low != tally.high {
                            span.spread { (format::count(tally.low)) "–" (format::count(tally.high)) }
                        }
                    }
                    td.num data-v=(tally.count) { (format::count(tally.count as f64)) }
                    td.num { (tally.windows) }
                }
            }
        }
    };
    table(id, caption, Tools::SortAndFilter, head, body)
}
