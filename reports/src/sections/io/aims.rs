//! What the project has set itself for paravirtual disks, and how this run stands to it.
//!
//! An aim is a bound on a median; the spread is shown beside it and decides nothing. Invariant: an aim
//! without both of its figures has no row.

use maud::{Markup, html};
use reports_data::{Metric, NATIVE, Phase, Role};

use super::claim::{HYBRID, TRANSLATOR, UNAWARE, hybrids};
use crate::format;
use crate::table::{Tools, head, number_head, table};
use crate::view::{Column, View};

/// Most exits of one request.
const EXITS: &[(&str, f64)] = &[
    ("blk_seqread", 1.1),
    ("blk_seqwrite", 1.1),
    ("blk_randread", 1.1),
    ("blk_randwrite", 1.1),
    ("blk_seqread32", 0.2),
    ("blk_seqwrite32", 0.2),
    ("blk_randread32", 0.2),
    ("blk_randwrite32", 0.2),
];

/// Where rates of disks are held against each other.
const RATE: &str = "blk_randread";
/// How many times the rate of the emulated disk of the same engine.
const OVER_EMULATED: f64 = 5.0;
/// How many times the rate of the peer's emulated disk.
const OVER_PEER: f64 = 1.5;
/// The peer that emulates a disk by translation.
const PEER: &str = "qemu-tcg";
/// Where a translated guest is held against the host's own loop over pread, and how many times its
/// time it may take.
const STREAM: (&str, f64) = ("blk_seqread", 1.5);

/// One aim.
struct Aim {
    what: String,
    figure: String,
    interval: Option<String>,
    aim: String,
    met: bool,
}

/// The table; nothing where no aim has its figures.
pub(super) fn content(view: &View<'_>) -> Markup {
    let mut aims: Vec<Aim> = Vec::new();
    for column in hybrids(view) {
        aims.extend(EXITS.iter().filter_map(|aim| exits(view, column, *aim)));
        let mut columns = view.columns.iter();
        let emulated = columns.find(|other| {
            other.role == Role::Mode && other.flavour == UNAWARE && other.engine == column.engine
        });
        aims.extend(emulated.and_then(|other| rate(view, column, other, OVER_EMULATED)));
        if column.engine == TRANSLATOR {
            aims.extend(against_native(view, column));
        }
    }
    let translated = |c: &&Column<'_>| c.engine == TRANSLATOR && c.flavour == UNAWARE;
    let peer = view.columns.iter().find(|column| column.name == PEER);
    if let (Some(own), Some(peer)) = (view.columns.iter().find(translated), peer) {
        aims.extend(rate(view, own, peer, OVER_PEER));
    }
    if aims.is_empty() {
        return html! {};
    }
    let body = html! {
        tbody {
            @for aim in &aims {
                tr {
                    th scope="row" { (aim.what) }
                    td.num { (aim.figure) @if let Some(interval) = &aim.interval { span.spread { (interval) } } }
                    td.num { (aim.aim) }
                    td { @if aim.met { span.status.ok { "met" } } @else { span.status.failed { "missed" } } }
                }
            }
        }
    };
    table(
        "io-aims",
        &format!(
            "Aims for {HYBRID} disks: medians of this run against bounds that the project has set itself"
        ),
        Tools::Sort,
        html! { tr { (head("What")) (number_head("Median")) (number_head("Aim")) (head("Aim is")) } },
        body,
    )
}

fn exits(view: &View<'_>, column: &Column<'_>, (workload, most): (&str, f64)) -> Option<Aim> {
    let cell = view.cell(workload, column.name, Phase::Warm, &Metric::EXITS);
    let figure = cell.figure()?;
    Some(Aim {
        what: format!("{}: exits of a request of {workload}", column.label),
        figure: format::count(figure.value),
        interval: figure.interval.map(|(low, high)| format::range(low, high)),
        aim: format!("at most {}", format::count(most)),
        met: figure.value <= most,
    })
}

/// The rate of one over that of the other.
fn rate(view: &View<'_>, own: &Column<'_>, other: &Column<'_>, least: f64) -> Option<Aim> {
    let advantage = view.advantage(RATE, &Metric::TIME, own.name, other.name)?;
    Some(Aim {
        what: format!("{}: rate of {RATE} over {}'s", own.label, other.label),
        figure: format::ratio(advantage.factor),
        interval: advantage
            .interval
            .map(|(low, high)| format::range(low, high)),
        aim: format!("at least {}", format::ratio(least)),
        met: advantage.factor >= least,
    })
}

fn against_native(view: &View<'_>, column: &Column<'_>) -> Option<Aim> {
    let (workload, most) = STREAM;
    // The native process is the faster one: its advantage is the guest's slowdown.
    let slowdown = view.advantage(workload, &Metric::TIME, NATIVE, column.name)?;
    Some(Aim {
        what: format!("{}: time of {workload} over native's", column.label),
        figure: format::ratio(slowdown.factor),
        interval: slowdown
            .interval
            .map(|(low, high)| format::range(low, high)),
        aim: format!("at most {}", format::ratio(most)),
        met: slowdown.factor <= most,
    })
}
