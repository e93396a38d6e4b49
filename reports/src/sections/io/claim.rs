//! The claim that is put to the test: full virtualization with paravirtual drivers for I/O is often
//! the fastest.
//!
//! A pair is a mode of flavour hybrid and a mode of flavour unaware that runs on the same engine, or on
//! the translator: what differs is the devices, or the whole of full virtualization. Invariant: a
//! factor stands beside its interval, and is called a win only if the whole interval says so.

use maud::{Markup, html};
use reports_data::{Advantage, Decision, Metric, Role};

use crate::format::{self, plural};
use crate::table::{Tools, absent, head, number_head, table};
use crate::view::{Column, View, clearly_faster};
use crate::workloads::{Group, group};

/// Flavour with paravirtual drivers alone.
pub(super) const HYBRID: &str = "hybrid";
/// Flavour that knows nothing of its host.
pub(super) const UNAWARE: &str = "unaware";
/// The engine of full virtualization.
pub(super) const TRANSLATOR: &str = "bt";

/// A hybrid mode, and one that it is to beat.
type Pair<'v, 'a> = (&'v Column<'a>, &'v Column<'a>);

/// The answer in words, for the verdict.
pub(crate) fn answer(view: &View<'_>) -> Markup {
    let question = html! {
        b { "Is the hybrid mode often the fastest?" } " Full virtualization for privileged instructions \
        with paravirtual drivers for I/O is said to be. "
    };
    let hybrids: Vec<&Column<'_>> = hybrids(view)
        .filter(|column| view.raced().any(|w| view.warm(w, column.name).is_some()))
        .collect();
    if hybrids.is_empty() {
        return html! { p { (question) "Not measured in this run." } };
    }
    let pairs = pairs(view);
    html! {
        p {
            (question)
            @for (index, column) in hybrids.iter().enumerate() {
                @if index > 0 { " " }
                (standing(view, column))
            }
        }
        @if !pairs.is_empty() {
            ul.verdict {
                @for pair in &pairs { (sentence(view, pair)) }
            }
            p { "Factor and interval of each workload stand under " a href="#io" { "I/O" } "." }
        }
    }
}

/// Every workload and pair, as a table.
pub(super) fn content(view: &View<'_>) -> Markup {
    let pairs = pairs(view);
    let workloads: Vec<&str> = io(view).collect();
    if pairs.is_empty() {
        return super::nothing(
            "No mode with paravirtual devices was measured beside one with emulated devices.",
        );
    }
    let body = html! {
        tbody {
            @for workload in &workloads {
                tr {
                    th scope="row" { (workload) }
                    @for pair in &pairs { (cell(view, workload, pair)) }
                }
            }
        }
    };
    html! {
        (table(
            "hybrid-claim",
            "How many times as fast the mode with paravirtual devices is, with the 95 % interval of the \
             factor; decided where the whole interval lies on one side of 1. Timers: by how much later \
             the median interrupt comes in the other mode",
            Tools::Sort,
            html! {
                tr {
                    (head("Workload"))
                    @for (own, other) in &pairs {
                        (number_head(&format!("{} over {}", own.label, other.label)))
                    }
                }
            },
            body,
        ))
    }
}

/// Modes of flavour hybrid.
pub(super) fn hybrids<'v, 'a>(view: &'v View<'a>) -> impl Iterator<Item = &'v Column<'a>> {
    let modes = view.columns.iter();
    modes.filter(|column| column.role == Role::Mode && column.flavour == HYBRID)
}

fn pairs<'v, 'a>(view: &'v View<'a>) -> Vec<Pair<'v, 'a>> {
    let mut pairs = Vec::new();
    for own in hybrids(view) {
        for other in &view.columns {
            let rival = other.role == Role::Mode && other.flavour == UNAWARE;
            let related = other.engine == own.engine || other.engine == TRANSLATOR;
            let met =
                || io(view).any(|workload| advantage(view, workload, &(own, other)).is_some());
            if rival && related && met() {
                pairs.push((own, other));
            }
        }
    }
    pairs
}

fn io<'v>(view: &'v View<'_>) -> impl Iterator<Item = &'v str> {
    view.group(Group::Io).chain(view.group(Group::Timers))
}

