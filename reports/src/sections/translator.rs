//! The translator's callouts: how often it leaves translated code, and why.

use maud::{Markup, html};
use reports_data::Phase;

use super::exits::{TRANSLATOR, Tally, panels, tallies, tally_table};
use super::nothing;
use crate::Result;
use crate::chart::stacked_bars;
use crate::format;
use crate::table::{Tools, head, number_head, table};
use crate::view::View;

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let tallies: Vec<Tally<'_>> = tallies(view)
        .into_iter()
        .filter(|tally| tally.source == TRANSLATOR)
        .collect();
    if tallies.is_empty() {
        return Ok(nothing("No translator counted anything in this run."));
    }
    let mut modes: Vec<&str> = tallies.iter().map(|tally| tally.mode).collect();
    modes.sort_unstable();
    modes.dedup();
    let title = "Translator callouts per iteration, warm, by kind";
    let chart = stacked_bars(
        "translator-chart",
        title,
        &panels(view, &tallies, TRANSLATOR, Phase::Warm),
    )?;
    Ok(html! {
        p {
            "A callout leaves translated code for the translator's own runtime and comes back: a block \
            to translate, a branch target to look up, a software TLB to fill. It is not a VM exit and \
            does not leave the process. Cold windows hold the work of translation itself; in warm \
            ones only what recurs is left."
        }
        @match chart {
            Some(chart) => (chart),
            None => (nothing("No callout in any warm window.")),
        }
        @for mode in &modes {
            @for phase in [Phase::Cold, Phase::Warm] { (matrix(view, &tallies, mode, phase)) }
        }
        (tally_table(
            "translator-table",
            "Callouts by reason: mean per iteration over the windows, with the smallest and the largest",
            view,
            &tallies,
        ))
    })
}

/// Workloads down, reasons across. Cold: whole window, because translation happens once. Warm:
/// per iteration.
fn matrix(view: &View<'_>, tallies: &[Tally<'_>], mode: &str, phase: Phase) -> Markup {
    let here = || {
        tallies
            .iter()
            .filter(|t| t.mode == mode && t.phase == phase)
    };
    let mut reasons: Vec<&str> = Vec::new();
    for tally in here() {
        if !reasons.contains(&tally.reason) {
            reasons.push(tally.reason);
        }
    }
    if reasons.is_empty() {
        return html! {};
    }
    let find = |workload: &str, reason: &str| {
        here().find(|tally| tally.workload == workload && tally.reason == reason)
    };
    let value = |tally: &Tally<'_>| match phase {
        Phase::Cold | Phase::Boot => tally.count as f64 / tally.windows as f64,
        Phase::Warm => tally.mean,
    };
    let workloads = view
        .workloads
        .iter()
        .filter(|workload| here().any(|tally| tally.workload == **workload));
    let body = html! {
        tbody {
            @for workload in workloads {
                tr {
                    th scope="row" { (workload) }
                    @for reason in &reasons {
                        @match find(workload, reason) {
                            Some(tally) => td.num data-v=(value(tally)) { (format::count(value(tally))) },
                            // The counts of a window leave zeros out.
                            None => td.num.zero data-v="0" { "0" },
                        }
                    }
                }
            }
        }
    };
    let what = match phase {
        Phase::Cold | Phase::Boot => "in a whole first window",
        Phase::Warm => "per iteration",
    };
    table(
        &format!("callouts-{}-{phase}", crate::page::anchor(mode)),
        &format!(
            "{}: callouts {what}, {phase}",
            view.run.manifest.label(mode)
        ),
        Tools::Sort,
        html! {
            tr { (head("Workload")) @for reason in &reasons { (number_head(reason)) } }
        },
        body,
    )
}
