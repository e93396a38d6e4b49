//! Exits per operation: what the VMM counted in the warm windows, and what the host's kernel did.
//!
//! Invariant: counts of different sources and of different columns are never added up.

use std::borrow::Cow;

use maud::{Markup, html};
use reports_data::held_against::ENGINE;
use reports_data::{Metric, Phase, TRANSLATED_CODE};

use super::nothing;
use super::tally::{
    KVM_STATS, Matrix, Series, TRANSLATOR, Tally, VMM, matrix, panels, tallies, tally_table,
};
use crate::Result;
use crate::chart::stacked_bars;
use crate::format;
use crate::view::{Column, View};

/// The kernel's count of instructions that KVM emulated: most of ring 0 where the backend is
/// software, and not one of them an exit to the VMM.
const EMULATED: &str = "insn_emulation";

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let (vmm, others): (Vec<Tally<'_>>, Vec<Tally<'_>>) = tallies(view)
        .into_iter()
        .filter(|tally| ![TRANSLATOR, TRANSLATED_CODE].contains(&tally.source))
        .partition(|tally| tally.source == VMM);
    let caution = html! {
        p.caution {
            "An exit is a transition from guest to VMM. A translator's callout is not a VM exit: it \
            stays in the process and is shown under " a href="#translator" { "the translator" } ". \
            Exits of different engines stand side by side and are never added up: they cost \
            different amounts and mean different things."
        }
    };
    let counting: Vec<&Column<'_>> = view.columns.iter().filter(|c| counts(view, c)).collect();
    if counting.is_empty() {
        return Ok(html! { (caution) (nothing("No exits were counted in this run.")) });
    }
    let title = "Exits to the VMM per iteration, warm, by kind";
    let drawn: Vec<Tally<'_>> = vmm.iter().chain(&others).cloned().collect();
    let series = series(&counting, &others);
    let chart = stacked_bars("exits-chart", title, &panels(view, &drawn, &series))?;
    Ok(html! {
        (caution)
        @if counting.iter().any(|column| column.engine == ENGINE) {
            p {
                "A guest that knows its host counts hypercalls, upcalls and faults, whether or not they reach \
                the VMM: by tier they stand under " a href="#para" { "hypercalls" } "."
            }
        }
        @if series.len() > counting.len() {
            p {
                "Bars marked " code { (EMULATED) } " are the kernel's own count of instructions that \
                KVM emulated: another layer, beside the exits and not part of them."
            }
        }
        @match chart {
            Some(chart) => (chart),
            None => (nothing("The VMM counted no exit in any warm window.")),
        }
        (without_exits(view, &counting, &vmm))
        @if !vmm.is_empty() {
            (tally_table(
                "exits-table",
                "Exits to the VMM by reason: mean per iteration over the windows, with the smallest and the largest",
                view,
                &vmm,
            ))
        }
        @for column in &counting {
            (matrix(view, &others, &Matrix {
                what: KVM_STATS,
                prefix: "",
                mode: column.name,
                source: KVM_STATS,
                phase: Phase::Warm,
            }))
        }
        @if !others.is_empty() {
            details {
                summary { "Everything else that was counted: " (format::plural(others.len(), "row")) }
                (tally_table(
                    "counts-table",
                    "Counts of other sources by reason: mean per iteration over the windows, with the smallest and the largest",
                    view,
                    &others,
                ))
            }
        }
    })
}

/// True for a column whose VMM counts: it left counts, or says that there were none. A foreign
/// VMM does neither, and an empty bar would claim that it had no exits.
fn counts(view: &View<'_>, column: &Column<'_>) -> bool {
    let mut rows = view.run.exits.iter();
    let mut summary = view.run.summary.rows.iter();
    rows.any(|row| row.mode == column.name)
        || summary.any(|row| {
            row.mode == column.name && row.metric == Metric::EXITS.name && row.status.is_ok()
        })
}

fn series<'a>(counting: &[&Column<'a>], others: &[Tally<'a>]) -> Vec<Series<'a>> {
    let mut series = Vec::new();
    for column in counting {
        series.push(Series {
            label: Cow::Borrowed(column.label),
            mode: column.name,
            source: VMM,
            reason: None,
        });
        let emulated = |tally: &Tally<'_>| {
            tally.mode == column.name && tally.source == KVM_STATS && tally.reason == EMULATED
        };
        if others.iter().any(emulated) {
            series.push(Series {
                label: Cow::Borrowed(EMULATED),
                mode: column.name,
                source: KVM_STATS,
                reason: Some(EMULATED),
            });
        }
    }
    series
}

/// Names the workloads whose windows had no exit at all in a column that counts.
fn without_exits(view: &View<'_>, counting: &[&Column<'_>], vmm: &[Tally<'_>]) -> Markup {
    let quiet = |column: &Column<'_>| -> Vec<&str> {
        let measured = view
            .compared()
            .filter(|w| view.warm(w, column.name).is_some());
        measured
            .filter(|workload| {
                let mut tallies = vmm.iter();
                !tallies.any(|tally| {
                    tally.workload == *workload
                        && tally.mode == column.name
                        && tally.phase == Phase::Warm
                })
            })
            .collect()
    };
    html! {
        @for column in counting {
            @let quiet = quiet(column);
            @if !quiet.is_empty() {
                p { b { (column.label) } " had no exit to the VMM in the warm windows of " (quiet.join(", ")) "." }
            }
        }
    }
}
