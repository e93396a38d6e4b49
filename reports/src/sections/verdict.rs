//! The verdict: which mode wins what, and by how much, in words with numbers.
//!
//! Every mean says over how many workloads; a win is counted only where the intervals do not
//! overlap; nothing is said of rows that are not `ok` but how many there are.

use maud::{Markup, html};
use reports_data::{Role, Status};

use super::io::claim;
use super::nothing;
use crate::format::{self, plural};
use crate::table::{self, Tools, head, number_head, table};
use crate::view::{Column, Duel, Slowdowns, View, clearly_faster};
use crate::workloads::Group;

/// Timers are not here: see [`View::raced`].
const GROUPS: &[Group] = &[
    Group::Compute,
    Group::Nano,
    Group::Micro,
    Group::Io,
    Group::Unlisted,
];

pub(super) fn content(view: &View<'_>) -> Markup {
    let measured = view.compared().any(|workload| {
        let mut columns = view.columns.iter();
        columns.any(|column| view.warm(workload, column.name).is_some())
    });
    if !measured {
        return html! {
            p.lead { "No verdict: this run has no warm figure with status ok." }
            p { (state_of_rows(view)) }
        };
    }
    let groups: Vec<(Group, Vec<Markup>)> = GROUPS
        .iter()
        .map(|group| (*group, statements(view, *group)))
        .filter(|(_, statements)| !statements.is_empty())
        .collect();
    html! {
        @if groups.is_empty() {
            p.lead { "Fewer than two columns have figures in common, so there is nothing to compare." }
        }
        @for (group, statements) in &groups {
            h3 { (group.title()) }
            ul.verdict { @for statement in statements { li { (statement) } } }
        }
        (claim::answer(view))
        p { (state_of_rows(view)) }
        (glance(view))
        (duels(view))
    }
}

/// The sentences of a group: the slowdowns, then at most one per pair.
///
/// With up to three modes every pair is worth a sentence; beyond that each mode is held against
/// the group's leader, and the table of pairs has the rest.
fn statements(view: &View<'_>, group: Group) -> Vec<Markup> {
    let modes: Vec<&Column<'_>> = view.guests().filter(|c| c.role == Role::Mode).collect();
    let peers: Vec<&Column<'_>> = view.guests().filter(|c| c.role == Role::Peer).collect();
    let mut statements: Vec<Markup> = against_native(view, group).into_iter().collect();
    let leader = modes
        .iter()
        .map(|mode| mode.name)
        .max_by_key(|mode| (fastest(view, mode, group), std::cmp::Reverse(*mode)));
    let leads = |column: &Column<'_>| leader == Some(column.name);
    for (index, a) in modes.iter().enumerate() {
        for b in &modes[index + 1..] {
            if modes.len() <= 3 || leads(a) || leads(b) {
                statements.extend(pair(view, a, b, group));
            }
        }
    }
    for peer in &peers {
        for mode in &modes {
            if modes.len() <= 2 || leads(mode) {
                statements.extend(pair(view, mode, peer, group));
            }
        }
    }
    statements
}

/// In how many workloads of the group a mode is faster than every other mode, beyond the intervals.
fn fastest(view: &View<'_>, mode: &str, group: Group) -> usize {
    let wins = |workload: &&str| {
        let Some(own) = view.warm(workload, mode) else {
            return false;
        };
        let others = view
            .guests()
            .filter(|c| c.role == Role::Mode && c.name != mode);
        let mut figures = others
            .filter_map(|c| view.warm(workload, c.name))
            .peekable();
        figures.peek().is_some() && figures.all(|other| clearly_faster(own, other) == Some(true))
    };
    view.group(group).filter(wins).count()
}

