//! The heat map: slowdown against native, as a real table.

use maud::{Markup, html};
use reports_data::{Metric, NATIVE, Phase};

use super::nothing;
use crate::format;
use crate::palette::{HEAT, heat_step};
use crate::table::{
    Tools, absent, column_heads, head, number_head, reasons, spread, status_word, table, time,
};
use crate::view::{Cell, Slowdowns, View};
use crate::workloads::Group;

const GROUPS: &[Group] = &[
    Group::Compute,
    Group::Nano,
    Group::Micro,
    Group::Io,
    Group::Unlisted,
];

pub(super) fn content(view: &View<'_>) -> Markup {
    let rows = || view.compared().filter(|workload| view.has_native(workload));
    if rows().next().is_none() {
        return html! {
            (nothing("This run has no native figure, so there is no slowdown to give."))
            (native_reasons(view))
        };
    }
    let head = html! {
        tr { (head("Workload")) (number_head("Native")) (column_heads(view.guests())) }
    };
    let bodies = html! {
        @for &group in GROUPS {
            @let members: Vec<&str> = view.group(group).filter(|w| view.has_native(w)).collect();
            @if !members.is_empty() {
                tbody {
                    tr.group { th scope="colgroup" colspan=(view.guests().count() + 2) { (group.title()) } }
                    @for workload in &members {
                        tr {
                            th scope="row" { (workload) }
                            (crate::table::cell(view.time(workload, NATIVE, Phase::Warm), time))
                            @for column in view.guests() { (heat(view, workload, column.name)) }
                        }
                    }
                    (mean(view, group))
                }
            }
        }
    };
    let cells = rows().flat_map(|workload| {
        view.guests().map(move |column| {
            let cell = view.cell(workload, column.name, Phase::Warm, &Metric::SLOWDOWN);
            (workload, column.name, cell)
        })
    });
    html! {
        p {
            "Median warm time of one iteration over native's, with the 95 % bootstrap interval below. \
            1× is native speed; a stronger colour is slower. Both run the same object code on the same processor."
        }
        (table("heat", "Slowdown against native, warm", Tools::Sort, head, bodies))
        ul.legend aria-label="Colours of the table" {
            @for (index, step) in HEAT.iter().enumerate() { li class={ "h" (index) } { (step.label) } }
        }
        (reasons(view, cells))
        (native_reasons(view))
    }
}

fn heat(view: &View<'_>, workload: &str, mode: &str) -> Markup {
    match view.cell(workload, mode, Phase::Warm, &Metric::SLOWDOWN) {
        Cell::Figure(figure) => html! {
            td class={ "num heat h" (heat_step(figure.value)) } data-v=(figure.value) {
                (format::ratio(figure.value))
                (spread(figure, format::range))
            }
        },
        Cell::Without(status, reason) => html! { td.num { (status_word(status, reason)) } },
        Cell::Absent => absent(),
    }
}

fn mean(view: &View<'_>, group: Group) -> Markup {
    html! {
        tr.mean {
            th scope="row" { "geomean" }
            td {}
            @for column in view.guests() {
                @let applies = view.group(group).filter(|w| view.native_applies(w));
                @let slowdowns = Slowdowns::new(view, column.name, applies);
                @match slowdowns.geomean {
                    Some(mean) => td class={ "num heat h" (heat_step(mean)) } {
                        (format::ratio(mean))
                        span.spread { (slowdowns.sorted.len()) " of " (slowdowns.of) }
                    },
                    None => td.num { span.status.absent { "none" } span.spread { "0 of " (slowdowns.of) } },
                }
            }
        }
    }
}

/// Why there is no native figure where there might have been one.
fn native_reasons(view: &View<'_>) -> Markup {
    let cells = view
        .compared()
        .filter(|workload| view.native_applies(workload))
        .map(|workload| (workload, NATIVE, view.time(workload, NATIVE, Phase::Warm)));
    reasons(view, cells)
}
