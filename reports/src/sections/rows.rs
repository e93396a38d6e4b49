//! Every row of the summary, with status and reason; nothing is left out.

use maud::{Markup, html};
use reports_data::{Role, SummaryRow, Unit};

use super::nothing;
use crate::format;
use crate::table::{Tools, head, number_head, status_word, table};
use crate::view::View;
use crate::workloads;

pub(super) fn content(view: &View<'_>) -> Markup {
    let manifest = &view.run.manifest;
    let missing: Vec<String> = manifest
        .modes
        .iter()
        .filter(|info| match info.role {
            Role::Baseline | Role::Mode | Role::Peer => {
                view.columns.iter().all(|c| c.name != info.name)
            }
            Role::Floor => view.run.summary.rows.iter().all(|r| r.mode != info.name),
        })
        .map(|info| info.label.clone())
        .collect();
    let lacking = html! {
        @if !missing.is_empty() {
            p.caution { "Asked for, but without any row in this run: " (format::list(&missing)) "." }
        }
    };
    let mut rows: Vec<&SummaryRow> = view.run.summary.rows.iter().collect();
    if rows.is_empty() {
        return html! { (lacking) (nothing("This run has no row.")) };
    }
    let mut order: Vec<&str> = rows.iter().map(|row| row.workload.as_str()).collect();
    workloads::sort(&mut order);
    let place = |row: &SummaryRow| {
        let column = view.columns.iter().position(|c| c.name == row.mode);
        (
            order.iter().position(|w| *w == row.workload),
            column,
            row.phase,
        )
    };
    // What went wrong first.
    rows.sort_by_cached_key(|row| (row.status.is_ok(), place(row)));
    let head = html! {
        tr {
            (head("Workload")) (head("Mode")) (head("Phase")) (head("Metric")) (number_head("Median"))
            (number_head("95 % interval")) (number_head("n")) (head("Status")) (head("Reason"))
        }
    };
    let body = html! {
        tbody {
            @for row in &rows {
                tr {
                    th scope="row" { (row.workload) }
                    td { (manifest.label(&row.mode)) }
                    td { (row.phase) }
                    td { (row.metric) }
                    @match row.value.filter(|_| row.status.is_ok()) {
                        Some(value) => td.num data-v=(value) { (in_unit(value, row.unit)) },
                        None => td.num { span.note { "none" } },
                    }
                    @match row.ci_low.zip(row.ci_high).filter(|_| row.status.is_ok()) {
                        Some((low, high)) => td.num data-v=(high - low) { (range(low, high, row.unit)) },
                        None => td.num { span.note { "none" } },
                    }
                    td.num { (row.n) }
                    td { (status_word(row.status, &row.reason)) }
                    td.reason { (row.reason) }
                }
            }
        }
    };
    html! {
        (lacking)
        (table("rows-table", "All rows, those without a figure first", Tools::SortAndFilter, head, body))
    }
}

fn in_unit(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Ns => format::time(value),
        Unit::Ratio => format::ratio(value),
        Unit::Count => format::count(value),
        Unit::Cycles | Unit::Exits | Unit::Mib => format!("{}\u{a0}{unit}", format::count(value)),
    }
}

fn range(low: f64, high: f64, unit: Unit) -> String {
    match unit {
        Unit::Ns => format::time_range(low, high),
        Unit::Ratio | Unit::Count | Unit::Cycles | Unit::Exits | Unit::Mib => {
            format::range(low, high)
        }
    }
}
