//! Cold against warm, and how many iterations it takes until translation pays.
//!
//! The cost of warming up is (cold time - warm time) x iterations of the cold window, and 0 where
//! the two intervals overlap: a difference within the noise is no cost. Against another column, the break-even n solves
//! `warmup(a) + n * warm(a) = warmup(b) + n * warm(b)`.

use maud::{Markup, html};
use reports_data::{Metric, Phase};

use super::nothing;
use super::tally::TRANSLATOR;
use crate::format;
use crate::table::{Tools, cell, column_heads, head, number_head, reasons, spread, table};
use crate::view::{Cell, Column, Figure, View, clearly_faster};

pub(super) fn content(view: &View<'_>) -> Markup {
    let workloads: Vec<&str> = view
        .compared()
        .filter(|workload| {
            let mut columns = view.columns.iter();
            columns.any(|c| view.time(workload, c.name, Phase::Cold).figure().is_some())
        })
        .collect();
    if workloads.is_empty() {
        return nothing("No cold run was measured in this run.");
    }
    let body = html! {
        tbody {
            @for workload in &workloads {
                tr {
                    th scope="row" { (workload) }
                    @for column in &view.columns {
                        (cell(cold_or_reason(view, workload, column.name), |cold| {
                            both(cold, view.warm(workload, column.name), warmup(view, workload, column.name))
                        }))
                    }
                }
            }
        }
    };
    let cells = workloads.iter().flat_map(|workload| {
        let columns = view.columns.iter();
        columns.map(|c| (*workload, c.name, cold_or_reason(view, workload, c.name)))
    });
    html! {
        p {
            "Cold is the first window of a workload in a fresh guest, per iteration: translation, first \
            touch of memory and cold caches included. The cost of warming up is what the cold window \
            took beyond as many warm iterations."
        }
        (table(
            "cold-table",
            "Cold time of one iteration with its 95 % interval, cold over warm, and the cost of warming up",
            Tools::Sort,
            html! { tr { (head("Workload")) (column_heads(view.columns.iter())) } },
            body,
        ))
        (reasons(view, cells))
        (break_even(view, &workloads))
    }
}

/// The cold cell; where there is none, the reason why the pair has no figure at all stands in the
/// warm one.
fn cold_or_reason<'a>(view: &View<'a>, workload: &str, mode: &str) -> Cell<'a> {
    match view.time(workload, mode, Phase::Cold) {
        Cell::Absent => match view.time(workload, mode, Phase::Warm) {
            without @ Cell::Without(..) => without,
            Cell::Figure(_) | Cell::Absent => Cell::Absent,
        },
        cell => cell,
    }
}

fn both(cold: Figure, warm: Option<Figure>, warmup: Option<f64>) -> Markup {
    html! {
        (format::time(cold.value))
        (spread(cold, format::time_range))
        @if let Some(warm) = warm.filter(|warm| warm.value > 0.0) {
            span.against { (format::ratio(cold.value / warm.value)) " warm" }
        }
        @if let Some(warmup) = warmup {
            span.spread {
                @if warmup > 0.0 { "warm-up " (format::time(warmup)) } @else { "warm-up within noise" }
            }
        }
    }
}

/// Cost of warming up, in ns. `None` without a cold figure, a warm one and the iterations.
fn warmup(view: &View<'_>, workload: &str, mode: &str) -> Option<f64> {
    let cold = view.time(workload, mode, Phase::Cold).figure()?;
    let warm = view.warm(workload, mode)?;
    let iterations = view.cell(workload, mode, Phase::Cold, &Metric::ITERATIONS);
    let iterations = iterations.figure()?.value;
    Some(match clearly_faster(warm, cold) {
        Some(true) => (cold.value - warm.value) * iterations,
        Some(false) | None => 0.0,
    })
}

