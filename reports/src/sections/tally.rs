//! Counts brought together over windows: what exits and translator sections are made of.
//!
//! Invariant: a [`Tally`] belongs to one source and one column; nothing here adds up two of them
//! but reasons of one kind within one source.

use std::borrow::Cow;
use std::collections::BTreeSet;

use maud::{Markup, html};
use reports_data::{ExitRow, Metric, Phase};

use crate::chart::{Bar, Panel};
use crate::format;
use crate::palette::kind_index;
use crate::table::{Tools, head, number_head, table};
use crate::view::View;

/// Source of exits to the VMM.
pub(super) const VMM: &str = "vmm";
/// Source of the translator's callouts.
pub(super) const TRANSLATOR: &str = "translator";
/// Source of what the host's kernel counts.
pub(super) const KVM_STATS: &str = "kvm-stats";

/// One reason in all windows of one workload, column and phase.
#[derive(Clone)]
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

/// One bar in every panel: which counts of which column.
pub(super) struct Series<'a> {
    /// Label of the bar.
    pub(super) label: Cow<'a, str>,
    /// Column.
    pub(super) mode: &'a str,
    /// Source.
    pub(super) source: &'a str,
    /// One reason alone, or all.
    pub(super) reason: Option<&'a str>,
}

/// Panels of the warm windows: workloads in which any series has a count.
pub(super) fn panels<'a>(
    view: &View<'a>,
    tallies: &[Tally<'a>],
    series: &[Series<'a>],
) -> Vec<Panel<'a>> {
    let of = |workload: &str, series: &Series<'_>| {
        let mut parts: Vec<(usize, f64)> = Vec::new();
        for tally in tallies.iter().filter(|tally| {
            tally.workload == workload
                && tally.mode == series.mode
                && tally.source == series.source
                && tally.phase == Phase::Warm
                && series.reason.is_none_or(|reason| reason == tally.reason)
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
    let workloads = view.workloads.iter().copied();
    workloads
        .filter_map(|workload| {
            let bars: Vec<Bar<'a>> = series
                .iter()
                .filter(|series| view.warm(workload, series.mode).is_some())
                .map(|series| Bar {
                    label: series.label.clone(),
                    parts: of(workload, series),
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

/// Which counts a [`matrix`] shows.
pub(super) struct Matrix<'a> {
    /// What they are, for the caption.
    pub(super) what: &'a str,
    /// What all reasons begin with; left out of the column heads.
    pub(super) prefix: &'a str,
    /// Column of the comparison.
    pub(super) mode: &'a str,
    /// Source.
    pub(super) source: &'a str,
    /// Phase.
    pub(super) phase: Phase,
}

/// Workloads down, reasons across, for one column, source and phase. Cold: the whole window,
/// because what happens once is not shared out over iterations. Warm: per iteration.
pub(super) fn matrix(view: &View<'_>, tallies: &[Tally<'_>], shown: &Matrix<'_>) -> Markup {
    let &Matrix {
        what,
        prefix,
        mode,
        source,
        phase,
    } = shown;
    let here = || {
        let tallies = tallies.iter();
        tallies.filter(|t| t.mode == mode && t.phase == phase && t.source == source)
    };
    let mut reasons: Vec<&str> = Vec::new();
    for tally in here() {
        if !reasons.contains(&tally.reason) {
            reasons.push(tally.reason);
        }
    }
    if reasons.is_empty() {
        return html! {};
    }
    let find = |workload: &str, reason: &str| {
        here().find(|tally| tally.workload == workload && tally.reason == reason)
    };
    let value = |tally: &Tally<'_>| match phase {
        Phase::Cold | Phase::Boot => tally.count as f64 / tally.windows as f64,
        Phase::Warm => tally.mean,
    };
    let workloads = view
        .workloads
        .iter()
        .filter(|workload| here().any(|tally| tally.workload == **workload));
    let body = html! {
        tbody {
            @for workload in workloads {
                tr {
                    th scope="row" { (workload) }
                    @for reason in &reasons {
                        @match find(workload, reason) {
                            Some(tally) => td.num data-v=(value(tally)) { (format::count(value(tally))) },
                            // The counts of a window leave zeros out.
                            None => td.num.zero data-v="0" { "0" },
                        }
                    }
                }
            }
        }
    };
    let share = match phase {
        Phase::Cold | Phase::Boot => "in a whole first window",
        Phase::Warm => "per iteration",
    };
    // The place, not the name: two names may come to the same anchor.
    let place = view.columns.iter().position(|column| column.name == mode);
    table(
        &format!(
            "{}-{}-{phase}",
            what.replace(' ', "-"),
            place.unwrap_or_default()
        ),
        &format!(
            "{}: {what} counts {share}, {phase}",
            view.run.manifest.label(mode)
        ),
        Tools::Sort,
        html! { tr { (head("Workload")) @for reason in &reasons { (number_head(reason.strip_prefix(prefix).unwrap_or(reason))) } } },
        body,
    )
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
