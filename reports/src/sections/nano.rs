//! Nano operations as a dot plot, with its table.

use maud::{Markup, html};
use reports_data::Phase;
use reports_data::held_against::FLOORS;

use super::nothing;
use crate::Result;
use crate::chart::{Dot, DotRow, Reference, dot_plot};
use crate::format;
use crate::table::{Tools, cell, column_heads, head, reasons, series, table};
use crate::view::View;
use crate::workloads::Group;

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let operations: Vec<&str> = view.group(Group::Nano).collect();
    if operations.is_empty() {
        return Ok(nothing("No privileged operation was measured in this run."));
    }
    let columns: Vec<(&str, usize)> = view.columns.iter().map(|c| (c.label, series(c))).collect();
    let rows: Vec<DotRow<'_>> = operations
        .iter()
        .map(|workload| DotRow {
            label: workload,
            dots: view
                .columns
                .iter()
                .enumerate()
                .filter_map(|(place, column)| {
                    let figure = view.warm(workload, column.name)?;
                    Some(Dot { place, figure })
                })
                .collect(),
        })
        .collect();
    let title = "Time of one privileged operation, logarithmic";
    let mut references: Vec<Reference<'_>> = FLOORS
        .iter()
        .filter_map(|(name, about)| {
            let value = view.floor(name).figure()?.value;
            (value > 0.0).then_some(Reference {
                label: about,
                value,
            })
        })
        .collect();
    references.sort_by(|a, b| a.value.total_cmp(&b.value));
    let plot = dot_plot("nano-plot", title, &columns, &rows, &references)?;
    let body = html! {
        tbody {
            @for workload in &operations {
                tr {
                    th scope="row" { (workload) }
                    @for column in &view.columns {
                        (cell(view.time(workload, column.name, Phase::Warm), |figure| html! {
                            (format::time(figure.value))
                            span.spread {
                                @if let Some((low, high)) = figure.interval {
                                    (format::time_range(low, high)) " · "
                                }
                                "n " (figure.n)
                            }
                        }))
                    }
                }
            }
        }
    };
    let cells = operations.iter().flat_map(|workload| {
        let columns = view.columns.iter();
        columns.map(|c| (*workload, c.name, view.time(workload, c.name, Phase::Warm)))
    });
    Ok(html! {
        p {
            "Markers are medians, whiskers 95 % bootstrap intervals. The axis is logarithmic: equal \
            distances are equal factors. A whisker that is not seen lies within its marker. Operations \
            without a marker have no figure; the reasons stand below the table."
            @if !references.is_empty() {
                " Dashed lines are operations of this host without any guest, measured in the same \
                rounds: see " a href="#para" { "floors" } "."
            }
        }
        @match plot {
            Some(plot) => (plot),
            None => (nothing("No operation has a figure, so there is nothing to plot.")),
        }
        (table(
            "nano-table",
            "Time of one privileged operation: median, 95 % interval, samples",
            Tools::Sort,
            html! { tr { (head("Operation")) (column_heads(view.columns.iter())) } },
            body,
        ))
        (reasons(view, cells))
    })
}
