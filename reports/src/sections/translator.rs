//! The translator's callouts: how often it leaves translated code, and why.

use std::borrow::Cow;

use maud::{Markup, html};
use reports_data::Phase;

use super::tally::{Matrix, Series, TRANSLATOR, Tally, matrix, panels, tallies, tally_table};
use super::{nothing, paths};
use crate::Result;
use crate::chart::stacked_bars;
use crate::format;
use crate::view::View;

pub(super) fn content(view: &View<'_>) -> Result<Markup> {
    let tallies: Vec<Tally<'_>> = tallies(view)
        .into_iter()
        .filter(|tally| tally.source == TRANSLATOR)
        .collect();
    if tallies.is_empty() {
        return Ok(nothing("No translator counted anything in this run."));
    }
    let columns = || {
        let columns = view.columns.iter();
        columns.filter(|column| tallies.iter().any(|tally| tally.mode == column.name))
    };
    let series: Vec<Series<'_>> = columns()
        .map(|column| Series {
            label: Cow::Borrowed(column.label),
            mode: column.name,
            source: TRANSLATOR,
            reason: None,
        })
        .collect();
    let title = "Translator callouts per iteration, warm, by kind";
    let chart = stacked_bars("translator-chart", title, &panels(view, &tallies, &series))?;
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
        (paths::content(view))
        @for column in columns() {
            @for phase in [Phase::Cold, Phase::Warm] {
                (matrix(view, &tallies, &Matrix {
                    what: TRANSLATOR,
                    prefix: "",
                    mode: column.name,
                    source: TRANSLATOR,
                    phase,
                }))
            }
        }
        details {
            summary { "Every callout by reason: " (format::plural(tallies.len(), "row")) }
            (tally_table(
                "translator-table",
                "Callouts by reason: mean per iteration over the windows, with the smallest and the largest",
                view,
                &tallies,
            ))
        }
    })
}