fn against_native(view: &View<'_>, group: Group) -> Option<Markup> {
    let mut ranked: Vec<(&Column<'_>, Slowdowns<'_>, f64)> = view
        .guests()
        .filter_map(|column| {
            let applies = view.group(group).filter(|w| view.native_applies(w));
            let slowdowns = Slowdowns::new(view, column.name, applies);
            let mean = slowdowns.geomean?;
            Some((column, slowdowns, mean))
        })
        .collect();
    ranked.sort_by(|a, b| a.2.total_cmp(&b.2));
    if ranked.is_empty() {
        let expected = view.group(group).any(|w| view.native_applies(w));
        return expected.then(|| {
            html! {
                b { "Against native: " } "nothing to say, because no workload of this group has a \
                figure both in native and elsewhere."
            }
        });
    }
    Some(html! {
        b { "Against native: " }
        @for (index, (column, slowdowns, mean)) in ranked.iter().enumerate() {
            @if index > 0 { "; " }
            (column.label) " takes " b { (format::ratio(*mean)) } " the time (geomean of "
            (slowdowns.sorted.len()) " of " (slowdowns.of)
            @if let (Some(best), Some(worst)) = (slowdowns.sorted.first(), slowdowns.sorted.last()) {
                @if slowdowns.sorted.len() > 1 {
                    ", from " (best.0) " " (format::ratio(best.1)) " to " (worst.0) " " (format::ratio(worst.1))
                }
            }
            ")"
        }
        "."
    })
}

fn pair(view: &View<'_>, a: &Column<'_>, b: &Column<'_>, group: Group) -> Option<Markup> {
    let duel = Duel::new(view, a.name, b.name, view.group(group));
    let ratio = duel.ratio?;
    // The faster one is the subject.
    let (subject, object, factor, ahead, behind) = if ratio <= 1.0 {
        (a, b, 1.0 / ratio, duel.wins, duel.losses)
    } else {
        (b, a, ratio, duel.losses, duel.wins)
    };
    let over = html! { " (geomean of " (duel.shared) " of " (duel.of) ")" };
    if duel.wins == 0 && duel.losses == 0 {
        return Some(html! {
            "Between " (subject.label) " and " (object.label) " there is no difference beyond the intervals in any \
            workload: " b { (format::ratio(factor)) } (over) "."
        });
    }
    if factor < 1.005 {
        return Some(html! {
            (subject.label) " and " (object.label) " are level on the whole" (over) ", with "
            (subject.label) " ahead in " (ahead) ", behind in " (behind) ", undecided in "
            (duel.undecided()) "."
        });
    }
    Some(html! {
        (subject.label) " is " b { (times(factor)) } " as fast as "
        (object.label) (over) ", ahead in " (ahead)
        @if behind > 0 { ", behind in " (behind) }
        @if duel.undecided() > 0 { ", undecided in " (duel.undecided()) }
        "."
    })
}

fn times(factor: f64) -> String {
    format!("{} times", format::figure(factor))
}

fn state_of_rows(view: &View<'_>) -> Markup {
    let rows = &view.run.summary.rows;
    let counts: Vec<String> = Status::ALL
        .iter()
        .filter(|status| !status.is_ok())
        .filter_map(|status| {
            let count = rows.iter().filter(|row| row.status == *status).count();
            (count > 0).then(|| format!("{count} {status}"))
        })
        .collect();
    let ok = rows.iter().filter(|row| row.status.is_ok()).count();
    let silent: Vec<String> = view
        .columns
        .iter()
        .filter(|c| view.compared().all(|w| view.warm(w, c.name).is_none()))
        .map(|column| column.label.to_owned())
        .collect();
    html! {
        @if !silent.is_empty() {
            b { "Without any warm figure: " } (silent.join("; ")) ". "
        }
        (ok) " of " (plural(rows.len(), "row")) " " @if rows.len() == 1 { "is" } @else { "are" } " ok"
        @if !counts.is_empty() {
            "; the others, " (format::list(&counts)) ", have no figure and take no part in any mean: "
            a href="#rows" { "reasons" }
        }
        "."
    }
}

