//! What translated code does without leaving: shares of linked branches, of indirect branches found,
//! and of the ways that memory accesses go.
//!
//! The counts are a counting pass's ([`reports_data::paths`]), whose windows stand for no time.

use maud::{Markup, html};
use reports_data::Phase;
use reports_data::paths::Paths;

use crate::format;
use crate::table::{Tools, head, number_head, table};
use crate::view::View;

/// The table, if anything was counted.
pub(super) fn content(view: &View<'_>) -> Markup {
    let mut rows: Vec<(&str, &str, Phase, Paths)> = Vec::new();
    for &workload in &view.workloads {
        for column in &view.columns {
            for phase in [Phase::Cold, Phase::Warm] {
                if let Some(paths) = Paths::of(&view.run.exits, workload, column.name, phase) {
                    rows.push((workload, column.label, phase, paths));
                }
            }
        }
    }
    if rows.is_empty() {
        return html! {};
    }
    let head = html! {
        tr {
            (head("Workload")) (head("Mode")) (head("Phase"))
            (number_head("Direct branches")) (number_head("Chained"))
            (number_head("Indirect branches")) (number_head("Hit rate"))
            (number_head("Accesses")) (number_head("Window")) (number_head("Software path"))
            (number_head("Through the runtime"))
        }
    };
    let body = html! {
        tbody {
            @for (workload, label, phase, paths) in &rows {
                tr {
                    th scope="row" { (workload) }
                    td { (label) }
                    td { (phase) }
                    td.num data-v=(paths.direct) { (format::count(paths.direct)) }
                    (share(paths.chained()))
                    td.num data-v=(paths.indirect) { (format::count(paths.indirect)) }
                    (share(paths.indirect_hits()))
                    td.num data-v=(paths.accesses()) { (format::count(paths.accesses())) }
                    (share(paths.in_window()))
                    (share(paths.in_software()))
                    (share(paths.missed()))
                }
            }
        }
    };
    html! {
        h3 { "Branches and accesses of translated code" }
        p {
            "Counted by the translated code itself, in one cold and one warm window of a machine that \
            was started to count (" code { "--count-paths" } ") and whose times are thrown away. A \
            direct branch is chained if it leads from block to block; an indirect one hits if its \
            target stands in the jump cache. Accesses go through the memory window, look into the \
            software TLB, alone or together, or end in the runtime. Counts are per iteration; a dash is a share of nothing."
        }
        (table(
            "paths-table",
            "Translated code: branches and accesses per iteration, and which way they went",
            Tools::SortAndFilter,
            head,
            body,
        ))
    }
}

fn share(value: Option<f64>) -> Markup {
    match value {
        // Five nines and more are not the same as all.
        Some(value) => html! { td.num data-v=(value) { (percent(value)) } },
        None => html! { td.num.zero data-v="0" { "–" } },
    }
}

/// In percent; nothing but all of it is 100 %, and nothing but none of it 0 %.
fn percent(share: f64) -> String {
    match share {
        0.0 => "0 %".to_owned(),
        1.0 => "100 %".to_owned(),
        _ if share > 0.9999 => "> 99.99 %".to_owned(),
        _ if share < 0.0001 => "< 0.01 %".to_owned(),
        _ => format!("{:.2} %", share * 100.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_all_is_all_and_only_none_is_none() {
        for (share, text) in [
            (0.0, "0 %"),
            (1e-9, "< 0.01 %"),
            (0.1234567, "12.35 %"),
            (0.99999, "> 99.99 %"),
            (1.0, "100 %"),
        ] {
            assert_eq!(percent(share), text);
        }
    }
}
