//! The paravirtual guest: its operations beside the floors of its host, and what it asked for.
//!
//! Invariant: a ratio comes from figures of one run, and counts of one column are shared out over
//! iterations and never added to another column's.

use maud::{Markup, html};
use reports_data::held_against::{self, COMPUTE, FLOORS, Standing, standings};
use reports_data::{FLOOR, Metric, Phase};

use super::nothing;
use super::tally::{Matrix, Tally, VMM, matrix, tallies};
use crate::format;
use crate::table::{Tools, cell, head, number_head, reasons, table, time};
use crate::view::{Cell, Column, Slowdowns, View};
use crate::workloads::Group;

/// How the reason of a hypercall's count begins; its name and its tier follow.
const HYPERCALL: &str = "hypercall ";
/// How the reason of an upcall's count begins; its cause follows.
const UPCALL: &str = "upcall ";
/// Tiers, each with what a call of it costs.
const TIERS: &[(&str, &str)] = &[
    ("T0", "stays in the guest kernel's process"),
    ("T1", "makes a host system call of its own"),
    ("T2", "switches between guest kernel and user process"),
    ("T3", "posts to the VMM or waits for its answer"),
];

pub(super) fn content(view: &View<'_>) -> Markup {
    let columns: Vec<&Column<'_>> = view
        .columns
        .iter()
        .filter(|column| column.engine == held_against::ENGINE)
        .collect();
    if columns.is_empty() {
        return nothing("No guest of this run knew its host.");
    }
    let counted: Vec<Tally<'_>> = tallies(view)
        .into_iter()
        .filter(|tally| tally.source == VMM && tally.phase == Phase::Warm)
        .collect();
    html! {
        p {
            "A guest that knows its host makes system calls of its host where another guest traps. Floors \
            are those calls alone, without a guest: what is above a floor is the engine's own work."
        }
        (floors(view))
        @for column in &columns { (against(view, column)) }
        @for column in &columns { (by_tier(view, &counted, column)) }
        @for column in &columns { (by_name(view, &counted, column)) }
    }
}

/// The floors themselves.
fn floors(view: &View<'_>) -> Markup {
    let measured = |name: &&(&str, &str)| !matches!(view.floor(name.0), Cell::Absent);
    if !FLOORS.iter().any(|floor| measured(&floor)) {
        return nothing("This run measured no floor.");
    }
    let body = html! {
        tbody {
            @for (name, about) in FLOORS {
                tr {
                    th scope="row" { (about) }
                    td { code { (name) } }
                    (cell(view.floor(name), time))
                    (cell(view.floor(name), |figure| html! { (figure.n) }))
                }
            }
        }
    };
    let cells = FLOORS
        .iter()
        .map(|(name, _)| (*name, FLOOR, view.floor(name)));
    html! {
        (table(
            "floors-table",
            "Floors: one operation of the host, measured in the same rounds: median, 95 % interval, samples",
            Tools::Sort,
            html! { tr { (head("Operation of the host")) (head("Name in the files")) (number_head("Time")) (number_head("n")) } },
            body,
        ))
        (reasons(view, cells))
    }
}

/// One column against its floors and its aims.
fn against(view: &View<'_>, column: &Column<'_>) -> Markup {
    let standings = standings(&view.run.summary, column.name);
    let compute = {
        let applies = view
            .group(Group::Compute)
            .filter(|w| view.native_applies(w));
        Slowdowns::new(view, column.name, applies)
    };
    if standings.is_empty() && compute.geomean.is_none() {
        return nothing("No operation has both a figure and a floor.");
    }
    let floor = |standing: &Standing| match (standing.aim.floor, standing.floor) {
        (Some(name), Some(value)) => {
            html! { td { (about(name)) } td.num { (format::time(value)) } }
        }
        _ => html! { td { span.note { "none" } } td.num { span.note { "none" } } },
    };
    let verdict = |met: bool| {
        html! { td { @if met { span.status.ok { "met" } } @else { span.status.failed { "missed" } } } }
    };
    let body = html! {
        tbody {
            @for standing in &standings {
                @let ratio = standing.floor.is_some();
                @let most = standing.aim.most;
                tr {
                    th scope="row" { (standing.aim.workload) }
                    td.num data-v=(standing.time) { (format::time(standing.time)) }
                    (floor(standing))
                    @if ratio { td.num { (format::ratio(standing.measure())) } } @else { td.num { span.note { "none" } } }
                    td.num { "at most " @if ratio { (format::ratio(most)) } @else { (format::time(most)) } }
                    (verdict(standing.is_met()))
                }
            }
            @if let Some(mean) = compute.geomean {
                tr {
                    th scope="row" { "compute, geomean of " (compute.sorted.len()) " of " (compute.of) }
                    td.num { span.note { "none" } }
                    td { "native" }
                    td.num { span.note { "none" } }
                    td.num { (format::ratio(mean)) }
                    td.num { "at most " (format::ratio(COMPUTE)) }
                    (verdict(mean <= COMPUTE))
                }
            }
        }
    };
    let place = view.columns.iter().position(|c| c.name == column.name);
    table(
        &format!("aims-{}", place.unwrap_or_default()),
        &format!(
            "{} against its floors: time of one operation over that of the host's, and what is aimed at",
            column.label
        ),
        Tools::Sort,
        html! {
            tr {
                (head("Operation")) (number_head("Time")) (head("Floor")) (number_head("Floor's time"))
                (number_head("Ratio")) (number_head("Aim")) (head("Aim is"))
            }
        },
        body,
    )
}

