//! How late timers are: percentiles over all windows, as curves and as a table.
//!
//! Invariant: percentiles come from the histograms of all rounds together, and their number of
//! values stands beside them.

use maud::{Markup, html};
use reports_data::{Histogram, Phase};

use super::latencies;
use crate::Result;
use crate::chart::{CurvePanel, curves};
use crate::format;
use crate::sections::nothing;
use crate::table::{Tools, absent, cell, column_heads, head, reasons, series, table};
use crate::view::{Column, View};
use crate::workloads::Group;

/// Shares that a cell names.
const SHARES: &[(f64, &str)] = &[(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (1.0, "max")];

/// Workloads whose histogram is of interrupts: timers, and the interrupt to oneself.
const SELF: &str = "self_ipi";

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let timers = view.group(Group::Timers);
    let workloads: Vec<&str> = timers
        .chain(view.group(Group::Io).filter(|workload| *workload == SELF))
        .collect();
    if workloads.is_empty() {
        return Ok(html! {});
    }
    let guests: Vec<&Column<'_>> = view.guests().collect();
    let panels: Vec<CurvePanel<'_>> = workloads
        .iter()
        .map(|workload| CurvePanel {
            label: workload,
            curves: guests
                .iter()
                .filter_map(|c| Some((series(c), latencies(view, workload, c.name)?)))
                .collect(),
        })
        .filter(|panel| !panel.curves.is_empty())
        .collect();
    let columns: Vec<(&str, usize)> = guests.iter().map(|c| (c.label, series(c))).collect();
    let title = "How late an interrupt is: share of interrupts that came no later";
    let chart = curves("lateness-chart", title, &columns, &panels)?;
    let body = html! {
        tbody {
            @for workload in &workloads {
                tr {
                    th scope="row" { (workload) }
                    @for column in &guests { (lateness(view, workload, column)) }
                }
            }
        }
    };
    let cells = workloads.iter().flat_map(|workload| {
        let columns = guests.iter();
        columns.map(|c| (*workload, c.name, view.time(workload, c.name, Phase::Warm)))
    });
    Ok(html! {
        h3 { "Timers" }
        p {
            "How much later than asked for a one-shot timer's handler began; for hlt_wake up to the \
            instruction after the halt, and for self_ipi from the sending to the handler. By the guest's \
            own clock, all rounds together. With few values the last percentiles are the greatest value."
        }
        @match chart {
            Some(chart) => (chart),
            None => (nothing("No timer has a histogram.")),
        }
        (table(
            "lateness",
            "Lateness of interrupts: median, 90th and 99th percentile, greatest, number of values",
            Tools::Sort,
            html! { tr { (head("Workload")) (column_heads(view.guests())) } },
            body,
        ))
        (reasons(view, cells))
    })
}

fn lateness(view: &View<'_>, workload: &str, column: &Column<'_>) -> Markup {
    match latencies(view, workload, column.name) {
        Some(all) => html! {
            td.num data-v=(all.percentile(0.5).unwrap_or_default()) { (percentiles(&all)) }
        },
        None => match view.time(workload, column.name, Phase::Warm) {
            // Measured, but the guest has no clock to give.
            time if time.figure().is_some() => absent(),
            time => cell(time, |_| html! {}),
        },
    }
}

fn percentiles(all: &Histogram) -> Markup {
    html! {
        @for (share, name) in SHARES {
            @if let Some(value) = all.percentile(*share) {
                span.spread { (name) " " (format::time(value as f64)) }
            }
        }
        span.spread { "n " (all.total()) }
    }
}
