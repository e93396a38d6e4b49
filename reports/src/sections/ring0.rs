//! Operations without a native figure: absolute times, held against one chosen column.

use maud::{Markup, html};
use reports_data::{NATIVE, Phase};

use super::nothing;
use crate::format;
use crate::table::{Tools, cell, column_heads, head, reasons, spread, table};
use crate::view::{Column, View};

pub(super) fn content(view: &View<'_>) -> Markup {
    let rows: Vec<&str> = view.without_native().collect();
    if rows.is_empty() {
        return nothing("Every workload of this run has a native figure.");
    }
    let reference = view.reference();
    let ratio = |workload: &str, column: &Column<'_>, value: f64| -> Option<f64> {
        let reference = reference.filter(|reference| reference.name != column.name)?;
        let base = view.warm(workload, reference.name)?.value;
        (base > 0.0 && value > 0.0).then(|| value / base)
    };
    let body = html! {
        tbody {
            @for workload in &rows {
                tr {
                    th scope="row" { (workload) }
                    @for column in view.guests() {
                        (cell(view.time(workload, column.name, Phase::Warm), |figure| html! {
                            (format::figure(figure.value)) " ns"
                            (spread(figure, format::range))
                            @if let Some(ratio) = ratio(workload, column, figure.value) {
                                span.against { (format::ratio(ratio)) }
                            }
                        }))
                    }
                }
            }
        }
    };
    let cells = rows.iter().flat_map(|workload| {
        let modes = view.columns.iter().filter(|column| column.name != NATIVE);
        modes.map(move |column| {
            (
                *workload,
                column.name,
                view.time(workload, column.name, Phase::Warm),
            )
        })
    });
    html! {
        p {
            "A privileged operation cannot run in an ordinary process, so it has no native figure; a \
            user-mode stand-in under the same name would be another measurement. Times are ns per \
            operation, with the 95 % interval below"
            @match reference {
                Some(reference) => {
                    "; the ratio in each cell is the time over that of " b { (reference.label) }
                    ", the first peer (or else mode) with figures here."
                },
                None => ".",
            }
            @if rows.iter().any(|workload| view.native_applies(workload)) {
                " Workloads that do run natively stand here too where this run has no native figure for them."
            }
        }
        (table(
            "ring0-table",
            "Time of one iteration without native figure, ns",
            Tools::Sort,
            html! { tr { (head("Operation")) (column_heads(view.guests())) } },
            body,
        ))
        (reasons(view, cells))
    }
}
