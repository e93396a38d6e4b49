//! I/O: what each mode gets through its devices, how long a request takes, and what it costs in
//! exits; then whether paravirtual devices pay.
//!
//! Invariant: a cell's figures all come from the same windows of the same column.

mod aims;
pub(super) mod claim;
mod latency;

use maud::{Markup, html};
use reports_data::{Histogram, Metric, Phase};

use super::nothing;
use crate::Result;
use crate::format;
use crate::table::{Tools, cell, column_heads, head, reasons, table};
use crate::view::{Column, Figure, View};
use crate::workloads::{Group, Moves, moves};

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let devices: Vec<&str> = view.group(Group::Io).collect();
    if devices.is_empty() && view.group(Group::Timers).next().is_none() {
        return Ok(nothing("This run had no I/O workload."));
    }
    Ok(html! {
        p {
            "The same requests through emulated devices (flavour unaware: ATA by port I/O, NE2000, UART) and \
            through paravirtual ones (flavour hybrid: virtio; flavour aware: hypercalls), each on the same \
            backing: see " a href="#environment" { "environment" } ". Native is a process with system \
            calls. Every figure is of windows whose content was verified."
        }
        (claim::content(view))
        (aims::content(view))
        @if !devices.is_empty() { (rates(view, &devices)) }
        (latency::content(view)?)
    })
}

/// All values of a column's warm windows at a workload.
fn latencies(view: &View<'_>, workload: &str, mode: &str) -> Option<Histogram> {
    view.warm(workload, mode)?;
    let mut all = Histogram::default();
    let rows = view
        .run
        .latencies
        .iter()
        .filter(|row| row.workload == workload && row.mode == mode && row.phase == Phase::Warm);
    for row in rows {
        all.add(row.range);
    }
    (all.total() > 0).then_some(all)
}

/// The table of rates.
fn rates(view: &View<'_>, workloads: &[&str]) -> Markup {
    let body = html! {
        tbody {
            @for workload in workloads {
                tr {
                    th scope="row" { (workload) }
                    @for column in &view.columns {
                        (cell(view.time(workload, column.name, Phase::Warm), |figure| {
                            rate(view, workload, column, figure)
                        }))
                    }
                }
            }
        }
    };
    let cells = workloads.iter().flat_map(|workload| {
        let columns = view.columns.iter();
        columns.map(|c| (*workload, c.name, view.time(workload, c.name, Phase::Warm)))
    });
    html! {
        (table(
            "io-rates",
            "Median rate with its 95 % interval; below it median and 99th percentile of a request's time \
             where requests are timed (at depth 32: of a batch), and exits to the VMM per request",
            Tools::Sort,
            html! { tr { (head("Workload")) (column_heads(view.columns.iter())) } },
            body,
        ))
        (reasons(view, cells))
    }
}

/// A rate and what belongs to it.
fn rate(view: &View<'_>, workload: &str, column: &Column<'_>, time: Figure) -> Markup {
    let exits = view.cell(workload, column.name, Phase::Warm, &Metric::EXITS);
    // The window without the marks may have come out as nothing: no rate then.
    let per_ns = |ns: f64| if ns > 0.0 { 1.0 / ns } else { f64::NAN };
    let (scale, unit) = match moves(workload) {
        // Bytes in a nanosecond are thousands of megabytes in a second.
        Some(Moves::Bytes(bytes)) => (bytes * 1e3, "MB/s"),
        Some(Moves::One(name)) => (1e9, name),
        None => (1e9, "/s"),
    };
    html! {
        @if time.value > 0.0 { (format::figure(scale * per_ns(time.value))) " " (unit) }
        @else { span.status.absent { "too fast" } }
        @if let Some((low, high)) = time.interval.filter(|(low, _)| *low > 0.0) {
            span.spread { (format::range(scale * per_ns(high), scale * per_ns(low))) }
        }
        @if let Some(latencies) = latencies(view, workload, column.name) {
            @if let (Some(half), Some(most)) = (latencies.percentile(0.5), latencies.percentile(0.99)) {
                span.spread { (format::time(half as f64)) " · " (format::time(most as f64)) }
            }
        }
        @if let Some(exits) = exits.figure() {
            span.against { (format::count(exits.value)) " exits" }
        }
    }
}