/// What comes of holding a translating column against another one.
#[derive(Debug, PartialEq)]
enum BreakEven {
    /// From the first iteration on.
    AtOnce,
    /// After so many iterations.
    After(f64),
    /// Slower when warm, so never; behind from the first iteration.
    Never,
    /// No difference when warm beyond the intervals.
    Level,
    /// Slower when warm, but cheaper to start: ahead for so many iterations.
    Until(f64),
}

fn solve(own: (f64, f64), other: (f64, f64)) -> BreakEven {
    let (own_warmup, own_warm) = own;
    let (other_warmup, other_warm) = other;
    let debt = own_warmup - other_warmup;
    let gain = other_warm - own_warm;
    match (debt > 0.0, gain > 0.0) {
        (false, true) => BreakEven::AtOnce,
        (true, true) => BreakEven::After((debt / gain).ceil()),
        (true, false) => BreakEven::Never,
        (false, false) if debt == 0.0 || gain == 0.0 => BreakEven::Never,
        (false, false) => BreakEven::Until((debt / gain).floor()),
    }
}

fn break_even(view: &View<'_>, workloads: &[&str]) -> Markup {
    let counts = |column: &Column<'_>| {
        let mut rows = view.run.exits.iter();
        column.engine == "bt" || rows.any(|row| row.mode == column.name && row.source == TRANSLATOR)
    };
    let translating: Vec<&Column<'_>> = view.guests().filter(|c| counts(c)).collect();
    let mut rows = Vec::new();
    for own in &translating {
        for other in view.guests().filter(|c| !counts(c)) {
            for workload in workloads {
                let figures = |column: &Column<'_>| {
                    let warm = view.warm(workload, column.name)?;
                    Some((warmup(view, workload, column.name)?, warm))
                };
                if let (Some(a), Some(b)) = (figures(own), figures(other)) {
                    // Overlapping intervals are no difference to build a break-even on.
                    let result = match clearly_faster(a.1, b.1) {
                        Some(_) => solve((a.0, a.1.value), (b.0, b.1.value)),
                        None => BreakEven::Level,
                    };
                    rows.push((*workload, own.label, other.label, result));
                }
            }
        }
    }
    if rows.is_empty() {
        return nothing(
            "Break-even: no workload has cold and warm figures, with their iterations, in both a \
             translating column and another one.",
        );
    }
    let head = html! {
        tr { (head("Workload")) (head("Translated by")) (head("against")) (number_head("Break-even, iterations")) (head("In words")) }
    };
    let body = html! {
        tbody {
            @for (workload, own, other, result) in &rows {
                tr {
                    th scope="row" { (workload) }
                    td { (own) }
                    td { (other) }
                    @match result {
                        BreakEven::AtOnce => { td.num data-v="0" { "0" } td { "ahead from the first iteration" } },
                        BreakEven::After(n) => {
                            td.num data-v=(n) { (format::count(*n)) } td { "pays after that many" }
                        },
                        BreakEven::Never => { td.num { "none" } td { "never pays: slower when warm" } },
                        BreakEven::Level => { td.num { "none" } td { "no difference when warm beyond the intervals" } },
                        BreakEven::Until(n) => {
                            td.num { "none" } td { "ahead for the first " (format::count(*n)) " only" }
                        },
                    }
                }
            }
        }
    };
    table(
        "break-even",
        "Break-even: from how many iterations on translation pays, from the medians",
        Tools::SortAndFilter,
        head,
        body,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn break_even_weighs_warm_up_against_speed() {
        for (own, other, expected) in [
            ((1000.0, 10.0), (0.0, 20.0), BreakEven::After(100.0)),
            ((1001.0, 10.0), (0.0, 20.0), BreakEven::After(101.0)),
            ((0.0, 10.0), (0.0, 20.0), BreakEven::AtOnce),
            ((1000.0, 20.0), (0.0, 10.0), BreakEven::Never),
            ((0.0, 10.0), (0.0, 10.0), BreakEven::Never),
            ((0.0, 20.0), (1000.0, 10.0), BreakEven::Until(100.0)),
        ] {
            assert_eq!(solve(own, other), expected, "{own:?} against {other:?}");
        }
    }
}