/// A timer's time is mostly what it was armed with: what differs is how late it is.
fn metric(workload: &str) -> Metric {
    match group(workload) {
        Group::Timers => Metric::LATENCY_P50,
        Group::Compute
        | Group::Nano
        | Group::Micro
        | Group::Io
        | Group::Unlisted
        | Group::Empty => Metric::TIME,
    }
}

fn advantage(view: &View<'_>, workload: &str, (own, other): &Pair<'_, '_>) -> Option<Advantage> {
    view.advantage(workload, &metric(workload), own.name, other.name)
}

fn cell(view: &View<'_>, workload: &str, pair: &Pair<'_, '_>) -> Markup {
    let Some(advantage) = advantage(view, workload, pair) else {
        return absent_pair(view, workload, pair);
    };
    html! {
        td.num data-v=(advantage.factor) {
            (format::ratio(advantage.factor))
            span.spread {
                @match advantage.interval {
                    Some((low, high)) => (format::range(low, high)),
                    None => "no interval",
                }
            }
            @match advantage.decision() {
                Decision::Ahead => span.status.ok { "faster" },
                Decision::Behind => span.status.failed { "slower" },
                Decision::Undecided => span.status.absent { "not decided" },
            }
        }
    }
}

/// Why there is no factor: the first of the two that has no figure.
fn absent_pair(view: &View<'_>, workload: &str, (own, other): &Pair<'_, '_>) -> Markup {
    use crate::view::Cell;
    use reports_data::Phase;
    let missing = [own, other].into_iter().find_map(|column| {
        match view.time(workload, column.name, Phase::Warm) {
            Cell::Without(status, reason) => Some((column, status, reason)),
            Cell::Figure(_) | Cell::Absent => None,
        }
    });
    match missing {
        Some((column, status, reason)) => html! {
            td.num {
                (crate::table::status_word(status, reason))
                span.spread { "in " (column.label) }
            }
        },
        None => absent(),
    }
}

/// In how many I/O workloads a hybrid mode is the fastest of all modes.
fn standing(view: &View<'_>, column: &Column<'_>) -> Markup {
    let (mut fastest, mut behind, mut of) = (Vec::new(), 0, 0);
    for workload in view.group(Group::Io) {
        let Some(own) = view.warm(workload, column.name) else {
            continue;
        };
        let verdicts: Vec<Option<bool>> = view
            .guests()
            .filter(|c| c.role == Role::Mode && c.name != column.name)
            .filter_map(|c| view.warm(workload, c.name))
            .map(|other| clearly_faster(own, other))
            .collect();
        if verdicts.is_empty() {
            continue;
        }
        of += 1;
        if verdicts.iter().all(|verdict| *verdict == Some(true)) {
            fastest.push(workload.to_owned());
        } else if verdicts.contains(&Some(false)) {
            behind += 1;
        }
    }
    html! {
        (column.label) " is the fastest of all modes in " b { (fastest.len()) } " of " (of)
        " device workloads"
        @if !fastest.is_empty() { " (" (format::list(&fastest)) ")" }
        ", and some mode beats it in " (behind) "."
    }
}

fn sentence(view: &View<'_>, pair: &Pair<'_, '_>) -> Markup {
    let (own, other) = pair;
    let (mut ahead, mut behind, mut open, mut without) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for workload in io(view) {
        let Some(advantage) = advantage(view, workload, pair) else {
            without += 1;
            continue;
        };
        let factor = |factor: f64| match advantage.interval {
            Some((low, high)) => format!(
                "{workload} {} ({})",
                format::ratio(factor),
                format::range(low, high)
            ),
            None => format!("{workload} {}", format::ratio(factor)),
        };
        match advantage.decision() {
            Decision::Ahead => ahead.push(factor(advantage.factor)),
            Decision::Behind => behind.push(factor(advantage.factor)),
            Decision::Undecided => open.push(workload.to_owned()),
        }
    }
    let measured = ahead.len() + behind.len() + open.len();
    html! {
        li {
            b { (own.label) " against " (other.label) ": " }
            "faster in " b { (ahead.len()) } " of " (plural(measured, "I/O workload"))
            @if !ahead.is_empty() { ": " (format::list(&ahead)) }
            "; slower in " (behind.len())
            @if !behind.is_empty() { ": " (format::list(&behind)) }
            "; not decided in " (open.len())
            @if !open.is_empty() { ": " (format::list(&open)) }
            @if without > 0 { "; " (without) " without a figure on both sides" }
            "."
        }
    }
}