fn glance(view: &View<'_>) -> Markup {
    let compute = || view.group(Group::Compute);
    let reference = view.reference();
    let ring0 = || view.without_native();
    let head = html! {
        tr {
            (head("Mode"))
            (number_head("Compute, slowdown"))
            @if let Some(reference) = reference {
                (number_head(&format!("Without native, time against {}", reference.label)))
            }
            (number_head("Fastest mode in"))
            (number_head("Rows ok"))
        }
    };
    let mean = |mean: Option<f64>, shared: usize, of: usize| {
        html! {
            @match mean {
                Some(mean) => td.num data-v=(mean) {
                    (format::ratio(mean)) span.spread { "geomean of " (shared) " of " (of) }
                },
                None => td.num { span.status.absent { "none" } span.spread { "0 of " (of) } },
            }
        }
    };
    let row = |column: &Column<'_>| {
        let slowdowns = Slowdowns::new(view, column.name, compute());
        let wins: usize = GROUPS
            .iter()
            .map(|group| fastest(view, column.name, *group))
            .sum();
        let rows = || {
            view.run
                .summary
                .rows
                .iter()
                .filter(|row| row.mode == column.name)
        };
        let ok = rows().filter(|row| row.status.is_ok()).count();
        html! {
            tr {
                th scope="row" {
                    span.swatch style={ "background:var(--s" (table::series(column)) ")" } {}
                    (column.label)
                }
                (mean(slowdowns.geomean, slowdowns.sorted.len(), slowdowns.of))
                @if let Some(reference) = reference {
                    @let duel = Duel::new(view, column.name, reference.name, ring0());
                    (mean(duel.ratio, duel.shared, duel.of))
                }
                @if column.role == Role::Mode {
                    td.num data-v=(wins) { (wins) " of " (view.raced().count()) }
                } @else {
                    td.num { span.note { "not a mode" } }
                }
                td.num data-v=(ok) { (ok) " of " (rows().count()) }
            }
        }
    };
    table(
        "glance",
        "At a glance: smaller is faster; “fastest mode” counts workloads where the mode's interval \
         lies below that of every other mode",
        Tools::Sort,
        head,
        html! { tbody { @for column in view.guests() { (row(column)) } } },
    )
}

fn duels(view: &View<'_>) -> Markup {
    let columns: Vec<&Column<'_>> = view.guests().collect();
    let mut rows = Vec::new();
    for (index, a) in columns.iter().enumerate() {
        for b in &columns[index + 1..] {
            // Peers are there to hold modes against, not each other.
            if a.role == Role::Peer && b.role == Role::Peer {
                continue;
            }
            for &group in GROUPS {
                let duel = Duel::new(view, a.name, b.name, view.group(group));
                if let Some(ratio) = duel.ratio {
                    rows.push((a.label, b.label, group, ratio, duel));
                }
            }
        }
    }
    if rows.is_empty() {
        return nothing("No two columns share a figure.");
    }
    let head = html! {
        tr {
            (head("Mode")) (head("against")) (head("Workloads")) (number_head("Time ratio"))
            (number_head("Geomean of")) (number_head("Ahead")) (number_head("Behind"))
            (number_head("Undecided"))
        }
    };
    let body = html! {
        tbody {
            @for (a, b, group, ratio, duel) in &rows {
                tr {
                    th scope="row" { (a) }
                    td { (b) }
                    td { (group.title()) }
                    td.num data-v=(ratio) { (format::ratio(*ratio)) }
                    td.num { (duel.shared) " of " (duel.of) }
                    td.num { (duel.wins) }
                    td.num { (duel.losses) }
                    td.num { (duel.undecided()) }
                }
            }
        }
    };
    // A handful of rows is found by eye; a long table would push the rest of the page away.
    let long = rows.len() > 12;
    let table = table(
        "duels",
        "Head to head, warm time: a ratio below 1 means that the first one is faster; undecided \
         where the intervals overlap",
        if long {
            Tools::SortAndFilter
        } else {
            Tools::Sort
        },
        head,
        body,
    );
    html! {
        @if long {
            details { summary { "Every pair, head to head: " (plural(rows.len(), "row")) } (table) }
        } @else {
            (table)
        }
    }
}
