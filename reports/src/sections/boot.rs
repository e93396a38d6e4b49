//! Boot: start of the VMM's process to the guest's greeting.

use maud::{Markup, html};
use reports_data::{BOOT, Phase};

use super::nothing;
use crate::Result;
use crate::chart::{Dot, DotRow, dot_plot};
use crate::table::{Tools, cell, head, number_head, reasons, series, table, time};
use crate::view::{Cell, View};

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let boot = |mode: &str| view.time(BOOT, mode, Phase::Boot);
    if view
        .columns
        .iter()
        .all(|c| matches!(boot(c.name), Cell::Absent))
    {
        return Ok(nothing("Boot was not measured in this run."));
    }
    let columns: Vec<(&str, usize)> = view.columns.iter().map(|c| (c.label, series(c))).collect();
    let dots = view
        .columns
        .iter()
        .enumerate()
        .filter_map(|(place, column)| {
            let figure = boot(column.name).figure()?;
            Some(Dot { place, figure })
        })
        .collect();
    let row = DotRow {
        label: "boot",
        dots,
    };
    let plot = dot_plot("boot-plot", "Boot time, logarithmic", &columns, &[row], &[])?;
    let body = html! {
        tbody {
            @for column in &view.columns {
                tr {
                    th scope="row" {
                        span.swatch style={ "background:var(--s" (series(column)) ")" } {}
                        (column.label)
                    }
                    (cell(boot(column.name), time))
                    (cell(boot(column.name), |figure| html! { (figure.n) }))
                }
            }
        }
    };
    let cells = view.columns.iter().map(|c| (BOOT, c.name, boot(c.name)));
    Ok(html! {
        p {
            "From the start of the process to the guest's greeting on its console: loading, the VMM's \
            own start and the guest's way into long mode. For native it is the start of a process."
        }
        @if let Some(plot) = plot { (plot) }
        (table(
            "boot-table",
            "Boot time: median with its 95 % interval",
            Tools::Sort,
            html! { tr { (head("Mode")) (number_head("Boot")) (number_head("n")) } },
            body,
        ))
        (reasons(view, cells))
    })
}