fn about(floor: &str) -> &str {
    let known = FLOORS.iter().find(|(name, _)| *name == floor);
    known.map_or(floor, |(_, about)| about)
}

/// Exits of one operation, hypercalls brought together by tier.
fn by_tier(view: &View<'_>, counted: &[Tally<'_>], column: &Column<'_>) -> Markup {
    let sum = |workload: &str, belongs: &dyn Fn(&str) -> bool| -> f64 {
        counted
            .iter()
            .filter(|t| t.workload == workload && t.mode == column.name && belongs(t.reason))
            .map(|tally| tally.mean)
            .sum()
    };
    let number = |value: f64| {
        html! {
            @if value == 0.0 { td.num.zero data-v="0" { "0" } }
            @else { td.num data-v=(value) { (format::count(value)) } }
        }
    };
    let workloads: Vec<&str> = view
        .compared()
        .filter(|workload| view.warm(workload, column.name).is_some())
        .collect();
    if workloads.is_empty() {
        return html! {};
    }
    let others = |reason: &str| !reason.starts_with(HYPERCALL) && !reason.starts_with(UPCALL);
    let body = html! {
        tbody {
            @for workload in &workloads {
                tr {
                    th scope="row" { (workload) }
                    (cell(view.cell(workload, column.name, Phase::Warm, &Metric::EXITS), |figure| html! {
                        (format::count(figure.value))
                    }))
                    @for (tier, _) in TIERS {
                        (number(sum(workload, &|reason| {
                            reason.starts_with(HYPERCALL) && reason.ends_with(tier)
                        })))
                    }
                    (number(sum(workload, &|reason| reason.starts_with(UPCALL))))
                    (number(sum(workload, &others)))
                }
            }
        }
    };
    let place = view.columns.iter().position(|c| c.name == column.name);
    html! {
        (table(
            &format!("tiers-{}", place.unwrap_or_default()),
            &format!("{}: exits of one iteration, warm, hypercalls by tier", column.label),
            Tools::Sort,
            html! {
                tr {
                    (head("Workload")) (number_head("All"))
                    @for (tier, _) in TIERS { (number_head(tier)) }
                    (number_head("Upcalls")) (number_head("Faults, shootdowns, doorbells"))
                }
            },
            body,
        ))
        ul.reasons {
            @for (tier, what) in TIERS { li { b { (tier) } " " (what) } }
            li {
                "A hypercall has the tier of its most expensive case; the calls of a multicall are counted \
                beside it. An upcall is the way from user process to guest kernel, an iret the way back."
            }
        }
    }
}

/// Every hypercall by name, and everything else by cause.
fn by_name(view: &View<'_>, counted: &[Tally<'_>], column: &Column<'_>) -> Markup {
    let (calls, others): (Vec<Tally<'_>>, Vec<Tally<'_>>) = counted
        .iter()
        .cloned()
        .partition(|tally| tally.reason.starts_with(HYPERCALL));
    let of = |what, prefix| Matrix {
        what,
        prefix,
        mode: column.name,
        source: VMM,
        phase: Phase::Warm,
    };
    html! {
        (matrix(view, &calls, &of("hypercall", HYPERCALL)))
        (matrix(view, &others, &of("upcall and fault", "")))
    }
}
