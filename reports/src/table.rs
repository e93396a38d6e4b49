//! Tables: every one has a caption, scoped heads, a region that scrolls on a narrow screen, and
//! cells that show a figure with its spread or the status as a word.

use maud::{Markup, html};
use reports_data::{Role, Status};

use crate::format;
use crate::view::{Cell, Column, Figure, View};

/// What the script may add to a table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tools {
    /// Sorting by column.
    Sort,
    /// Sorting, and a field that filters rows.
    SortAndFilter,
}

/// Wraps head and bodies into a table with a caption, inside a scrolling region.
pub(crate) fn table(id: &str, caption: &str, tools: Tools, head: Markup, bodies: Markup) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-labelledby={ (id) "-caption" } {
            table #(id) data-sort="" data-filter[tools == Tools::SortAndFilter] {
                caption #{ (id) "-caption" } { (caption) }
                thead { (head) }
                (bodies)
            }
        }
    }
}

/// A column head.
pub(crate) fn head(text: &str) -> Markup {
    html! { th scope="col" { (text) } }
}

/// A column head over figures.
pub(crate) fn number_head(text: &str) -> Markup {
    html! { th.num scope="col" { (text) } }
}

/// Heads of the given columns, each with its marker's colour.
pub(crate) fn column_heads<'c, 'a: 'c>(columns: impl Iterator<Item = &'c Column<'a>>) -> Markup {
    html! {
        @for column in columns {
            th.num scope="col" {
                span.swatch style={ "background:var(--s" (series(column)) ")" } {}
                (column.label)
            }
        }
    }
}

/// Index of a column's colour; columns beyond the palette share colours, never the marker's label.
pub(crate) fn series(column: &Column<'_>) -> usize {
    match column.role {
        Role::Baseline => 0,
        Role::Mode | Role::Peer | Role::Floor => {
            1 + (column.series - 1) % (crate::palette::SERIES.len() - 1)
        }
    }
}

/// The word of a status as a cell's content; the reason is its title.
pub(crate) fn status_word(status: Status, reason: &str) -> Markup {
    html! {
        span class={ "status " (status.as_str()) } title=[(!reason.is_empty()).then_some(reason)] {
            (status.as_str())
        }
    }
}

/// What stands where a run has no row.
pub(crate) fn absent() -> Markup {
    html! { td.num { span.status.absent title="this run has no such row" { "not run" } } }
}

/// A cell with a figure and its spread, or the status.
pub(crate) fn cell(cell: Cell<'_>, show: impl Fn(Figure) -> Markup) -> Markup {
    match cell {
        Cell::Figure(figure) => html! { td.num data-v=(figure.value) { (show(figure)) } },
        Cell::Without(status, reason) => html! { td.num { (status_word(status, reason)) } },
        Cell::Absent => absent(),
    }
}

/// A time with its interval below.
pub(crate) fn time(figure: Figure) -> Markup {
    html! {
        (format::time(figure.value))
        (spread(figure, format::time_range))
    }
}

/// The spread of a figure: its interval, or how few samples there are.
pub(crate) fn spread(figure: Figure, range: impl Fn(f64, f64) -> String) -> Markup {
    html! {
        span.spread {
            @match figure.interval {
                Some((low, high)) => (range(low, high)),
                None => { "n = " (figure.n) },
            }
        }
    }
}

/// Every cell without a figure, as a list with its reason: what a title shows to a mouse alone.
pub(crate) fn reasons<'c>(
    view: &View<'_>,
    cells: impl Iterator<Item = (&'c str, &'c str, Cell<'c>)>,
) -> Markup {
    // One line per status and reason, workloads brought together: twenty rows often share one.
    let mut lines: Vec<(&str, Status, &str, Vec<&str>)> = Vec::new();
    for (workload, mode, cell) in cells {
        let Cell::Without(status, reason) = cell else {
            continue;
        };
        match lines
            .iter_mut()
            .find(|line| line.0 == mode && line.1 == status && line.2 == reason)
        {
            Some(line) => line.3.push(workload),
            None => lines.push((mode, status, reason, vec![workload])),
        }
    }
    html! {
        @if !lines.is_empty() {
            ul.reasons {
                @for (mode, status, reason, workloads) in &lines {
                    li {
                        b { (view.run.manifest.label(mode)) } " · " (workloads.join(", ")) ": "
                        (status_word(*status, "")) ", " (reason)
                    }
                }
            }
        }
    }
}
